"""The convolutional encoder and decoder around the quantizer.

The VQGAN autoencoder (Esser et al., arXiv 2012.09841) as VAR uses it (arXiv 2404.02905,
appendix): residual blocks at each resolution, strided convolutions between them, single-head
attention at the lowest resolution. Modules carry the published names, so that a published
state dict fits without renaming; `up` is indexed by resolution and runs from last to first.

    B batch, C image channels, (H, W) image, D code dimension, (h, w) = (H, W) / stride
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from annotated_types import MinLen
from pydantic import PositiveInt
from torch import Tensor, nn

from var_exp.configurable import Fraction, checked, register_config
from var_exp.ops.convolution import Conv2d
from var_exp.ops.upsampling import upsample_conv2d

Multipliers = Annotated[Sequence[PositiveInt], MinLen(1)]


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups where the channels allow it, else the most that divide them."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, twice, added to the raw input (1x1 conv where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels), conv3x3(out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, O, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.nin_shortcut(x)


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, c, h * w).transpose(2, 3)  # (B, 3, HW, C)
        q, k, v = qkv.contiguous().unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, HW, C), scale C^-1/2
        return x + self.proj_out(out.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halve the size: pad right and bottom by one, then a stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)  # (B, C, 2H, 2W)


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, widths: Sequence[int], attention: bool, dropout: float):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.block = nn.ModuleList(ResidualBlock(i, o, dropout) for i, o in pairs)
        self.attn = nn.ModuleList(SpatialAttention(o) for _, o in pairs if attention)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Block, attention, block, at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, dropout: float):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = SpatialAttention(channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def level_sizes(
    width: int, multipliers: Sequence[int], num_res_blocks: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Channels and number of residual blocks of each resolution, from full to lowest."""
    widths = [width * m for m in multipliers]
    number = num_res_blocks
    blocks = [number] * len(widths) if isinstance(number, int) else list(number)
    changes = [w != before for before, w in zip([width, *widths], widths, strict=False)]
    narrow = any(c and n < 1 for c, n in zip(changes, blocks, strict=False))
    if len(blocks) != len(widths) or narrow or min(blocks) < 0:
        raise ValueError(
            f"tokenizer: num_res_blocks must be a number >= 1 or one for each of the "
            f"{len(widths)} multipliers {list(multipliers)}, at least 1 where the width changes, "
            f"got {num_res_blocks} (tokenizer.encoder.num_res_blocks)"
        )
    return widths, blocks


@register_config
class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> features (B, code_dim, H / stride, W / stride).

    Args:
        in_channels: channels of the image.
        code_dim: D, channels of the features.
        width: channels at full resolution.
        multipliers: channels of each resolution over `width`; the stride is
            patch_size * 2 ** (len(multipliers) - 1).
        num_res_blocks: residual blocks at each resolution, one number for all or one for each.
        attention: attention at the lowest resolution and in the middle.
        dropout: within residual blocks, in [0, 1).
        patch_size: pixels per side that are folded into channels before the first convolution;
            the published network has 1. Most of the work of a small network is at full
            resolution, and this saves it.

    Raises:
        ValueError: as many numbers of blocks as resolutions are not given, or the width changes
            at a resolution without blocks.
    """

    @checked
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        code_dim: PositiveInt = 32,
        width: PositiveInt = 160,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        num_res_blocks: int | Sequence[int] = 2,
        attention: bool = True,
        dropout: Fraction = 0.0,
        patch_size: PositiveInt = 1,
    ):
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.stride = patch_size * 2 ** (len(multipliers) - 1)
        widths, blocks = level_sizes(width, multipliers, num_res_blocks)
        lowest = len(widths) - 1
        self.conv_in = conv3x3(in_channels * patch_size**2, width)
        self.down = nn.ModuleList()
        previous = width
        for i, w in enumerate(widths):
            level = Level([previous] + [w] * blocks[i], attention and i == lowest, dropout)
            if i != lowest:
                level.downsample = Downsample(w)
            self.down.append(level)
            previous = w
        self.mid = Middle(previous, attention, dropout)
        self.norm_out = group_norm(previous)
        self.conv_out = conv3x3(previous, code_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))  # (B, width, H / p, W / p)
        for level in self.down:
            x = level(x)
        x = self.mid(x)  # (B, width', h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, D, h, w)


@register_config
class Decoder(nn.Module):
    """Features (B, code_dim, h, w) -> images (B, out_channels, h * stride, w * stride).

    Arguments as for `Encoder`; each resolution has `num_res_blocks + 1` blocks here. The output
    is not clamped.
    """

    @checked
    def __init__(
        self,
        out_channels: PositiveInt = 3,
        code_dim: PositiveInt = 32,
        width: PositiveInt = 160,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        num_res_blocks: int | Sequence[int] = 2,
        attention: bool = True,
        dropout: Fraction = 0.0,
        patch_size: PositiveInt = 1,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size * 2 ** (len(multipliers) - 1)
        widths, blocks = level_sizes(width, multipliers, num_res_blocks)
        lowest = len(widths) - 1
        self.conv_in = conv3x3(code_dim, widths[-1])
        self.mid = Middle(widths[-1], attention, dropout)
        levels = []
        previous = widths[-1]
        for i in range(lowest, -1, -1):
            out = [widths[i]] * (blocks[i] + 1)
            level = Level([previous] + out, attention and i == lowest, dropout)
            if i != 0:
                level.upsample = Upsample(widths[i])
            levels.append(level)
            previous = widths[i]
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(previous)
        self.conv_out = conv3x3(previous, out_channels * patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))  # (B, width', h, w)
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, C p^2, H / p, W / p)
        return F.pixel_shuffle(x, self.patch_size)  # (B, C, H, W)
