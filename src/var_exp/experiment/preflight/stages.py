"""The check of networks and stages: they are built without memory, and measured."""

from collections.abc import Collection
from types import SimpleNamespace

from omegaconf import DictConfig
from torch import nn

from var_exp.data import ImageDataModule, ImageSource
from var_exp.experiment import build
from var_exp.experiment.preflight.report import Findings, memory_rows, network_rows, schedule_rows
from var_exp.experiment.preflight.resources import (
    Devices,
    MemoryEstimate,
    device_memory,
    estimate_memory,
    free_bytes,
    parameters_of,
    ready,
)
from var_exp.experiment.run import Run
from var_exp.io.files import check_writable
from var_exp.io.text import amount, table
from var_exp.tokenizer import VQVAE
from var_exp.training import fit
from var_exp.training.module import StageModule

NETWORKS = {"tokenizer": ("tokenizer",), "var": ("tokenizer", "transformer")}  # of each stage
FULL = 0.9  # share of a device's memory from which on there is a warning


def check_stages(
    cfg: DictConfig,
    run: Run,
    source: ImageSource,
    devices: Devices,
    failed: Collection[str],
    found: Findings,
) -> dict[str, MemoryEstimate]:
    """Build, check and measure all stages that can be, and print what they take.

    Args:
        source: set up, if it could be.
        failed: parts that are read from files and could not be.
    """
    networks, needs = build_networks(cfg, run, source, found), {}
    possible = build.without_parts(cfg, failed)
    for stage in cfg.stages:
        if stage == "tokens" and "tokenizer" in networks and source.train is not None:
            found.attempt(check_tokens, cfg, run, source, networks["tokenizer"], found)
        if not set(NETWORKS.get(stage, ("unknown",))) <= set(networks):
            continue  # the reason was noted
        chosen = {name: networks[name] for name in NETWORKS[stage]}
        module = found.attempt(build.module, possible.model[stage], chosen)
        if module is not None:
            needs[stage] = check_stage(cfg, run, source, devices, module, found)
    return {stage: value for stage, value in needs.items() if value is not None}


def build_networks(
    cfg: DictConfig, run: Run, source: ImageSource, found: Findings
) -> dict[str, nn.Module]:
    """Those that can be built, on the meta device."""
    tokenizer = found.attempt(build.tokenizer, cfg, source, run, "meta")
    if tokenizer is None:
        tokenizer = found.attempt(build.new_tokenizer, cfg, source, "meta")
    if tokenizer is None or tokenizer.image_size != source.image_size:
        return {}  # the reason was noted
    tokenizer.to("meta").fingerprint = lambda: "none"  # there is nothing to take one of
    networks = {"tokenizer": tokenizer}
    if "var" in cfg.stages:
        networks["transformer"] = found.attempt(build.transformer, cfg, source, tokenizer, "meta")
    return {name: network for name, network in networks.items() if network is not None}


def check_stage(
    cfg: DictConfig,
    run: Run,
    source: ImageSource,
    devices: Devices,
    module: StageModule,
    found: Findings,
) -> MemoryEstimate | None:
    """One stage, and the table of what it takes; None where its batches are wrong."""
    num_images = None if source.train is None else len(source.train)
    # Without images the lengths of a schedule in epochs are meaningless, and all else is as it is.
    images = source if num_images else SimpleNamespace(train=range(1), varies=False)
    schedule = found.attempt(build.schedule, cfg, module.stage, images)
    if schedule is None:
        return None
    found.attempt(fit.check_stage, module, run.path, schedule, run.resume)
    if num_images and schedule.batch_size > num_images:
        found.warn(
            f"model.{module.stage}: a batch of {schedule.batch_size:,} has some of the "
            f"{num_images:,} images more than once (model.{module.stage}.batch_size)"
        )
    if not isinstance(schedule.batch_size, int) or schedule.batch_size < 1:
        return None  # the reason was noted
    try:
        fit.check_batch_divides(module.stage, schedule.batch_size, devices.total)
    except ValueError as error:
        found.error(str(error))
        return None
    trained = ready(module)
    rows = network_rows(parameters_of(trained))
    rows |= schedule_rows(schedule, devices, module.micro_batch_size, num_images)
    needs = found.attempt(
        estimate_memory,
        trained,
        image_shape=(source.channels, *source.image_size),
        share=schedule.batch_size // devices.total,
        num_batches=schedule.num_batches,
        samples=cfg.evaluation.batch_size,
        precision=cfg.trainer.precision,
        accelerator=cfg.trainer.accelerator,
    )
    if needs is not None:
        needs = needs.shared(devices)
        memory = device_memory(cfg.trainer.accelerator, devices.each)
        rows |= memory_rows(needs, memory)
        check_memory(module, needs, memory, found)
    print(table(f"stage {module.stage}", rows), end="\n\n", flush=True)
    return needs


def check_tokens(
    cfg: DictConfig, run: Run, source: ImageSource, tokenizer: VQVAE, found: Findings
) -> None:
    """The codes that stage two trains from, and the table of what they take."""
    data = ImageDataModule(source, cfg.seed)
    cache = build.encoding(cfg, data, tokenizer, run).cache(is_pretrained=False)
    found.attempt(cache.check)
    found.attempt(check_writable, cache.folder, "tokens.dir")
    free = free_bytes(cache.folder)
    rows = {
        "images": cache.sizes,
        "codes of an image": f"{cache.length:,} of {cache.dtype['codes'].base.itemsize} bytes",
        "on the disk": amount(cache.num_bytes),
        "free disk": f"{amount(free)} at {cache.folder}",
    }
    found.attempt(cache.check_room, cache.num_images, free)
    print(table("stage tokens", rows), end="\n\n", flush=True)


def check_memory(
    module: StageModule, needs: MemoryEstimate, memory: int | None, found: Findings
) -> None:
    key = f"model.{module.stage}.micro_batch_size"
    now = module.micro_batch_size or "the whole share of a device"
    for work, takes, remedy in (
        ("a training step", needs.training, f"lower {key}, now {now}"),
        ("validation", needs.validation, "lower evaluation.batch_size"),
    ):
        message = (
            f"memory: {work} of stage {module.stage} takes about {amount(takes)} of a device's "
            f"{amount(memory or 0)}; {remedy}, or take more or larger devices"
        )
        if memory and takes > memory:
            found.error(message)
        elif memory and takes > FULL * memory:
            found.warn(message)
