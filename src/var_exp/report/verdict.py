"""The line that says how a run stands, and whether it came out as expected."""

from typing import NamedTuple

from var_exp.report.run import Run, look_up
from var_exp.visualization.metrics import (
    NETWORKS,
    SCALE,
    STAGE_NAMES,
    WIDTHS,
    describe,
    duration,
    network_of,
    show,
)


class Band(NamedTuple):
    """How a final figure lies to the band where it was expected.

    where: "inside", "above" or "below".
    """

    stage: str
    key: str
    where: str
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.where} the expected {self.low:g} to {self.high:g}"


class Verdict(NamedTuple):
    """state: "finished", "reached", "missed" (finished, with bands), "running" or "empty"."""

    state: str
    line: str
    bands: list[Band]


def judge(run: Run) -> Verdict:
    """Where the run is, its main figures, and what became of what was expected."""
    stages = run.stages
    bands = [band for stage in stages for band in bands_of(run, stage)]
    done = [stage for stage in stages if run.figures(stage)]
    if not stages:
        return Verdict("empty", "Nothing was recorded here yet.", [])
    figures = "; ".join(filter(None, (_reached(run, stage) for stage in _told(done))))
    if len(done) < len(stages):
        at = _position(run, next(stage for stage in stages if stage not in done))
        line = f"Running: {at}." + (f" So far: {figures}." if figures else "")
        return Verdict("running", line, bands)
    state = "finished"
    if bands:
        state = "reached" if all(band.where == "inside" for band in bands) else "missed"
    return Verdict(state, f"Finished: {figures}.", bands)


def bands_of(run: Run, stage: str) -> list[Band]:
    """The figures of a stage that were expected somewhere, those that are there."""
    figures = run.figures(stage)
    found = []
    for key, (low, high) in run.expected(stage).items():
        if key in figures:
            value = figures[key]
            where = "inside" if low <= value <= high else "below" if value < low else "above"
            found.append(Band(stage, key, where, low, high))
    return found


def main_fid(figures: dict[str, float]) -> str | None:
    """The key of the FID that is named first: Inception's, where it was measured."""
    keys = [k for k in figures if k.startswith(("fid_", "rfid_")) and not SCALE.search(k)]
    keys = [k for k in keys if not k.endswith(("_raw", "_averaged"))]
    return min(keys, key=lambda k: network_of(k) != "inception", default=None)


def number_of_images(run: Run, stage: str) -> int | None:
    """How many images the scores of a stage are measured on."""
    number = look_up(run.protocol, f"{stage}.images.number")
    if number is None and stage == "var":
        number = run.get("evaluation.num_samples")
    return number if isinstance(number, int) else None


def too_few(run: Run, stage: str, key: str) -> str | None:
    """Words where a score is of fewer images than features: it lies far above that of many."""
    if not key.startswith(("fid", "rfid")):
        return None
    width = look_up(run.protocol, f"{stage}.network.num_features")
    width = width if isinstance(width, int) else WIDTHS.get(network_of(key) or "")
    number = number_of_images(run, stage)
    if stage == "var" and SCALE.search(key):
        number = run.get("evaluation.num_samples_per_scale", number)
    if width is None or not isinstance(number, int) or number > width:
        return None
    return f"few images: {number} for {width} features, which makes it larger"


def _told(done: list[str]) -> list[str]:
    """The transformer's figures say more than the tokenizer's, where there are both."""
    return ["var"] if "var" in done else done


def _position(run: Run, stage: str) -> str:
    name = STAGE_NAMES.get(stage, stage).lower()
    history = run.history.get(stage, {})
    batch = max((curve[-1][0] for curve in history.values()), default=0)
    if not batch:
        return f"{name}, no batch logged yet"
    total = run.get(f"model.{stage}.num_batches")
    of = f" of {total:,}" if isinstance(total, int) else ""
    if isinstance(total, int) and batch >= total:
        return f"{name}, all {total:,} batches trained, not yet measured"
    when = f"logged {run.last_seen[stage]:%Y-%m-%d %H:%M}"
    left = history.get("speed/hours_left")
    if left:
        when += f", about {duration(3600 * left[-1][1])} left then"
    return f"{name}, batch {batch:,}{of} ({when})"


def _reached(run: Run, stage: str) -> str:
    """The main figures of a stage in a few words."""
    figures = run.figures(stage)
    number = number_of_images(run, stage)
    parts = []
    fid = main_fid(figures)
    if number and fid:
        parts.append(f"{number:,} samples" if stage == "var" else f"{number:,} reconstructions")
    if "psnr" in figures:
        parts.append(f"PSNR {show(figures['psnr'], describe('psnr'))}")
    if fid:
        network = network_of(fid) or ""
        words = NETWORKS.get(network, f"{network} features")
        few = " (few images)" if too_few(run, stage, fid) else ""
        name = "FID" if stage == "var" else "reconstruction FID"
        parts.append(f"{name} {show(figures[fid], describe(fid))} in {words}{few}")
    right = [k for k in figures if k.startswith("class_accuracy") and "_real" not in k]
    if right:
        parts.append(f"{show(figures[right[0]], describe(right[0]))} judged right")
    told = ", ".join(parts)
    bands = {band.key: band for band in bands_of(run, stage)}
    expected = [*(["loss"] if "loss" in figures else []), *(k for k in bands if k != "loss")]
    ends = []
    for key in expected:
        what = "validation loss" if key == "loss" else describe(key).label
        where = f", {bands[key].words}" if key in bands else ""
        ends.append(f"{what} {show(figures[key], describe(key))}{where}")
    return "; ".join(filter(None, [told, *ends])) or STAGE_NAMES.get(stage, stage).lower()
