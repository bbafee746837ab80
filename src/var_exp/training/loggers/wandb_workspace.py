"""The dashboards of this project as a view of a W&B workspace.

    python -m var_exp.training.loggers.wandb_workspace ENTITY/PROJECT --dry-run   what it would save
    python -m var_exp.training.loggers.wandb_workspace ENTITY/PROJECT             save it

A view belongs to a W&B project and is chosen in its workspace; each call saves another one and
leaves the others as they are. Its charts are those of `visualization.panels`, for the runs of both
stages; a regular expression finds the metrics of the scales of any schedule.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import wandb

from var_exp.visualization.panels import PANELS, PICTURES, Panel

# The number of the batch, under which Lightning's logger logs everything: W&B's own step counts
# calls, and starts again where an offline run is resumed.
STEP = "trainer/global_step"
NAME = "var-exp"


class Chart(NamedTuple):
    """metrics: drawn in one panel; pattern: a regular expression of them, in their place."""

    title: str
    metrics: Sequence[str] = ()
    pattern: str | None = None


class Pictures(NamedTuple):
    """key: of the pictures; the panel shows the newest and lets one go back."""

    title: str
    key: str


def charts_of(panel: Panel) -> list[Chart]:
    """Split a panel into metrics of all scales together, which runs can share, and per-scale ones.

    W&B shows logged values, so that percent are shares.
    """
    title = panel.heading.replace("%", "share")
    charts = []
    for label, per_scale in ((title, False), (f"{title}, at each scale", True)):
        names = [name for name in panel.patterns if ("_scale_" in name) == per_scale]
        if any("*" in name for name in names):
            charts.append(Chart(label, pattern=f"^({'|'.join(names)})$".replace("*", ".*")))
        elif names:
            charts.append(Chart(label, names))
    return charts


SECTIONS: dict[str, list[Chart | Pictures]] = {
    "Pictures": [Pictures(title, f"val/{name}") for name, title in PICTURES.items()],
    **{
        section: [chart for panel in panels for chart in charts_of(panel)]
        for section, panels in groupby(PANELS, lambda panel: panel.section)
    },
}


def describe() -> str:
    """Return the view in words: its sections, panels, and what they show."""
    lines = []
    for section, panels in SECTIONS.items():
        lines.append(section)
        for panel in panels:
            if isinstance(panel, Pictures):
                lines.append(f"  {panel.title}: {panel.key}")
            else:
                lines.append(f"  {panel.title}: {panel.pattern or ', '.join(panel.metrics)}")
    return "\n".join(lines)


def make_view(entity: str, project: str) -> Any:
    """Return the view as a `wandb_workspaces.workspaces.Workspace`, not saved yet.

    Raises:
        ValueError: the package is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError(
            "view: the package wandb-workspaces is not installed; "
            "type: pip install 'var-exp[view]', or look at the view with --dry-run"
        )
    import wandb_workspaces.reports.v2 as reports  # optional, and needed here alone
    import wandb_workspaces.workspaces as ws

    def panel(of: Chart | Pictures) -> Any:
        if isinstance(of, Pictures):
            return reports.MediaBrowser(title=of.title, media_keys=[of.key], num_columns=1)
        return reports.LinePlot(
            title=of.title, x=STEP, y=list(of.metrics), metric_regex=of.pattern, title_x="batch"
        )

    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        sections=[
            ws.Section(name=name, panels=[panel(of) for of in content], is_open=True)
            for name, content in SECTIONS.items()
        ],
    )


def save(entity: str, project: str) -> str:
    """Save the view, and return its address.

    Raises:
        ValueError: the package is missing, nobody is logged in, or W&B refuses or is not reached.
    """
    view = make_view(entity, project)
    if not wandb.login(prompt=False, verify=False):
        raise ValueError("view: you are not logged in to W&B; type: wandb login")
    try:
        return view.save().url
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"view: W&B did not save it in {entity}/{project} ({reason}); the project must be "
            f"there, and yours to write to, and W&B within reach"
        ) from None


def main(arguments: Sequence[str]) -> str:
    """Do what the arguments ask for, and return what to print.

    Raises:
        ValueError: see `save`; or the project is not given as ENTITY/PROJECT.
    """
    parser = argparse.ArgumentParser(
        "python -m var_exp.training.loggers.wandb_workspace", description=__doc__.splitlines()[0]
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where runs are logged")
    parser.add_argument("--dry-run", action="store_true", help="print what would be saved")
    args = parser.parse_args(arguments)
    entity, _, project = args.project.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(
            f"view: expected ENTITY/PROJECT, as in the address of a run, got {args.project!r}"
        )
    return describe() if args.dry_run else save(entity, project)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
