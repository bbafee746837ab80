"""The page of one run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from var_exp.io.files import replacing
from var_exp.report.charts import ACCENT, Drawn, draw
from var_exp.report.images import Picture, animate, embed
from var_exp.report.panels import fid_by_scale, more_charts, scale_chart, stage_charts
from var_exp.report.run import Run, read_run
from var_exp.report.tables import facts, figure_rows, protocol_groups, scale_table, tiles
from var_exp.report.verdict import judge
from var_exp.visualization.metrics import STAGE_NAMES, describe

FILE_NAME = "report.html"
OWN_PLACE = {"samples", "coarse_to_fine", "reconstructions", "neighbours", "curves"}


class Shown(NamedTuple):
    """A picture with a line below it; wide: not to be shrunk to the width of a phone."""

    picture: Picture
    caption: str
    wide: bool = False


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run folder, as far as the run has come; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / FILE_NAME
    with replacing(path) as unfinished:
        unfinished.write_text(render("run.html", **page_of(read_run(run_dir))), encoding="utf-8")
    return path


def render(template: str, **context: Any) -> str:
    """A page from a template of this folder; whatever runs and people have named is escaped."""
    environment = Environment(
        loader=PackageLoader("var_exp.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def page_of(run: Run) -> dict[str, Any]:
    """What the template shows."""
    verdict = judge(run)
    names = (f"chart{i}" for i in range(10_000))
    return {
        "title": title_of(run),
        "verdict": verdict,
        "bands": [f"{describe(b.key).label}: {b.where} the expected band" for b in verdict.bands],
        "tiles": list(tiles(run)),
        "facts": facts(run),
        "overrides": run.overrides,
        "samples": list(sample_pictures(run)),
        "scale_table": scale_table(run),
        "scale_charts": list(_scale_charts(run, names)),
        "stages": [
            {
                "name": STAGE_NAMES.get(stage, stage),
                "charts": [draw(chart, next(names)) for chart in stage_charts(run, stage)],
                "more": [draw(chart, next(names)) for chart in more_charts(run, stage)],
                "pictures": list(_further_pictures(run, stage)),
                "rows": list(figure_rows(run, stage)),
                "protocol": protocol_groups(run.protocol.get(stage)),
            }
            for stage in reversed(run.stages)  # samples are what a run is for
        ],
        "others": list(other_pictures(run)),
        "config": run.config_text,
    }


def title_of(run: Run) -> str:
    folder = run.path.resolve()
    return f"{folder.parent.name}/{folder.name}"


def sample_pictures(run: Run) -> Iterator[Shown]:
    """Samples by class, and how they come about."""
    moving = animate(
        run.path / "samples" / "steps.npz",
        [f"{h}x{w}" for _, h, w in run.scales],
    )
    yield from _final(run, "grid", "samples", "Samples, a row for each class")
    if moving:
        yield Shown(moving, "One sample of each class, scale after scale")
    yield from _final(
        run, "coarse_to_fine", "coarse_to_fine", "The image after each scale, coarse to fine"
    )


def other_pictures(run: Run) -> Iterator[Shown]:
    """Reconstructions, and the training images that samples are nearest to."""
    caption = "Validation images, and what is rebuilt of them after each scale"
    yield from _final(run, "reconstructions", "reconstructions", caption, "tokenizer")
    caption = "Samples, each with the training images nearest to it in feature space"
    yield from _final(run, "neighbours", "neighbours", caption)


def _final(run: Run, file: str, name: str, caption: str, stage: str = "var") -> Iterator[Shown]:
    """The picture at the end of the run; until then the newest one drawn in training."""
    picture = embed(run.path / "samples" / f"{file}.png", caption)
    newest = None if picture else run.newest_picture(stage, name)
    if newest:
        caption = f"{caption}; after batch {newest[1]:,}"
        picture = embed(newest[0], caption)
    if picture:
        yield Shown(picture, caption, wide=picture.width > 1.4 * picture.height)


def _further_pictures(run: Run, stage: str) -> Iterator[Shown]:
    """The newest of each picture that was drawn in training and has no other place."""
    stems = (path.stem for path in (run.path / stage / "pictures").glob("*_*.png"))
    for name in sorted({stem.rpartition("_")[0] for stem in stems} - OWN_PLACE):
        newest = run.newest_picture(stage, name)
        caption = name.replace("_", " ").capitalize()
        picture = embed(newest[0], caption) if newest else None
        if picture:
            yield Shown(picture, f"{caption}; after batch {newest[1]:,}", wide=True)


def _scale_charts(run: Run, names: Iterator[str]) -> Iterator[Drawn]:
    for key, values in fid_by_scale(run).items():
        title = f"{describe(key).label}, after each scale"
        yield draw(scale_chart([(describe(key).label, ACCENT, values)], title), next(names))
