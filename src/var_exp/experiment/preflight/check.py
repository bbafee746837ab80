"""The check before a big job: everything that is wrong, and what the run would take.

Nothing is written, moved, fetched or trained. Networks are built without memory, on the meta
device; files that the run would read are read.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from var_exp.data import ImageSource
from var_exp.data.workers import number_of_workers
from var_exp.experiment import build
from var_exp.experiment.config.checks import CHOICES
from var_exp.experiment.config.plain import plain
from var_exp.experiment.preflight.images import ImageScan, balance_of, look
from var_exp.experiment.preflight.report import Findings, balance_row, looked_row
from var_exp.experiment.preflight.resources import (
    KEPT,
    Devices,
    checkpoints_bytes,
    devices_of,
    free_bytes,
)
from var_exp.experiment.preflight.stages import check_stages
from var_exp.experiment.run import Run
from var_exp.io.files import check_writable, nearest
from var_exp.io.text import amount, table
from var_exp.training.loggers.wandb import ContinuedWandbLogger, mode_of

IMBALANCE = 10  # of the largest class to the smallest, from which on there is a warning


def preflight(cfg: DictConfig, run: Run) -> int:
    """Look at all of a job, print what it would take and what is wrong with it.

    Returns:
        The exit code: 1 where there are errors.
    """
    if cfg.check not in (True, "all"):
        raise ValueError(f"check: expected false, true or all, got {cfg.check!r}")
    found, checkpoints = Findings(), []
    with nothing_fetched(), warnings.catch_warnings(action="ignore"):
        for check in CHOICES:
            found.attempt(check, cfg)
        found.attempt(run.check_changes)
        files = build.parts_from_files(cfg)
        failed = {key for key, make in files.items() if found.attempt(make) is None}
        devices = find_devices(plain(cfg.trainer), found)
        source = find_source(cfg, found)
        if source is not None:
            needs = check_stages(cfg, run, source, devices, failed, found)
            checkpoints = [stage.checkpoint for stage in needs.values()]
    check_machine(cfg, run.path, checkpoints, found)
    if source is not None and source.train is not None:
        check_images(cfg, source, found)
    return found.tell()


class NotFetched(OSError):
    """In the place of a download."""


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within this block torch.hub refuses to download, as where there is no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotFetched("a check fetches nothing")

    before, torch.hub.download_url_to_file = torch.hub.download_url_to_file, refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file = before


def find_devices(trainer: dict[str, Any], found: Findings) -> Devices:
    """What the Trainer is asked for; a single device where that is wrong."""
    asked, here = trainer["accelerator"], torch.accelerator.device_count()
    if asked == "cpu" and here:
        found.warn(f"trainer: this machine has {here} GPUs, and trainer=... asks for the CPU")
    if asked != "cpu" and not here:
        found.warn(
            "trainer: this machine has no GPU, so whether the memory of one suffices is not known"
        )
    devices = found.attempt(devices_of, trainer, 1 if asked == "cpu" else here)
    if devices is None:
        return Devices(1, 1)
    if asked != "cpu" and 0 < here < devices.each:
        found.error(
            f"trainer: expected at most the {here} GPUs of this machine, got {devices.each} "
            f"(trainer.devices)"
        )
    if asked != "cpu" and not here and trainer["devices"] in ("auto", -1):
        found.warn(
            "trainer: counted as one GPU a machine, since trainer.devices takes all there are "
            "and here is none; say trainer.devices=8"
        )
    return devices


def find_source(cfg: DictConfig, found: Findings) -> ImageSource | None:
    """The images, set up if they are there; None where they cannot be described."""
    source = found.attempt(build.source, cfg)
    if source is None:
        return None
    found.attempt(source.setup)
    if source.train is None and getattr(source, "expected_classes", None):
        source.class_names = tuple(map(str, range(source.expected_classes)))
    return source


def check_machine(
    cfg: DictConfig, run_dir: Path, checkpoints: Sequence[int], found: Findings
) -> None:
    """Folders, disk and loggers, with a table."""
    places = [run_dir, Path(cfg.runs_dir), Path(cfg.evaluation.cache)]
    by_place = {nearest(folder): folder for folder in reversed(places)}  # each is said once
    for folder in by_place.values():
        found.attempt(check_writable, folder, "run_dir")
    rows: dict[str, object] = {}
    free, needed = free_bytes(run_dir), checkpoints_bytes(checkpoints)
    if checkpoints:
        rows["a checkpoint"] = ", ".join(map(amount, checkpoints))
        rows["all checkpoints"] = (
            f"{amount(needed)} at most, {KEPT} of each stage and one unfinished"
        )
        if needed > free:
            found.error(
                f"disk: the checkpoints take up to {amount(needed)}, {amount(free)} are free at "
                f"{str(run_dir)!r}; make room, or choose another run_dir or runs_dir"
            )
    rows["free disk"] = f"{amount(free)} at {run_dir}"
    for name, logger in cfg.logger.items():
        make = instantiate(logger)
        if getattr(make, "func", None) is ContinuedWandbLogger:
            rows[f"logger {name}"] = mode_of(make.keywords)
    print(table("machine", rows), end="\n\n", flush=True)


def check_images(cfg: DictConfig, source: ImageSource, found: Findings) -> None:
    """Counts, classes and a look at the images, with a table."""
    rows: dict[str, object] = {"classes": source.num_classes or "none: without classes"}
    for part in ("train", "val"):
        dataset = getattr(source, part)
        rows[f"{part} images"] = f"{len(dataset):,}" + (" an epoch, endless" * source.endless)
        balance = balance_of(dataset, source.class_names)
        if balance is not None:
            rows[f"{part} classes"] = balance_row(balance)
            if balance.empty:
                found.warn(
                    f"data: {len(balance.empty)} classes have no images in {part}, the first is "
                    f"{balance.empty[0]!r}"
                )
            elif part == "train" and balance.largest[1] > IMBALANCE * balance.smallest[1]:
                found.warn(f"data: the classes are uneven: {balance_row(balance)}")
        looked = found.attempt(
            look,
            source,
            part,
            seed=cfg.seed,
            num_workers=number_of_workers(cfg.datamodule.num_workers),
            everything=cfg.check == "all",
        )
        if looked is not None:
            rows[f"{part} files"] = looked_row(looked)
            tell_looks(source, part, looked, found)
    bad = sorted(source.bad_images)
    if bad:
        found.warn(f"data: {len(bad)} images do not decode and are skipped, the first is {bad[0]}")
    print(table(f"images: {source.name}", rows), end="\n\n", flush=True)


def tell_looks(source: ImageSource, part: str, looked: ImageScan, found: Findings) -> None:
    if problems := looked.problems:
        found.error(f"data: {len(problems)} {part} images cannot be used; {problems[0]}")
    sizes = [look.size for look in looked.looks if look.size]
    small = sum(h < source.image_size[0] or w < source.image_size[1] for h, w in sizes)
    if small:
        found.warn(
            f"data: {small} of {len(sizes)} {part} images are smaller than {source.image_size} "
            f"and would be enlarged (data.image_size)"
        )
    if source.channels == 3 and sizes and all(look.is_grey for look in looked.looks if look.size):
        found.warn(f"data: all {part} images looked at are grey (data.channels=1 is enough)")
