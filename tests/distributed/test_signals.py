"""A run that is told to stop stops in order, says so, and goes on as if nothing had happened."""

import functools
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from helpers.command import QUICK, ROOT, run
from helpers.programs import Program, csv_rows
from helpers.stages import assert_equal, weights
from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import RESUMABLE, SIGNALS, Interrupted, SignalHandler

each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)

LONG = [
    *QUICK,
    "model.tokenizer.num_batches=30",
    "model.tokenizer.val_every=10",
    "model.var.num_batches=20",
    "model.var.val_every=10",
]
TWO = ["trainer=ddp", "trainer.devices=2"]


# -- the signals of a process ---------------------------------------------------------------


@pytest.fixture
def signal_handler():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made = SignalHandler()
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@each_signal
def test_a_signal_that_is_heeded_ends_the_program_on_the_spot(number, signal_handler):
    with pytest.raises(Interrupted, match=number.name) as stop, signal_handler.immediate():
        signal.raise_signal(number)
    assert stop.value.code == RESUMABLE == 85


@each_signal
def test_a_deferred_signal_ends_the_program_after_the_block(number, signal_handler):
    reached = []
    with pytest.raises(Interrupted), signal_handler.immediate(), signal_handler.deferred():
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        reached.append(signal_handler.received)
    assert reached == [number]


@each_signal
def test_a_signal_before_the_program_heeds_any_ends_it_once_it_does(number, signal_handler):
    signal.raise_signal(number)  # while it imports its libraries
    with pytest.raises(Interrupted, match=number.name), signal_handler.immediate():
        pytest.fail("the block was entered")


def test_further_signals_do_not_disturb_a_program_that_leaves(signal_handler):
    with pytest.raises(Interrupted), signal_handler.immediate():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # srun passes on what Slurm has sent already
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, -signal.SIGUSR1)])
def test_a_program_that_is_over_keeps_its_exit_code(finished, code):
    # The interpreter gives up all handlers before it lets go of its objects.
    script = (
        "import os, signal; from var_exp.distributed.signals import SignalHandler\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(me, number)\n"
        "last, interruption = Last(), SignalHandler()\n"
        f"interruption.install(); {finished} and interruption.finish()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == code


def test_ctrl_c_still_ends_a_program_that_is_over(signal_handler):
    signal_handler.finish()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_does_not_wait(signal_handler):
    with pytest.raises(KeyboardInterrupt), signal_handler.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_was_lost_in_a_destructor_ends_the_program_at_the_next_block(signal_handler):
    signal_handler.received = signal.SIGTERM
    with pytest.raises(Interrupted), signal_handler.deferred():
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"LOCAL_RANK": "1"}, False), ({"RANK": "0", "LOCAL_RANK": "1"}, True)]
    + [({"SLURM_PROCID": "3"}, False), ({"RANK": "2", "SLURM_PROCID": "0"}, False)]
    + [({"SLURM_PROCID": "0", "LOCAL_RANK": "1", "SLURM_JOB_NAME": "bash"}, False)]
    + [({"NODE_RANK": "1"}, False), ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True)]
    + [({"GROUP_RANK": "1", "LOCAL_RANK": "0"}, False)],
)
def test_the_main_process_is_known_before_processes_have_met(environment, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == first


# -- a run folder is one run's --------------------------------------------------------------


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "run"` until it is killed."""
    script = (
        "import sys, pathlib; from var_exp.io.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script, tmp_path / "run"]
    process = subprocess.Popen(command, env=environment, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_in_a_folder_that_is_in_use_is_refused_in_one_line(holder, tmp_path):
    refused = run("train", f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}", *QUICK)
    assert refused.code == 1
    assert f"in use by process {holder.pid}" in refused.errors[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# -- the program ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(classifier):
    """Start a run in a folder, or go on with it."""
    return functools.partial(Program, classifier=classifier)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = start(folder, *LONG).end()
    assert code == 0, said
    return folder / "run"


@pytest.fixture(scope="module")
def whole_of_two(start, tmp_path_factory):
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    code, said = start(folder, *LONG, *TWO).end()
    assert code == 0, said
    return folder / "run"


def assert_like(run_dir, whole):
    for stage in ("tokenizer", "var"):
        assert_equal(weights(run_dir, stage), weights(whole, stage))
        assert csv_rows(run_dir, stage) == csv_rows(whole, stage)


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGTERM, "tokenizer"), (signal.SIGINT, "var"), (signal.SIGUSR1, "imports")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_at_any_time_ends_the_program_with_85_and_it_goes_on_exactly(
    number, where, whole, start, tmp_path
):
    program = start(tmp_path, *LONG)
    if where == "imports":
        program.wait_until_signals_are_in_hand()
    else:
        program.wait_for(f"{where}: batch [1-9]")
    program.process.send_signal(number)
    code, said = program.end()
    assert code == RESUMABLE, said
    assert f"stopped by {number.name}; to go on: python train.py " in said
    assert " run_dir=run\n" in said
    assert "Traceback" not in said
    code, said = start(tmp_path, *LONG).end()
    assert code == 0, said
    assert_like(tmp_path / "run", whole)


def test_a_killed_program_goes_on_exactly(whole, start, tmp_path):
    program = start(tmp_path, *LONG)
    program.wait_for("tokenizer: batch 1[2-9]")
    program.process.kill()
    program.end()
    code, said = start(tmp_path, *LONG).end()
    assert code == 0, said
    assert_like(tmp_path / "run", whole)


slow = pytest.mark.slow  # each takes three whole runs


@pytest.mark.parametrize(
    "to", [pytest.param("all", marks=slow), pytest.param("the first", marks=slow), "the other"]
)
def test_two_processes_stop_after_the_same_batch_and_go_on_exactly(
    to, whole_of_two, start, tmp_path
):
    program = start(tmp_path, *LONG, *TWO)
    program.wait_for("tokenizer: batch 1[2-9]")
    (child,) = program.children()
    for pid in {"all": [program.process.pid, child], "the other": [child]}.get(
        to, [program.process.pid]
    ):
        os.kill(pid, signal.SIGTERM)
    code, said = program.end()
    assert code == RESUMABLE and "Traceback" not in said, said
    assert said.count("stopped by SIGTERM") == 1
    code, said = start(tmp_path, *LONG, *TWO).end()
    assert code == 0, said
    assert_like(tmp_path / "run", whole_of_two)


@slow
@pytest.mark.parametrize("victim", ["the first", "the other"])
def test_where_one_process_dies_the_others_stop_and_the_run_goes_on(
    victim, whole_of_two, start, tmp_path
):
    program = start(tmp_path, *LONG, *TWO)
    program.wait_for("tokenizer: batch 1[2-9]")
    (child,) = program.children()
    os.kill({"the first": program.process.pid, "the other": child}[victim], signal.SIGKILL)
    code, said = program.end()
    assert code != 0
    assert "another process of this run has ended" in said, said
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{child}")
    code, said = start(tmp_path, *LONG, *TWO).end()
    assert code == 0, said
    assert_like(tmp_path / "run", whole_of_two)


@slow
def test_two_processes_train_on_while_nothing_can_be_saved_and_say_so_once(
    whole_of_two, start, tmp_path
):
    program = start(tmp_path, *LONG, *TWO)
    program.wait_for("tokenizer: batch [1-9]")
    pid, (soft, hard) = program.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, hard))  # checkpoints are larger
    program.wait_for("tokenizer: batch 2[1-9]")
    assert not list((tmp_path / "run" / "tokenizer").glob("*.ckpt"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    code, said = program.end()
    assert code == 0, said
    assert len(re.findall("checkpoint: .* could not be written", said)) == 1, said
    for stage in ("tokenizer", "var"):
        assert_equal(weights(tmp_path / "run", stage), weights(whole_of_two, stage))


# -- what changed meanwhile -----------------------------------------------------------------


def test_a_run_goes_on_with_other_things_to_look_at_and_says_so(tmp_path):
    options = [f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}", *QUICK, "stages=[tokenizer]"]
    assert run("train", *options).code == 0
    again = run("train", *options, "evaluation.num_samples=30", "datamodule.num_workers=1")
    assert again.code == 0
    told = next(line for line in again.out.splitlines() if line.startswith("resume:"))
    assert "evaluation.num_samples 20 -> 30" in told and "num_workers auto -> 1" in told


def test_a_run_does_not_go_on_with_another_learning_rate_and_names_all_that_matters(tmp_path):
    options = [f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}", *QUICK, "stages=[tokenizer]"]
    assert run("train", *options).code == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    changed = ["model.tokenizer.optimizer.lr=0.5", "model.tokenizer.clip=2.0"]
    refused = run("train", *options, *changed, "evaluation.num_samples=30")
    assert refused.code == 1
    (line,) = refused.errors
    assert "model.tokenizer.optimizer.lr 0.002 -> 0.5" in line
    assert "model.tokenizer.clip 1.0 -> 2.0" in line and "num_samples" not in line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert run("train", *options, "model.var.optimizer.lr=0.5").code == 0  # not begun
