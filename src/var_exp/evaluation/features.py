"""Feature networks: the eyes through which real and generated images are compared.

A Fréchet distance or an Inception Score means nothing without the network it was measured
with, so a network carries a `name` that goes into every key: `fid_classifier`, never `fid`. What
the name does not say, such as the layer and how images are resized, it says in `about`, and
`fingerprint` tells weights apart.

Every network sees images of 8 bits, rounded by one rule, as if they were read from PNG files.

    B batch, (C, H, W) an image, F features
"""

import hashlib
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from var_exp.evaluation.pictures import to_uint8

TOLERANCE = 0.01  # how far outside [0, 1] pixels may lie before they are taken for a mistake


class Features(NamedTuple):
    """features: (B, F) float32; logits: (B, num_classes) float32, None where there are none."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork(nn.Module):
    """A frozen network: images -> `Features`. Subclasses say what they see in `extract`.

    It never leaves evaluation mode, whoever holds it: metrics put their networks into training
    mode along with themselves.

    judge: images (B, C, H, W) in [-1, 1] -> the class that each shows, (B,) int64, on the CPU;
        None for a network that does not know the classes of the images.

    Args:
        name: what metric keys call it.
        num_features: F.
        about: plain data on how it sees, which is written beside every figure.
    """

    judge = None

    def __init__(self, name: str, num_features: int, about: dict[str, Any] | None = None):
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.about = dict(about or {})

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Images (B, C, H, W), C = 1 or 3: uint8, or floats in [0, 1], which are rounded to it.

        Features are on the network's device, in float32 under autocast too.

        Raises:
            ValueError: images of another shape, type or range.
        """
        pixels = _pixels(images).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            features, logits = self.extract(pixels)
        return Features(features.float(), None if logits is None else logits.float())

    def extract(self, pixels: Tensor) -> Features:
        """What is seen of uint8 pixels (B, C, H, W) on the network's device."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.empty(0)).device

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when any weight differs; computed once."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)


def _pixels(images: Tensor) -> Tensor:
    """Images as uint8, checked."""
    known = images.dtype == torch.uint8 or images.is_floating_point()
    if not known or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"evaluation: expected images (B, C, H, W), C = 1 or 3, uint8 or floats in [0, 1], "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images
    low, high = (bound.item() for bound in images.aminmax())
    if not (-TOLERANCE <= low and high <= 1 + TOLERANCE):  # true of nan too
        raise ValueError(f"evaluation: images must lie in [0, 1], got [{low:g}, {high:g}]")
    return to_uint8(images)
