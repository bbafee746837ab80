"""What happens around the batches of a stage: checkpoints, evaluation, plots, throughput."""

from var_exp.training.callbacks.evaluation import (
    ReconstructionPictures,
    ReconstructionScores,
    SamplePictures,
    SampleScores,
)
from var_exp.training.callbacks.plots import CodebookMap, Curves, Report

__all__ = [
    "CodebookMap",
    "Curves",
    "ReconstructionPictures",
    "ReconstructionScores",
    "Report",
    "SamplePictures",
    "SampleScores",
]
