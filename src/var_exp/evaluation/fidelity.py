"""Fidelity: how close generated images are to real ones, seen through a feature network.

- FID, the Fréchet distance of two Gaussians fitted to features (Heusel et al., arXiv
  1706.08500): low when samples are as good and as varied as the real images.
- Inception Score, exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498): high when every
  sample is surely of one class and the samples cover all classes.
- Class accuracy: the share of samples that show the class they were asked for. Guidance raises
  it and worsens the FID, so they are read together.

States and their sums over processes are torchmetrics'. Images in this room lie in [0, 1]; they
are rounded to 8 bits before a network sees them, as if read from PNG files.

    B batch, N images, (C, H, W) an image, F features
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from var_exp.evaluation.features import FeatureNetwork, Features
from var_exp.evaluation.pictures import to_uint8

Judge = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [-1, 1] -> the class that each shows, (B,)."""


class Fidelity(nn.Module):
    """FID and Inception Score over one pass of one feature network.

    It may be updated in inference mode and out of it: states are never inference tensors.

    Args:
        network: what images are compared in; its name goes into the keys.
        num_splits: parts that the Inception Score is averaged over.
        seed: of the random split; with it the score is a function of the images alone.
    """

    def __init__(self, network: FeatureNetwork, num_splits: int = 10, seed: int = 0):
        super().__init__()
        self.network = network
        self.fid = FrechetDistance(network.num_features)
        self.inception_score = InceptionScore(num_splits, seed)

    @torch.inference_mode(False)
    def reset(self, keep_real: bool = False) -> None:
        """Forget all images, or with `keep_real` the generated ones only."""
        self.fid.reset_real_features = not keep_real
        self.fid.reset()
        self.inception_score.reset()

    @torch.no_grad()
    def update_real(self, images: Tensor) -> None:
        """Add real images (B, C, H, W) in [0, 1]."""
        self.fid.update(self._see(images).features.double(), real=True)

    @torch.no_grad()
    def update_fake(self, images: Tensor, sample_ids: Tensor | None = None) -> None:
        """Add generated images (B, C, H, W) in [0, 1].

        Args:
            sample_ids: (B,) the samples' numbers in the whole set. Split by them, the Inception
                Score does not depend on which process drew which sample. Without them samples
                count in the order they come.
        """
        seen = self._see(images)
        self.fid.update(seen.features.double(), real=False)
        self.inception_score.update(seen.logits, sample_ids)

    @torch.inference_mode(False)
    def compute(self) -> dict[str, float]:
        """Scores over all processes' images, keyed `fid_<network>`, `inception_score_<network>`.

        Raises:
            ValueError: fewer than two real or two generated images.
        """
        return {
            f"fid_{self.network.name}": self.fid.compute().item(),
            f"inception_score_{self.network.name}": self.inception_score.compute().item(),
        }

    def _see(self, images: Tensor) -> Features:
        low, high = (bound.item() for bound in images.aminmax())
        if not (-0.01 <= low and high <= 1.01):
            raise ValueError(f"evaluation: images must lie in [0, 1], got [{low:g}, {high:g}]")
        return self.network(to_uint8(images).to(self.fid.device).float() / 255)


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID, given features (B, F) float64 in the place of images.

    With fewer images than features the covariances are singular: the distance is still exact
    for these images, but far above that of many, and compares only at an equal number.
    """

    def __init__(self, num_features: int):
        given = nn.Identity()
        given.num_features = num_features
        super().__init__(feature=given)
        self.orig_dtype = torch.float64

    def compute(self) -> Tensor:
        num_real = int(self.real_features_num_samples)
        num_fake = int(self.fake_features_num_samples)
        if min(num_real, num_fake) < 2:
            raise ValueError(
                f"evaluation: FID needs at least 2 real and 2 generated images, got {num_real} "
                f"and {num_fake} (evaluation.num_samples)"
            )
        num_features = len(self.real_features_sum)
        if min(num_real, num_fake) <= num_features:
            warnings.warn(
                f"FID of {num_real} real and {num_fake} generated images in {num_features} "
                f"features: fewer images than features make it large; compare it only with "
                f"figures from as many images",
                stacklevel=2,
            )
        return super().compute()


class InceptionScore(Metric):
    """Inception Score of logits, averaged over the parts of a seeded random split.

    Permutation and parts are torch-fidelity's, so the same logits and seed give its figure.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, num_splits: int = 10, seed: int = 0):
        super().__init__()
        self.num_splits, self.seed = num_splits, seed
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("sample_ids", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, sample_ids: Tensor | None = None) -> None:
        """Add logits (B, num_classes) of samples numbered (B,), or numbered as they come."""
        if sample_ids is None:
            num_seen = sum(len(ids) for ids in self.sample_ids)
            sample_ids = torch.arange(num_seen, num_seen + len(logits))
        self.logits.append(logits)
        self.sample_ids.append(sample_ids.to(logits.device))

    def compute(self) -> Tensor:
        order = dim_zero_cat(self.sample_ids).argsort(stable=True)
        p = dim_zero_cat(self.logits)[order].cpu().double().softmax(dim=1)  # (N, num_classes)
        p = p[np.random.RandomState(self.seed).permutation(len(p))]
        num_splits = min(self.num_splits, len(p))
        edges = [i * len(p) // num_splits for i in range(num_splits + 1)]
        parts = [p[start:end] for start, end in zip(edges, edges[1:], strict=False)]
        return torch.stack([_sureness_and_variety(part) for part in parts]).mean()


def _sureness_and_variety(p: Tensor) -> Tensor:
    """exp E KL(p(y|x) || p(y)) of (N, num_classes), as entropies: a probability of 0 is safe."""
    entropy_of_mean = torch.special.entr(p.mean(dim=0)).sum()
    mean_entropy = torch.special.entr(p).sum(dim=1).mean()
    return (entropy_of_mean - mean_entropy).exp()


def class_accuracy(images: Tensor, labels: Tensor, judge: Judge) -> float:
    """Share of images (B, C, H, W) in [0, 1] that a judge takes for their labels (B,).

    The judge reads [-1, 1]: a source's own `judge`, or a feature network's.
    """
    return (judge(2 * images - 1) == labels).double().mean().item()
