"""Looking at the model while it trains: pictures and scores at each validation."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.pictures import save_png
from var_exp.training.loggers import log_picture
from var_exp.training.tokenizer_module import TokenizerModule
from var_exp.training.var_module import VARModule


class EvaluationCallback(Callback):
    """Base: calls `evaluate` after each validation within training, on the first rank."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        raise NotImplementedError

    def show(self, trainer: L.Trainer, name: str, picture) -> None:
        """To every logger, and as a file named by its batch in the stage's folder."""
        log_picture(trainer, f"val/{name}", picture)
        folder = Path(trainer.default_root_dir) / "pictures"
        save_png(picture, folder / f"{name}_{trainer.global_step:06d}.png")


class ReconstructionPictures(EvaluationCallback):
    """Fixed validation images beside their reconstruction after each scale."""

    def __init__(self, evaluator: Evaluator, num_images: int = 12):
        self.evaluator, self.num_images = evaluator, num_images

    def evaluate(self, trainer: L.Trainer, module: TokenizerModule) -> None:
        picture = self.evaluator.reconstruction_picture(module.evaluated, self.num_images)
        self.show(trainer, "reconstructions", picture)


class SamplePictures(EvaluationCallback):
    """A grid of samples by class, and the strip of what each scale adds."""

    def __init__(self, evaluator: Evaluator, num_per_class: int = 4):
        self.evaluator, self.num_per_class = evaluator, num_per_class

    def evaluate(self, trainer: L.Trainer, module: VARModule) -> None:
        drawn = self.evaluator.draw_per_class(
            module.evaluated, module.tokenizer, self.num_per_class
        )
        self.show(trainer, "samples", drawn.grid)
        self.show(trainer, "coarse_to_fine", drawn.strip)


class SampleScores(EvaluationCallback):
    """FID, Inception Score and class accuracy of fresh samples."""

    def __init__(self, evaluator: Evaluator, num_samples: int = 200):
        self.evaluator, self.num_samples = evaluator, num_samples

    def evaluate(self, trainer: L.Trainer, module: VARModule) -> None:
        scores = self.evaluator.score_samples(module.evaluated, module.tokenizer, self.num_samples)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"val/{name}": value for name, value in scores.items()}, trainer.global_step
            )
