"""What loss a transformer of a given size should reach: the paper's scaling law.

VAR (arXiv 2404.02905, section 5.2, figure 5): with the published tokenizer on ImageNet, the part of
the cross-entropy that can be reduced falls as a power of the number of parameters,
L - L_inf = (a N)^-b with N in billions.
"""

from typing import NamedTuple


class Law(NamedTuple):
    """irreducible: L_inf in nats; factor: a; exponent: b."""

    irreducible: float
    factor: float
    exponent: float

    def loss(self, num_parameters: int) -> float:
        """Cross-entropy in nats of a converged transformer of that size."""
        return self.irreducible + (self.factor * num_parameters / 1e9) ** -self.exponent


MEAN = Law(5.0, 2.5, 0.20)  # of all tokens
LAST_SCALE = Law(4.5, 2.0, 0.23)


def against_law(loss: float, loss_last_scale: float, num_parameters: int) -> dict[str, float]:
    """Named figures: the reducible losses, and how far the losses lie above the law, in nats."""
    return {
        "reducible_loss": loss - MEAN.irreducible,
        "reducible_loss_last_scale": loss_last_scale - LAST_SCALE.irreducible,
        "loss_above_law": loss - MEAN.loss(num_parameters),
        "loss_above_law_last_scale": loss_last_scale - LAST_SCALE.loss(num_parameters),
    }
