"""The dashboards of this project as a view of a W&B workspace.

    python -m var_exp.training.loggers.wandb_workspace ENTITY/PROJECT --dry-run   what it would save
    python -m var_exp.training.loggers.wandb_workspace ENTITY/PROJECT             save it

A view belongs to a project of W&B and is chosen in its workspace; each call saves another one, and
those that are there stay as they are. Panels show the runs of both stages, each with what its
runs log; what is logged for each scale is found by a pattern, so that any schedule will do.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import wandb

# The number of the batch, under which Lightning's logger logs everything: W&B's own step counts
# calls, and begins anew where an offline run goes on.
STEP = "trainer/global_step"
NAME = "var-exp"


class Chart(NamedTuple):
    """metrics: drawn in one panel; pattern: a regular expression of them, in their place."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None


class Pictures(NamedTuple):
    """key: of the pictures, of which the panel shows the newest and lets one go back."""

    title: str
    key: str


SECTIONS: dict[str, tuple[Chart | Pictures, ...]] = {
    "Pictures": (
        Pictures("Samples, a row for each class", "val/samples"),
        Pictures("Coarse to fine", "val/coarse_to_fine"),
        Pictures("Reconstructions", "val/reconstructions"),
        Pictures("Codes in use at each scale", "val/codebook"),
    ),
    "Transformer": (
        Chart("Cross-entropy (nats)", ("val/loss", "val/loss_last_scale")),
        Chart("Cross-entropy of each scale (nats)", pattern="^val/loss_scale_.*"),
        Chart("Share of tokens right", ("val/acc", "val/acc_last_scale")),
        Chart("Share of tokens right at each scale", pattern="^val/acc_scale_.*"),
        Chart("FID of samples", pattern="^val/fid_.*"),
        Chart("Share of images judged right", pattern="^val/class_accuracy_.*"),
    ),
    "Tokenizer": (
        Chart("PSNR (dB)", ("val/psnr",)),
        Chart("SSIM", ("val/ssim",)),
        Chart("FID of reconstructions", pattern="^val/rfid_.*"),
        Chart("Share of codes in use at each scale", pattern="^val/usage_scale_.*"),
        Chart("Perplexity of codes at each scale", pattern="^val/perplexity_scale_.*"),
        Chart("Terms of the loss", ("train/l1", "train/l2", "train/codebook")),
    ),
    "Training": (
        Chart("Loss", ("train/loss",)),
        Chart("Gradient norm", pattern="^train/.*grad_norm$"),
        Chart("Learning rate", ("train/lr",)),
        Chart("Weight decay", ("train/weight_decay",)),
    ),
    "Speed": (
        Chart("Images per second", ("speed/images_per_second",)),
        Chart("Share of time spent waiting for data", ("speed/data_wait",)),
        Chart("Share of the machine's peak", ("speed/share_of_peak",)),
        Chart("TFLOP/s of a device", ("speed/tflops",)),
        Chart("Memory (GB)", pattern="^speed/.*memory_gb$"),
        Chart("Hours left", ("speed/hours_left",)),
    ),
}


def describe() -> str:
    """The view in words: its sections, panels, and what they show."""
    lines = []
    for section, panels in SECTIONS.items():
        lines.append(section)
        for panel in panels:
            shown = [panel.key] if isinstance(panel, Pictures) else panel.metrics or [panel.pattern]
            lines.append(f"  {panel.title}: {', '.join(shown)}")
    return "\n".join(lines)


def make_view(entity: str, project: str) -> Any:
    """The view as a `wandb_workspaces.workspaces.Workspace`, not saved yet.

    Raises:
        ValueError: the package is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError(
            "view: the package wandb-workspaces is not installed; "
            "type: pip install 'var-exp[view]', or look at the view with --dry-run"
        )
    import wandb_workspaces.reports.v2 as panels  # optional, and needed here alone
    import wandb_workspaces.workspaces as ws

    def panel(of: Chart | Pictures) -> Any:
        if isinstance(of, Pictures):
            return panels.MediaBrowser(title=of.title, media_keys=[of.key], num_columns=1)
        return panels.LinePlot(
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
    """Save the view; where to look at it.

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
    """Do what the arguments ask for; what to tell.

    Raises:
        ValueError: see `save`; or the project is not given as ENTITY/PROJECT.
    """
    parser = argparse.ArgumentParser(
        "python -m var_exp.training.loggers.wandb_workspace", description=__doc__.splitlines()[0]
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where runs are logged")
    parser.add_argument("--dry-run", action="store_true", help="say what would be saved")
    given = parser.parse_args(arguments)
    entity, _, project = given.project.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(
            f"view: expected ENTITY/PROJECT, as in the address of a run, got {given.project!r}"
        )
    return describe() if given.dry_run else save(entity, project)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
