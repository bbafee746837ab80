"""Parameter groups, and schedules as functions of progress.

Schedules know nothing of steps or epochs: `schedule(progress)` with progress in [0, 1] over the
whole stage gives the factor on the peak learning rate. Progress is counted in batches, so that
accumulation, two optimizers or a resume cannot bend it.
"""

import math

from torch import nn

from var_exp.configurable import Fraction, Share, Weight, checked

# Published recipe (VAR, arXiv 2404.02905, code): tables of places and small vectors never decay.
NO_DECAY = ("position", "level_embedding", "ada_offset", "log_scale")


def param_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: what decays, and what does not (vectors, biases, `NO_DECAY`)."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in named:
        exempt = parameter.ndim <= 1 or any(key in name for key in NO_DECAY)
        (no_decay if exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class WeightDecay:
    """Weight decay over the stage: progress in [0, 1] -> from `first` along a half cosine.

    Args:
        first: at the start, >= 0.
        final: at the end; None keeps the first (the published d30 and d36 go from .05 to .08).

    Raises:
        ValueError: a negative decay, or a change from 0, which exempt parameters have.
    """

    @checked
    def __init__(self, first: Weight, final: Weight | None = None):
        final = first if final is None else final
        if first == 0 and final > 0:
            raise ValueError(
                f"optimizer: weight_decay must be above 0 where it changes, got {first} "
                f"and final_weight_decay {final} (model.*.module.weight_decay)"
            )
        self.first, self.final = first, final

    def __call__(self, progress: float) -> float:
        return self.final + (self.first - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupSchedule:
    """Linear warm-up from `start` of the peak, a hold, then a decay to `final` of the peak.

    Args:
        warmup: share of the stage spent warming up.
        start: factor at the first batch.
        hold: share of the rest of the stage at the peak (the published recipe has 0.05).
        final: factor at the end.

    `LinearSchedule` decays along a line (published), `CosineSchedule` along a half cosine.
    """

    @checked
    def __init__(
        self, warmup: Fraction = 0.02, start: Share = 0.005, hold: Share = 0.0, final: Share = 0.0
    ):
        self.warmup, self.start, self.hold, self.final = warmup, start, hold, final

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return self.start + (1 - self.start) * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        if rest <= self.hold:
            return 1.0
        return self.final + (1 - self.final) * self.decay((rest - self.hold) / (1 - self.hold))

    def decay(self, x: float) -> float:
        """From 1 at x = 0 to 0 at x = 1."""
        raise NotImplementedError


class LinearSchedule(WarmupSchedule):
    def decay(self, x: float) -> float:
        return 1 - x


class CosineSchedule(WarmupSchedule):
    def decay(self, x: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * x))
