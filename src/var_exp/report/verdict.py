"""The verdict: one line on how far a run is, what it reached, and what was expected."""

from typing import NamedTuple

from var_exp.report.run import Run, look_up
from var_exp.visualization.metrics import (
    NETWORKS,
    NUM_FEATURES,
    STAGE_NAMES,
    describe,
    duration,
    is_class_accuracy,
    is_fid,
    main_fid,
    network_of,
    show,
    split_scale,
)


class Band(NamedTuple):
    """An expected band of a final metric; position of the metric: inside, above or below."""

    stage: str
    key: str
    position: str
    low: float
    high: float


class Verdict(NamedTuple):
    """state: "finished", "reached", "missed" (finished, with bands), "running" or "empty"."""

    state: str
    line: str
    bands: list[Band]


def verdict_of(run: Run) -> Verdict:
    """Judge a run by its stages, its main metrics and its expected bands."""
    stages = run.stages
    if not stages:
        return Verdict("empty", "Nothing was recorded here yet.", [])
    bands = [band for stage in stages for band in bands_of(run, stage)]
    done = [stage for stage in stages if run.stage_metrics(stage)]
    # The metrics of the transformer say more than those of the tokenizer.
    reached = "; ".join(_reached(run, s) for s in (["var"] if "var" in done else done))
    if len(done) < len(stages):
        progress = _progress(run, next(stage for stage in stages if stage not in done))
        so_far = f" So far: {reached}." if reached else ""
        return Verdict("running", f"Running: {progress}.{so_far}", bands)
    state = "finished"
    if bands:
        state = "reached" if all(band.position == "inside" for band in bands) else "missed"
    return Verdict(state, f"Finished: {reached}.", bands)


def bands_of(run: Run, stage: str) -> list[Band]:
    """Return the expected bands of the final metrics that a stage has."""
    metrics = run.stage_metrics(stage)
    bands = []
    for key, (low, high) in run.expected(stage).items():
        if key in metrics:
            value = metrics[key]
            position = "inside" if low <= value <= high else "below" if value < low else "above"
            bands.append(Band(stage, key, position, low, high))
    return bands


def num_images(run: Run, stage: str) -> int | None:
    """Return how many images the scores of a stage are measured on."""
    number = look_up(run.metrics.protocols, f"{stage}.images.number")
    if number is None and stage == "var":
        number = run.get("evaluation.num_samples")
    return number if isinstance(number, int) else None


def few_images(run: Run, stage: str, key: str) -> str:
    """Warn of an FID of no more images than features, which is far too large; "" otherwise."""
    if not is_fid(key):
        return ""
    width = look_up(run.metrics.protocols, f"{stage}.network.num_features")
    width = width if isinstance(width, int) else NUM_FEATURES.get(network_of(key) or "")
    number = num_images(run, stage)
    if stage == "var" and split_scale(key):
        number = run.get("evaluation.num_samples_per_scale", number)
    if width is None or not isinstance(number, int) or number > width:
        return ""
    return f"few images: {number} for {width} features, which makes it larger"


def _progress(run: Run, stage: str) -> str:
    name = STAGE_NAMES.get(stage, stage).lower()
    history = run.history.get(stage, {})
    batch = max((curve[-1][0] for curve in history.values()), default=0)
    if not batch:
        return f"{name}, no batch logged yet"
    total = run.get(f"model.{stage}.num_batches")
    if isinstance(total, int) and batch >= total:
        return f"{name}, all {total:,} batches trained, not yet measured"
    of = f" of {total:,}" if isinstance(total, int) else ""
    when = f"logged {run.last_logged[stage]:%Y-%m-%d %H:%M}"
    if left := history.get("speed/hours_left"):
        when += f", about {duration(3600 * left[-1][1])} left then"
    return f"{name}, batch {batch:,}{of} ({when})"


def _reached(run: Run, stage: str) -> str:
    """Say the main metrics of a stage in a few words, then those with an expected band."""
    metrics = run.stage_metrics(stage)
    scores = []
    number, fid = num_images(run, stage), main_fid(metrics)
    if number and fid:
        scores.append(f"{number:,} samples" if stage == "var" else f"{number:,} reconstructions")
    if "psnr" in metrics:
        scores.append(f"PSNR {show(metrics['psnr'], describe('psnr'))}")
    if fid:
        network = network_of(fid) or ""
        features = NETWORKS.get(network, f"{network} features")
        few = " (few images)" if few_images(run, stage, fid) else ""
        name = "FID" if stage == "var" else "reconstruction FID"
        scores.append(f"{name} {show(metrics[fid], describe(fid))} in {features}{few}")
    if accuracy := next(filter(is_class_accuracy, metrics), None):
        scores.append(f"classifier accuracy {show(metrics[accuracy], describe(accuracy))}")
    bands = {band.key: band for band in bands_of(run, stage)}
    ends = []
    for key in dict.fromkeys([*(["loss"] if "loss" in metrics else []), *bands]):
        label = "validation loss" if key == "loss" else describe(key).label
        ends.append(f"{label} {show(metrics[key], describe(key))}")
        if key in bands:
            band = bands[key]
            ends[-1] += f", {band.position} the expected {band.low:g} to {band.high:g}"
    parts = [", ".join(scores), *ends]
    return "; ".join(filter(None, parts)) or STAGE_NAMES.get(stage, stage).lower()
