"""Losses of the tokenizer: how far a reconstruction is from its image.

B batch, C channels, images (B, C, H, W) in [-1, 1]
"""

import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.configurable import Weight, checked
from var_exp.tokenizer.vqvae import Reconstruction


class ReconstructionLoss(nn.Module):
    """Weighted sum of pixel, edge, perceptual and codebook terms.

    Args:
        l1, l2: weights of mean absolute and mean squared error.
        edge: weight of the mean absolute error of horizontal and vertical differences, which
            asks for outlines that a squared error hardly sees (gradient difference loss,
            Mathieu et al., arXiv 1511.05440, equation 6 with alpha = 1, signed).
        lpips: weight of the mean perceptual distance; at 0 it is not computed.
        codebook: weight of the quantizer's codebook and commitment loss.
        perceptual: network of two batches of images -> distances (B,), such as `LPIPS`.

    Raises:
        ValueError: a weight for the perceptual distance, but no network to measure it.
    """

    @checked
    def __init__(
        self,
        l1: Weight = 0.2,
        l2: Weight = 1.0,
        edge: Weight = 0.0,
        lpips: Weight = 0.0,
        codebook: Weight = 1.0,
        perceptual: nn.Module | None = None,
    ):
        super().__init__()
        if lpips > 0 and perceptual is None:
            raise ValueError(
                f"tokenizer: a perceptual term of weight {lpips} needs a network, got none "
                f"(model.tokenizer.loss.perceptual, model.tokenizer.loss.lpips)"
            )
        self.l1, self.l2, self.edge, self.lpips, self.codebook = l1, l2, edge, lpips, codebook
        self.perceptual = perceptual

    def forward(self, output: Reconstruction, images: Tensor) -> dict[str, Tensor]:
        """Named scalars: each unweighted term, and `loss`, their weighted sum."""
        terms = {
            "l1": F.l1_loss(output.images, images),
            "l2": F.mse_loss(output.images, images),
            "edge": edge_difference(output.images, images),
            "codebook": output.loss,
        }
        if self.lpips > 0 and self.perceptual is not None:  # by far the dearest term
            terms["lpips"] = self.perceptual(output.images, images).mean()
        terms["loss"] = sum(getattr(self, name) * value for name, value in terms.items())
        return terms


def edge_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbours, down and across."""
    error = a - b
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image of two batches in [-1, 1], in dB: (B,)."""
    error = (a - b).square().flatten(1).mean(dim=1)
    return 10 * (4 / error.clamp(min=1e-10)).log10()
