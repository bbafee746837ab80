"""A real Slurm on this machine: two emulated nodes on loopback, for the time of a test module.

It has a munge, a folder and free ports of its own, and needs no root: what else runs on the
machine is not touched.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "munged")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking:
        packages = "slurmctld slurmd slurm-client munge"
        return f"{', '.join(lacking)} not installed (apt-get install {packages})"
    return ""


CONFIGURATION = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={root}/munge/socket,cred_expire=5
MailProg=/bin/true
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ReturnToService=2
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} {node}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} {node}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL DefaultTime=10 MaxTime=INFINITE PriorityTier=9
"""
NODE = "CPUs=2 CoresPerSocket=2 RealMemory=6000"


class Cluster:
    """Started when made; `stop` ends every process that it started."""

    def __init__(self, root: Path):
        for name in ("state", "log", "run", "munge", "spool/n1", "spool/n2"):
            (root / name).mkdir(parents=True)
        ports = dict(zip(("controller", "node1", "node2"), free_ports(3), strict=True))
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(
            root=root, host=host, user=pwd.getpwuid(os.getuid()).pw_name, node=NODE, **ports
        )
        (root / "slurm.conf").write_text(text)
        self.root, self.processes = root, []
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": PATH}
        try:
            self.start_munge()
            self.start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self.start("slurmd", "-D", "-N", node)
            self.wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60)
        except BaseException:
            self.end_processes()
            raise

    def start_munge(self) -> None:
        place = self.root / "munge"
        (place / "key").touch(mode=0o600)
        (place / "key").write_bytes(secrets.token_bytes(128))
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={place / name}" for option, name in options.items()]
        # Forced, as others cannot enter the folder of the socket, which is no harm here.
        self.start("munged", "--foreground", "--force", *files, f"--log-file={place / 'log'}")
        self.wait((place / "socket").exists, 20)

    def start(self, *command: str) -> None:
        with open(self.root / "log" / f"{command[0]}_{len(self.processes)}.out", "w") as log:
            # Not of the terminal's group: Ctrl-C must leave them to `stop`.
            self.processes.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def call(self, *command: str, **more: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def submit(self, *arguments: str, **more: str) -> str:
        """Submit a script; the number of the job."""
        told = self.call("sbatch", "--parsable", *arguments, **more)
        return told.strip()

    def state(self, job: str) -> str:
        """RUNNING, PENDING ...; empty once it has ended."""
        return self.call("squeue", "-h", "-j", job, "-o", "%T").strip()

    def about(self, job: str) -> dict[str, str]:
        """What scontrol tells of a job."""
        told = self.call("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in told)

    def processes_of(self, job: str, program: str) -> list[int]:
        """The processes of a job that were started with an executable."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                environment = (place / "environ").read_bytes().split(b"\0")
                command = (place / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended, or is another's
                continue
            ours = {
                b"SLURM_JOB_ID=%s" % job.encode(),
                b"SLURM_CONF=%s" % bytes(self.root / "slurm.conf"),
            }
            if command[0] == program.encode() and ours <= {*environment}:
                found.append(int(place.name))
        return found

    def wait(self, reached, seconds: float = 240) -> None:
        """Until something is reached."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"not reached in {seconds} s:\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_end(self, job: str, seconds: float = 240) -> None:
        self.wait(lambda: not self.state(job), seconds)

    def logs(self) -> str:
        """The ends of the logs of the jobs and of the daemons."""
        paths = [*self.root.glob("*.log"), *(self.root / "log").iterdir()]
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in paths)

    def stop(self) -> None:
        try:
            jobs = self.call("squeue", "-h", "-o", "%A").split()
            if jobs:  # steps outlive slurmd
                self.call("scancel", "--signal=KILL", "--full", *jobs)
                self.call("scancel", *jobs)
                self.wait(lambda: not self.call("squeue", "-h").strip(), 60)
        finally:
            self.end_processes()

    def end_processes(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
