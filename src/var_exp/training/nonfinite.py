"""Batches whose gradient is not finite: skipped, named, and kept in mind.

One bad image or one unlucky step must not end a run of days by turning its weights into NaN. The
optimizer leaves such a batch out, and a line of `skipped.jsonl` in the stage's folder says which
images were in it, so that the batch can be built again and looked into.
"""

import json
from pathlib import Path

from pydantic import PositiveInt
from torch import Tensor

from var_exp.configurable import checked


class SkippedBatches:
    """Count skipped batches in a row.

    Args:
        stage: named in messages.
        limit: so many in a row end the run, since the weights themselves must be broken.
    """

    @checked
    def __init__(self, stage: str, limit: PositiveInt):
        self.stage, self.limit = stage, limit
        self.in_a_row = 0

    def count(
        self, stepped: bool, batch: int, loss: Tensor, indices: Tensor, folder: Path
    ) -> str | None:
        """Take note of a batch; what to tell a person, if it was skipped.

        Args:
            batch, indices: its number, and which images of the set this process had of it.

        Raises:
            ValueError: it was one too many.
        """
        if stepped:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        path = folder / "skipped.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        line = {"batch": batch, "loss": str(loss.item()), "indices": indices.tolist()}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.stage}: {self.in_a_row} batches in a row had no finite gradient, the last "
                f"was batch {batch} with the loss {loss.item():g}; their images are listed in "
                f"{path}: look at them, lower the learning rate "
                f"(model.{self.stage}.optimizer.lr), or go on from the last checkpoint in "
                f"float32 (trainer.precision=32-true)"
            )
        return (
            f"{self.stage}: batch {batch} was skipped, its loss is {loss.item():g} and its "
            f"gradient not finite ({self.in_a_row} in a row, {self.limit} end the run); its "
            f"images are listed in {path}"
        )
