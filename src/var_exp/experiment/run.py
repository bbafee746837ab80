"""A run: its folder, the configuration it was started with, its metrics, and how it resumes."""

import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from var_exp.data import ImageSource
from var_exp.distributed.launch import START, check_meeting_point
from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import RESUME_HINT, clear_stop_marker
from var_exp.evaluation.evaluator import Evaluator
from var_exp.experiment.config.checks import check_sweep, trained
from var_exp.experiment.config.overrides import as_override
from var_exp.experiment.config.plain import plain
from var_exp.experiment.resume import (
    changed_code,
    check_changes,
    has_restarted,
    mark_restarted,
    read_record,
    write_record,
)
from var_exp.io.environment import environment
from var_exp.io.lock import locked
from var_exp.io.run_folder import (
    Metrics,
    point_latest,
    read_metrics,
    remove_if_empty,
    write_metrics,
)
from var_exp.io.text import describe, shown_path, table
from var_exp.report import write_report
from var_exp.training.fit import StageResult
from var_exp.training.resume import newest_path

METRICS = "metrics.json"
SHOWN = (  # how metrics begin that the table at the end shows
    *("psnr", "ssim", "loss", "acc", "class_accuracy", "fid", "rfid", "inception_score"),
    *("precision", "recall", "seconds"),
)


class Stage(Protocol):
    """One step of a run, with all that it needs."""

    name: str

    def check(self, num_processes: int) -> None:
        """Raise ValueError for what would fail once earlier stages have run; write nothing."""

    def restart(self) -> None:
        """Delete what the stage left in the run folder."""

    def run(self, evaluator: Evaluator) -> StageResult | None:
        """Do the work; None for a stage without metrics."""


class Run:
    """A run folder, and this start of the run in it.

    Args:
        path: the run folder.
        cfg: the configuration of this start.

    Attributes:
        resume: "auto", "never", or the path that the run begins from. A job that started over
            resumes itself when its cluster starts it again.
    """

    def __init__(self, path: Path, cfg: DictConfig):
        self.path, self.cfg = path, cfg
        resume = cfg.get("resume", "auto")
        self.metrics = Metrics({}, {})
        self.resume = "auto" if resume == "never" and has_restarted(path) else resume

    @classmethod
    def of_job(cls, cfg: DictConfig) -> "Run":
        """The run in the folder that Hydra has chosen for this job."""
        folder = cfg.run_dir if cfg.get("check") else HydraConfig.get().runtime.output_dir
        return cls(Path(folder).resolve(), cfg)

    @property
    def resume_hint(self) -> str:
        """What to type to resume the run; its folder by name, or it would get a new one."""
        if "run_dir" not in self.cfg:
            return RESUME_HINT
        folder = as_override("run_dir", shown_path(self.path))
        if START in os.environ:  # of torchrun or srun, whose own arguments are not known here
            return f"the same command goes on with {folder}"
        given = HydraConfig.get().overrides.task
        kept = [o for o in given if not o.lstrip("+").startswith(("run_dir=", "resume=never"))]
        return f"to go on: {shlex.join(['python', Path(sys.argv[0]).name, *kept, folder])}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other runs, in the main process."""
        option = "run_dir=..." if "run_dir" in self.cfg else "out_dir=..."
        try:
            with locked(self.path, option) if is_main_process() else nullcontext():
                clear_stop_marker(self.path)
                yield
        finally:
            self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Delete the folder that Hydra made for this start, and its parent, if they are empty."""
        remove_if_empty(self.path)

    # -- before the first stage -----------------------------------------------------------

    def check(self, stages: Sequence[Stage], devices: int, num_nodes: int) -> None:
        """Find what a stage would refuse, or what a resumed run may not change; write nothing.

        Args:
            devices, num_nodes: devices of a machine, and machines.

        Raises:
            ValueError: see `Stage.check` and `check_changes`; or processes that would not meet.
        """
        num_processes = devices * num_nodes
        check_sweep(num_processes)
        for stage in stages:
            stage.check(num_processes)
        check_meeting_point(num_processes, num_nodes)
        self.check_changes()

    def check_changes(self) -> None:
        """Print what is different from when the run was started.

        Raises:
            ValueError: the difference changes what is trained, see `check_changes`.
        """
        begun = [stage for stage in trained(self.cfg) if newest_path(self.path / stage)]
        if not begun or self.resume == "never" or not is_main_process():
            return
        config, register_config = read_record(self.path)
        now = environment()
        code = changed_code(register_config, now)
        is_same_code = not code and not now["git_dirty"]
        found = code + check_changes(self.path, config, plain(self.cfg), begun, is_same_code)
        if found:
            print(f"resume: different from when the run was started: {'; '.join(map(str, found))}")

    def start(self, stages: Sequence[Stage]) -> None:
        """Record this start in the run folder, and print what will be trained."""
        self.metrics = read_metrics(self.path / METRICS)  # of stages that ran here before
        if not is_main_process():
            return
        if self.resume == "never":
            for stage in stages:
                stage.restart()
            mark_restarted(self.path)
        write_record(self.cfg, self.path)
        point_latest(Path(self.cfg.runs_dir), self.path)
        steps = ", then ".join(map(str, stages))
        print(f"{self.cfg.name}: {steps}, into {shown_path(self.path)}", flush=True)

    # -- results --------------------------------------------------------------------------

    def record(self, stage: Stage, result: StageResult | None) -> None:
        """Add the metrics of a stage to `metrics.json`, and refresh the report."""
        if result is None:
            return
        self.metrics = self.metrics.with_stage(stage.name, result.metrics, result.protocol)
        if is_main_process():
            write_metrics(self.metrics, self.path / METRICS)
            write_report(self.path)

    def finish(self, images: ImageSource) -> dict[str, float]:
        """Print the most telling metrics; return all of them, keyed `stage/metric`.

        Args:
            images: that were trained on; those that did not decode are told.
        """
        if is_main_process() and trained(self.cfg):
            print(self.summary())
            if bad := sorted(images.bad_images):
                print(f"{len(bad)} images did not decode and were skipped, the first is {bad[0]}")
        return self.metrics.figures

    def summary(self) -> str:
        """The table at the end; beside a metric stands the band where it is expected."""
        metrics, expected = self.metrics.figures, self.cfg.expected
        rows: dict[str, object] = {
            key: value
            for key, value in metrics.items()
            if key.split("/")[1].startswith(SHOWN) and "_scale" not in key or key in expected
        }
        for key, (low, high) in expected.items():
            if key in rows:
                rows[key] = f"{describe(rows[key])}  (expected {low:g} to {high:g})"
        rows |= {"all figures": self.path / METRICS, "report": self.path / "report.html"}
        return table(f"{self.cfg.name}: what was reached", rows)

    def objective(self, metrics: dict[str, float]) -> float | None:
        """The metric that a search optimises; None without one.

        Raises:
            ValueError: the run has no such metric.
        """
        name = self.cfg.objective
        if name and name not in metrics:
            near = ", ".join(difflib.get_close_matches(name, metrics, n=5, cutoff=0.3))
            raise ValueError(
                f"objective: expected a figure of metrics.json, such as {near}; got {name!r}"
            )
        return metrics[name] if name else None
