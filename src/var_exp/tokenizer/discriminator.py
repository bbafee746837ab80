"""Discriminators: networks that tell images from reconstructions, place by place.

    PatchGAN           a small convolutional network (pix2pix, Isola et al., arXiv 1611.07004,
                       section 3.2.2)
    DinoDiscriminator  small heads on what a frozen DINO sees (Projected GAN, Sauer et al., arXiv
                       2111.01007; with a vision transformer: StyleGAN-T, arXiv 2301.09515,
                       section 3.2)

Both take images (B, C, H, W) in [-1, 1] to logits (B, N) in float32, one for each place: high
where an image looks real. No layer takes statistics over the batch, so a logit depends on its
own image alone; whether a batch is split into micro-batches, over processes, or into real images
and reconstructions does not change it.

    B batch, N places, F features
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from var_exp.configurable import checked
from var_exp.io.pretrained import Frozen, as_rgb
from var_exp.tokenizer.autoencoder import group_norm
from var_exp.tokenizer.dino import KEY, DinoFeatures, load_transformer

NumLayers = Annotated[int, Ge(1), Le(8)]  # 8 see at least 768 pixels
SLOPE = 0.2  # of leaky ReLUs
NUM_SQUARINGS = 5  # as good as 32 power iterations


class PatchGAN(nn.Module):
    """Strided convolutions, each logit judging one patch of the image.

    GroupNorm stands where pix2pix has BatchNorm, see the top of this file.

    Args:
        width: channels after the first convolution; they double with each, up to 8 times.
        num_layers: convolutions that halve the sides; with 3 a patch is 70 pixels wide.

    Raises:
        ValueError: num_layers below 1.
    """

    @checked
    def __init__(self, width: PositiveInt = 64, num_layers: NumLayers = 3):
        super().__init__()
        # Two convolutions of size 4 at the lowest resolution take a pixel each.
        self.smallest_side = 3 * 2**num_layers
        layers = [_conv4x4(3, width, stride=2), nn.LeakyReLU(SLOPE)]
        before = width
        for i in range(1, num_layers + 1):
            after = width * min(2**i, 8)
            layers.append(_conv4x4(before, after, stride=2 if i < num_layers else 1))
            layers += [group_norm(after), nn.LeakyReLU(SLOPE)]
            before = after
        self.layers = nn.Sequential(*layers, _conv4x4(before, 1, stride=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], C = 1 or 3 -> logits (B, N), float32.

        Raises:
            ValueError: images of less than 3 * 2 ** num_layers pixels a side.
        """
        if min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"discriminator: this PatchGAN takes images of at least {self.smallest_side} "
                f"pixels a side, got (H, W) = {tuple(images.shape[-2:])} ({KEY}.num_layers)"
            )
        return self.layers(as_rgb(images)).flatten(1).float()


def _conv4x4(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


class DinoDiscriminator(nn.Module):
    """Trainable heads on the features of a frozen DINO transformer.

    Only the heads are parameters and in the state dict, see `Frozen`.

    Args:
        weights: the published file of DINO's ViT-S/16, or another of its transformers. None
            looks in torch.hub's cache, and tries to fetch the file there if it is missing.
        image_size: side in pixels that images are resized to, a multiple of the patch size; the
            cost grows with its square.
        depths: of the blocks that get a head each, from 0.
        kernel_size: patches that the wider convolution of a head sees.

    Raises:
        ValueError: timm is not installed; the file is missing and cannot be fetched, is damaged,
            or holds another network; image_size or depths do not fit it.
    """

    @checked
    def __init__(
        self,
        weights: str | None = None,
        image_size: PositiveInt = 224,
        depths: Sequence[NonNegativeInt] = (2, 5, 8, 11),
        kernel_size: PositiveInt = 9,
    ):
        super().__init__()
        features = DinoFeatures(load_transformer(weights), image_size, depths)
        self.heads = nn.ModuleList(TokenHead(features.width, kernel_size) for _ in depths)
        self.features = Frozen(features)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], C = 1 or 3 -> logits (B, N), float32."""
        seen = self.features(images)  # (B, F, patches) for each depth
        logits = [head(x) for head, x in zip(self.heads, seen, strict=True)]
        return torch.cat(logits, dim=1).float()


class TokenHead(nn.Module):
    """Features (B, F, N) -> logits (B, N): convolutions along the row of patches."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.first = _head_block(width, kernel_size=1)
        self.second = _head_block(width, kernel_size)
        self.judge = _spectral_conv(width, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x + self.second(x)) * 2**-0.5  # the scale stays that of one
        return self.judge(x).squeeze(1)


def _head_block(width: int, kernel_size: int) -> nn.Sequential:
    conv = _spectral_conv(width, width, kernel_size)
    return nn.Sequential(conv, group_norm(width), nn.LeakyReLU(SLOPE))


def _spectral_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv1d:
    conv = nn.Conv1d(
        in_channels, out_channels, kernel_size, padding="same", padding_mode="circular"
    )
    register_parametrization(conv, "weight", SpectralNorm())
    return conv


class SpectralNorm(nn.Module):
    """A weight (out, in, k) over its largest singular value (Miyato et al., arXiv 1802.05957).

    torch's own follows the singular vectors by one power iteration at each forward, so a weight
    would depend on how many micro-batches went before. This one has no memory: it finds them
    again, by squaring the Gram matrix. As there, they are constants to the gradient.
    """

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)  # (out, in k)
            u, v = leading_vectors(matrix)
            return weight / (u @ matrix @ v).clamp(min=1e-12)


@torch.no_grad()
def leading_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors (M,) and (N,) of the largest singular value of a matrix (M, N)."""
    gram = matrix @ matrix.T  # (M, M)
    for _ in range(NUM_SQUARINGS):
        gram = gram / gram.norm().clamp(min=1e-12)
        gram = gram @ gram
    # Every column is now nearly a multiple of u; the one of the largest diagonal is not zero.
    column = gram.index_select(1, gram.diagonal().argmax().view(1)).squeeze(1)
    u = F.normalize(column, dim=0)
    return u, F.normalize(matrix.T @ u, dim=0)
