"""TensorBoard, with images."""

from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class ImageTensorBoardLogger(TensorBoardLogger):
    """Lightning's, with `log_image`, and without the scalar `hp_metric` that it adds."""

    def __init__(self, save_dir: str, **options: Any):
        super().__init__(save_dir, default_hp_metric=False, **options)

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        """Log uint8 (H, W, 3) arrays; those after the first get a number."""
        for i, image in enumerate(images):
            name = f"{key}_{i}" if i else key
            self.experiment.add_image(name, image, step, dataformats="HWC")

    @rank_zero_only
    def finish(self) -> None:
        self.experiment.close()
