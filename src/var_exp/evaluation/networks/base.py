"""Feature networks: the eyes through which real and generated images are compared.

A Fréchet distance or an Inception Score means nothing without the network it was measured
with, so a network carries a `name` that goes into every key: `fid_classifier`, never `fid`. What
the name does not say, such as the layer and how images are resized, it says in `about`, and
`fingerprint` tells weights apart.

Every network sees images of 8 bits, rounded by one rule, as if they were read from PNG files.

    B batch, (C, H, W) an image, F features
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from var_exp.io.fingerprint import fingerprint, with_form
from var_exp.visualization.images import to_uint8

TOLERANCE = 0.01  # how far outside [0, 1] pixels may lie before they are taken for a mistake


class Features(NamedTuple):
    """features: (B, F) float32; logits: (B, num_classes) float32, None where there are none."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork(nn.Module):
    """A frozen network: images -> `Features`. Subclasses say what they see in `extract`.

    It never leaves evaluation mode, whoever holds it: metrics put their networks into training
    mode along with themselves.

    classify: images (B, C, H, W) in [-1, 1] -> the class that each shows, (B,) int64, on the CPU;
        None for a network that does not know the classes of the images.

    Args:
        name: what metric keys call it.
        num_features: F.
        about: plain data on how it sees, which is written beside every figure.
    """

    classify: Callable[[Tensor], Tensor] | None = None

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
        return fingerprint("", with_form(self.state_dict().items()))

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


class FeatureBank(Metric):
    """Features of numbered images from all processes, in the order of their numbers.

    States are flat, so that a process which has seen no image, and cannot know how many features
    one has, still takes part.
    """

    features: list[Tensor]
    logits: list[Tensor]
    ids: list[Tensor]
    full_state_update = False
    is_differentiable = False

    def __init__(self):
        super().__init__(compute_with_cache=False)
        for name in ("features", "logits", "ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def update_called(self) -> bool:
        """An empty bank is valid; torchmetrics should not warn about it."""
        return True

    # Tensors made in inference mode could not be synchronised out of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, features: Features, ids: Tensor) -> None:
        """Add features of B images with their numbers (B,) int64, each given once.

        In inference mode and out of it.
        """
        self.features.append(features.features.to(self.device, copy=True).float().flatten())
        if features.logits is not None:
            self.logits.append(features.logits.to(self.device, copy=True).float().flatten())
        self.ids.append(ids.to(self.device, torch.int64, copy=True))

    @torch.inference_mode(False)
    def sync(self, *args: Any, **kwargs: Any) -> None:
        if not self.ids:  # torchmetrics would send an empty list as floats
            self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    @torch.inference_mode(False)
    def compute(self) -> Features:
        """Features (N, F) of all processes' images, by number, on the CPU; (0, 0) of none."""
        ids = _joined(self.ids)
        if len(ids) == 0:
            return Features(torch.empty(0, 0), None)
        order = ids.argsort()
        assert (ids[order].diff() > 0).all(), "an image was given twice"
        features, logits = (
            _joined(state).reshape(len(ids), -1)[order]  # (N, F), (N, num_classes)
            for state in (self.features, self.logits)
        )
        return Features(features, logits if logits.numel() else None)


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    """A state, whether other processes' are in it or not, as one tensor on the CPU."""
    return dim_zero_cat(state).cpu() if len(state) else torch.empty(0)
