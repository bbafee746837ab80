"""The page of one run."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from var_exp.io.files import atomic_write
from var_exp.report.charts import ACCENT, draw
from var_exp.report.images import Picture, animate, embed
from var_exp.report.panels import fid_by_scale, main_charts, more_charts, scale_chart
from var_exp.report.run import Run, read_run
from var_exp.report.tables import facts, metric_rows, protocol_groups, scale_table, tiles
from var_exp.report.verdict import verdict_of
from var_exp.visualization.metrics import STAGE_NAMES, describe
from var_exp.visualization.panels import PICTURES

FILE_NAME = "report.html"
NEIGHBORS = "Samples, each with the training images nearest to it in feature space"


class Figure(NamedTuple):
    """A picture with its caption; wide: not shrunk to the width of a phone."""

    picture: Picture
    caption: str
    wide: bool = False


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run folder, as far as the run has come, and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    run_dir = Path(run_dir)
    return write_page(run_dir / FILE_NAME, "run.html", page_of(read_run(run_dir)))


def write_page(path: Path, template: str, context: dict[str, Any]) -> Path:
    """Fill a template of this folder and write the page; text from runs is escaped.

    Characters that UTF-8 cannot hold, as in a file name of another encoding, become `?`.
    """
    environment = Environment(
        loader=PackageLoader("var_exp.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(context)
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")
    return Path(path)


def page_of(run: Run) -> dict[str, Any]:
    """Collect the content of the template."""
    numbers = count()

    def drawn(charts):
        return [draw(chart, f"chart{next(numbers)}") for chart in charts]

    verdict = verdict_of(run)
    return {
        "title": title_of(run),
        "verdict": verdict,
        "bands": [(b.position, describe(b.key).label) for b in verdict.bands],
        "tiles": list(tiles(run)),
        "facts": facts(run),
        "overrides": run.overrides,
        "samples": list(sample_pictures(run)),
        "scale_table": scale_table(run),
        "scale_charts": drawn(
            scale_chart([(label, ACCENT, values)], f"{label}, after each scale")
            for label, values in ((describe(k).label, v) for k, v in fid_by_scale(run).items())
        ),
        "stages": [
            {
                "name": STAGE_NAMES.get(stage, stage),
                "charts": drawn(main_charts(run, stage)),
                "more": drawn(more_charts(run, stage)),
                "pictures": list(_training_pictures(run, stage)),
                "rows": list(metric_rows(run, stage)),
                "protocol": protocol_groups(run.metrics.protocols.get(stage)),
            }
            for stage in reversed(run.stages)  # samples are what a run is for
        ],
        "others": [
            *_final_or_newest(run, "reconstructions", stage="tokenizer"),
            *_final_or_newest(run, "neighbours", NEIGHBORS),
        ],
        "config": run.config_text,
    }


def title_of(run: Run) -> str:
    """Name a run by its folder and the folder around it."""
    folder = run.path.resolve()
    return f"{folder.parent.name}/{folder.name}"


def sample_pictures(run: Run) -> Iterator[Figure]:
    """Yield the samples by class, and the scales from which they emerge."""
    yield from _final_or_newest(run, "samples", file="grid")
    scales = [f"{h}x{w}" for _, h, w in run.scales]
    if moving := animate(run.path / "samples" / "steps.npz", scales):
        yield Figure(moving, "One sample of each class, scale after scale")
    yield from _final_or_newest(run, "coarse_to_fine")


def _final_or_newest(
    run: Run, name: str, caption: str = "", file: str = "", stage: str = "var"
) -> Iterator[Figure]:
    """Yield the picture of the end of the run; until then the newest one drawn in training."""
    caption = caption or PICTURES[name]
    picture = embed(run.path / "samples" / f"{file or name}.png", caption)
    if picture:
        yield Figure(picture, caption, wide=picture.width > 1.4 * picture.height)
    else:
        yield from _newest(run, stage, name, caption)


def _newest(run: Run, stage: str, name: str, caption: str) -> Iterator[Figure]:
    if newest := run.newest_picture(stage, name):
        path, batch = newest
        caption = f"{caption}; after batch {batch:,}"
        if picture := embed(path, caption):
            yield Figure(picture, caption, wide=picture.width > 1.4 * picture.height)


def _training_pictures(run: Run, stage: str) -> Iterator[Figure]:
    """Yield the newest of each picture that stands nowhere else on the page."""
    elsewhere = {"samples", "coarse_to_fine", "reconstructions", "neighbours", "curves"}
    stems = (path.stem for path in (run.path / stage / "pictures").glob("*_*.png"))
    for name in sorted({stem.rpartition("_")[0] for stem in stems} - elsewhere):
        yield from _newest(
            run, stage, name, PICTURES.get(name, name.replace("_", " ").capitalize())
        )
