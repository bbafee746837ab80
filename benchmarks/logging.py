"""What logging costs: its share of a training step, at the default interval.

    python -m benchmarks.logging

Trains each stage and switches, every ten batches (one logging interval), between nothing at all
and what is to be measured, so that whatever else the machine does meets all of them alike. A
difference is taken within a round of switches, and the median over the rounds counts. The
milliseconds that logging adds do not depend on what a batch computes, so they are taken where
they stand out, on a light batch, and stated as a share of the default job's step, measured in
the same process. All are of processor time on one thread, which is the time of a clock where
nothing else runs. Validations, pictures and checkpoints are no part of it. Writes
`benchmarks/results/logging.json` and prints the table.
"""

import argparse
import contextlib
import io
import math
import os
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from benchmarks.harness import markdown, save
from var_exp.experiment import build
from var_exp.experiment.config.overrides import CONF
from var_exp.experiment.run import Run
from var_exp.io.environment import machine
from var_exp.training.callbacks.throughput import ThroughputMonitor
from var_exp.training.fit import StageSchedule, fit_stage
from var_exp.training.module import StageModule

STAGES = ("tokenizer", "var")
DEFAULT = ["logger=all"]
LIGHT = [
    *DEFAULT,
    "tokenizer.encoder.width=16",
    "transformer.depth=1",
    "transformer.width=16",
    "transformer.num_heads=2",
    "model.tokenizer.batch_size=2",
    "model.var.batch_size=2",
]
NOTHING = "nothing"
MODES = {  # name -> loggers in use
    NOTHING: (),
    "CSV": ("csv",),
    "CSV, W&B offline": ("csv", "wandb"),
    "CSV, TensorBoard": ("csv", "tensorboard"),
}
WARM_UP = 3  # intervals


class Alternate(Callback):
    """Switch the way of logging every `interval` batches, and take the time of each interval."""

    def __init__(self, interval: int, names: list[str], modes: list[str]):
        self.interval, self.names, self.modes = interval, names, modes
        self.seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        self.mode, self.began = "", 0.0

    def on_train_start(self, trainer, module: StageModule) -> None:
        # The first callback of all: the interval begins with what the others do.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        self.monitor = next(c for c in trainer.callbacks if isinstance(c, ThroughputMonitor))
        self.profilers = {False: self.monitor.fetches.profiler, True: trainer.profiler}
        self.every = trainer.log_every_n_steps
        self.loggers = dict(zip(self.names, trainer.loggers, strict=True))

    def on_train_batch_start(self, trainer, module: StageModule, batch, i: int) -> None:
        if i % self.interval == 0:
            now = time.process_time()
            if i >= (WARM_UP + 1) * self.interval:
                self.seconds[self.mode].append((now - self.began) / self.interval)
            self.switch(trainer, i // self.interval)
            self.began = time.process_time()

    def switch(self, trainer, number: int) -> None:
        """Rounds begin with another mode each time, since a switch may cost something too."""
        round_, place = divmod(number - WARM_UP, len(self.modes))
        self.mode = self.modes[(place + round_) % len(self.modes)]
        trainer.loggers = [self.loggers[name] for name in MODES[self.mode]]
        logs = bool(trainer.loggers)
        trainer.log_every_n_steps = self.every if logs else 0
        trainer.profiler = self.profilers[logs]
        trainer.callbacks = [c for c in trainer.callbacks if c is not self.monitor]
        if logs:
            trainer.callbacks.insert(2, self.monitor)  # behind this one and the count of batches
            self.monitor.reset()


def measure(
    stage: str, overrides: list[str], rounds: int, modes: list[str]
) -> dict[str, list[float]]:
    """Seconds a batch, by mode and round."""
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("train", overrides=overrides)
    data = build.datamodule(cfg)
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build.tokenizer(cfg, data.source, Run(Path(folder), cfg))
        module = build.modules(cfg, data.source, tokenizer)[stage]
        num_batches = (WARM_UP + rounds * len(modes) + 1) * cfg.trainer.log_every_n_steps
        alternate = Alternate(cfg.trainer.log_every_n_steps, list(cfg.logger), modes)
        with contextlib.redirect_stderr(io.StringIO()):  # progress lines
            fit_stage(
                module,
                data,
                instantiate(cfg.trainer, _partial_=True),
                StageSchedule(cfg.model[stage].batch_size, num_batches, num_batches, cfg.seed),
                run_dir=Path(folder),
                callbacks=[alternate],
                loggers=[instantiate(logger) for logger in cfg.logger.values()],
            )
    return {mode: seconds[:rounds] for mode, seconds in alternate.seconds.items()}


def summary(seconds: dict[str, list[float]], step: float) -> dict[str, dict[str, Any]]:
    """Milliseconds that each mode adds to a batch, and their share of a step of so many seconds.

    Medians over the rounds, between the bounds that hold them with 95 % (order statistics).
    """
    found = {}
    for mode in list(seconds)[1:]:
        pairs = zip(seconds[mode], seconds[NOTHING], strict=True)
        added = sorted(1000 * (ours - none) for ours, none in pairs)
        away = 1.96 * math.sqrt(len(added)) / 2  # the median's rank is binomial
        low, high = (round((len(added) - 1) / 2 + sign * away) for sign in (-1, 1))
        found[mode] = {
            "added_ms": median(added),
            "added_ms_bounds": [added[low], added[high]],
            "share_of_step": median(added) / (1000 * step),
            "share_of_step_at_most": added[high] / (1000 * step),
        }
    return found


def table(results: dict[str, dict]) -> str:
    rows = [["stage", "loggers", "ms added to a batch", "of a default step"]]
    for stage, found in results.items():
        for mode, row in found["modes"].items():
            low, high = row["added_ms_bounds"]
            added = f"{row['added_ms']:.2f} ({low:.2f} to {high:.2f})"
            share = f"{100 * row['share_of_step']:.2f} %"
            share += f" (at most {100 * row['share_of_step_at_most']:.2f} %)"
            rows.append([stage, mode, added, share])
    return markdown(rows)


def measure_stage(stage: str, rounds: int) -> dict[str, Any]:
    step = median(measure(stage, DEFAULT, rounds // 8, [NOTHING])[NOTHING])
    seconds = measure(stage, LIGHT, rounds, list(MODES))
    return {
        "overrides": LIGHT,
        "default_step_ms": 1000 * step,
        "light_step_ms": 1000 * median(seconds[NOTHING]),
        "modes": summary(seconds, step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {**machine(), "date": date.today().isoformat(), "threads": 1}
    about |= {"rounds": args.rounds, "interval": 10}
    results = {stage: measure_stage(stage, args.rounds) for stage in STAGES}
    save("logging", about | {"results": results})
    print(table(results))


if __name__ == "__main__":
    main()
