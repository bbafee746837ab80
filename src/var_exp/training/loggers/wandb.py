"""The W&B logger: one run per stage, online or not, which a restart goes on with.

Its id is made once and kept in `<run folder>/<stage>/wandb_id`. W&B itself records the code state
(git commit and changes), the command and the machine; the configuration comes by
`log_hyperparams`. Parts of a run that were logged offline are uploaded by
`wandb sync RUN_FOLDER/wandb/offline-run-*`, which joins parts of the same id.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from var_exp.io.files import atomic_write

SECONDS_TO_CONNECT = 30
SECONDS_TO_UPLOAD = 600  # at the end of a stage; what is left is on the disk, for `wandb sync`


class ContinuedWandbLogger(WandbLogger):
    """Lightning's, with a run that outlives restarts and networks that fail.

    Args:
        save_dir: the run folder.
        version: the stage; both stages of a run folder share a group.
        project: the W&B project.
        log_model: upload the best checkpoint as an artifact at the end of the stage (true), each
            time that it improved (all), or not (false).
        options: further arguments of `wandb.init`. Without `mode` and WANDB_MODE the run is
            online where the user is logged in and W&B can be reached, else offline.

    Raises:
        ValueError: an unknown `log_model`.
    """

    def __init__(
        self,
        save_dir: str,
        version: str,
        project: str,
        log_model: bool | str = False,
        **options: Any,
    ):
        if log_model not in (False, True, "all"):
            raise ValueError(
                f"logger: log_model must be false, true or all, got {log_model!r} "
                f"(logger.wandb.log_model)"
            )
        group = "/".join(os.path.normpath(save_dir).split(os.sep)[-2:])
        super().__init__(
            name=f"{group}/{version}",
            group=group,
            job_type=version,
            project=project,
            save_dir=save_dir,
            **options,
        )
        # Lightning hands on a setting that W&B warns of since it gave it up.
        del self._wandb_init["anonymous"]
        self.folder = Path(save_dir, version)
        self.upload_best, self.uploaded = log_model, 0.0  # time of the file uploaded last
        self.failure: Exception | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self.failure is not None:
            raise self.failure  # at once: a second attempt would wait for the network again
        if self._experiment is None:
            try:
                self._begin()
            except Exception as error:
                self.failure = error
                raise
        return self._experiment

    def _begin(self) -> None:
        # Without this W&B writes a few lines about itself between ours.
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = {"init_timeout": SECONDS_TO_CONNECT, "finish_timeout": SECONDS_TO_UPLOAD}
        self._wandb_init.setdefault("settings", settings)
        self._wandb_init["id"] = kept_id(self.folder / "wandb_id")
        if "mode" in self._wandb_init or "WANDB_MODE" in os.environ:
            self._open()
        elif mode_of(self._wandb_init) == "online":
            self._wandb_init["mode"] = "online"
            try:
                self._open()
            except Exception as error:
                reason = " ".join(str(error).split())
                print(
                    f"logger: W&B cannot be reached ({reason}); the run is logged offline, "
                    f"`wandb sync` uploads it",
                    file=sys.stderr,
                    flush=True,
                )
                wandb.teardown()  # the failed run holds its id
                self._wandb_init["mode"] = "offline"
                self._open()
        else:
            self._wandb_init["mode"] = "offline"
            self._open()

    def _open(self) -> None:
        WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]  # it is a property

    # -- checkpoints ----------------------------------------------------------------------

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        if self.upload_best == "all":
            self.upload()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success" and self.upload_best and self._experiment is not None:
            self.upload()

    @rank_zero_only
    def upload(self) -> None:
        """Log the stage's best checkpoint as an artifact, unless it was already."""
        path = self.folder / "best.ckpt"
        if not path.exists() or path.stat().st_mtime == self.uploaded:
            return
        artifact = wandb.Artifact(f"{self.folder.name}-{self.experiment.id}", type="model")
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact, aliases=["latest", "best"])
        self.uploaded = path.stat().st_mtime

    # -- from stage to stage --------------------------------------------------------------

    @rank_zero_only
    def finish(self) -> None:
        if self._experiment is not None:
            self._experiment.finish()


def mode_of(options: Mapping[str, Any]) -> str:
    """Where a run with these options of `wandb.init` goes: online, offline or disabled."""
    chosen = options.get("mode") or os.environ.get("WANDB_MODE")
    if chosen:
        return chosen
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def kept_id(path: Path) -> str:
    """The id in a file, made and written there where there is none."""
    if path.exists():
        return path.read_text().strip()
    made = secrets.token_hex(4)
    with atomic_write(path) as unfinished:
        unfinished.write_text(made + "\n")
    return made
