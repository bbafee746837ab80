"""The convolutional networks of the plain tokenizer (VQGAN, Esser et al., arXiv 2012.09841).

B batch, C channels, (H, W) size of the feature map
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class PlainResidual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PlainSpatialAttention(nn.Module):
    """All weights at once: two batched products with a softmax between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, HW)
        weights = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5  # (B, HW, HW)
        out = torch.bmm(v, weights.softmax(dim=2).transpose(1, 2))  # (B, C, HW)
        return x + self.proj_out(out.view_as(x))


class PlainDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class PlainUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class PlainLevel(nn.Module):
    """Blocks of one resolution, with attention after each where it is the lowest."""

    def __init__(self, widths: list[int], attention: bool):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.block = nn.ModuleList(PlainResidual(*pair) for pair in pairs)
        self.attn = nn.ModuleList(PlainSpatialAttention(w) for _, w in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class PlainMiddle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = PlainResidual(channels, channels)
        self.attn_1 = PlainSpatialAttention(channels)
        self.block_2 = PlainResidual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class PlainEncoder(nn.Module):
    """Sizes as in the spec of an `Encoder` of ours."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        widths = [spec["width"] * m for m in spec["multipliers"]]
        self.conv_in = nn.Conv2d(spec["in_channels"], spec["width"], 3, padding=1)
        self.down = nn.ModuleList()
        before = spec["width"]
        for i, width in enumerate(widths):
            lowest = i + 1 == len(widths)
            level = PlainLevel([before] + [width] * spec["num_res_blocks"], attention=lowest)
            if not lowest:
                level.downsample = PlainDownsample(width)
            self.down.append(level)
            before = width
        self.mid = PlainMiddle(before)
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, spec["code_dim"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PlainDecoder(nn.Module):
    """Sizes as in the spec of a `Decoder` of ours; the last level runs first."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        widths = [spec["width"] * m for m in spec["multipliers"]]
        before = widths[-1]
        self.conv_in = nn.Conv2d(spec["code_dim"], before, 3, padding=1)
        self.mid = PlainMiddle(before)
        levels = []
        for i in reversed(range(len(widths))):
            blocks = [widths[i]] * (spec["num_res_blocks"] + 1)
            level = PlainLevel([before, *blocks], attention=i + 1 == len(widths))
            if i > 0:
                level.upsample = PlainUpsample(widths[i])
            levels.append(level)
            before = widths[i]
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, spec["out_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
