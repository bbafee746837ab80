"""Transformer blocks: GPT-2's, and the paper's with adaptive LayerNorm.

    Block              pre-norm with learned affine LayerNorm (GPT-2, Radford et al. 2019)
    AdaLNBlock         scale, shift and gate from the class embedding (DiT, arXiv 2212.09748;
                       VAR, arXiv 2404.02905, section 3.2)
    SharedAdaLNBlock   one linear for all blocks plus a learned offset for each (PixArt-alpha,
                       arXiv 2310.00426; the published d36)

A block runs in two steps, `modulation = block.modulation(condition)` and `block(x, modulation,
attend)`: the modulation depends on the class alone, so sampling computes it once for all scales.

A block receives its parts: the attention and the MLP as modules, the norm as a class.

    B batch, n tokens, C width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.ops.attention import Attend
from var_exp.ops.linear import Linear, linear_gelu
from var_exp.transformer.attention import SelfAttention

NORM_EPS = 1e-6


class MLP(nn.Module):
    """Linear, tanh-GELU, linear.

    Args:
        width: C.
        mlp_ratio: hidden width over C.
        dropout: of the output, in [0, 1).
    """

    def __init__(self, width: int, mlp_ratio: float, dropout: float):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear_gelu(x, self.fc1.weight, self.fc1.bias)
        return self.dropout(self.fc2(hidden))


class SwiGLU(nn.Module):
    """A linear gated by the SiLU of another, then linear (Shazeer, arXiv 2002.05202, equation 6).

    Three matrices instead of two: the hidden width is 2/3 of `MLP`'s, in multiples of 8, which
    keeps the number of parameters (section 2 of the paper). Biases as in `MLP`.

    Args:
        width, mlp_ratio, dropout: as `MLP`.
    """

    def __init__(self, width: int, mlp_ratio: float, dropout: float):
        super().__init__()
        hidden = 8 * max(1, round(width * mlp_ratio * 2 / 3 / 8))
        self.fc1, self.fc2 = Linear(width, 2 * hidden), Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.dropout(self.fc2(F.silu(gate) * value))


class Block(nn.Module):
    """GPT-2's pre-norm block; the class enters through the start token alone.

    Args:
        width: C.
        attn, mlp: what follows each norm, (B, n, C) -> (B, n, C).
        norm: `nn.LayerNorm` or `nn.RMSNorm` (Zhang and Sennrich, arXiv 1910.07467).
        drop_path: probability of skipping a branch for a sample (arXiv 1603.09382).
    """

    affine = True
    drop_path: Tensor

    def __init__(
        self,
        width: int,
        attn: SelfAttention,
        mlp: MLP | SwiGLU,
        norm: type[nn.Module],
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = norm(width, NORM_EPS, elementwise_affine=self.affine)
        self.attn = attn
        self.norm2 = norm(width, NORM_EPS, elementwise_affine=self.affine)
        self.mlp = mlp
        # A tensor: as a number, each block's own rate would be compiled by itself.
        self.register_buffer("drop_path", torch.tensor(float(drop_path)), persistent=False)
        self.drops = drop_path > 0

    @staticmethod
    def shared_modulation(width: int) -> nn.Module:
        """Module that maps the class embedding (B, C) to the condition of all blocks."""
        return nn.Identity()

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        attend: Attend,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """(B, n, C) -> (B, n, C); attend and rotation as in `SelfAttention`."""
        x = x + self.skip(self.attn(self.norm1(x), attend, rotation))
        return x + self.skip(self.mlp(self.norm2(x)))  # (B, n, C)

    def skip(self, branch: Tensor) -> Tensor:
        """Drop the branch (B, n, C) of some samples in training and scale up the others."""
        if not (self.training and self.drops):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def init_modulation(self, gate_init: float) -> None:
        """Scale the newly initialised modulation; GPT-2's block has none."""


class AdaLNBlock(Block):
    """The paper's block: norms without affine, modulated by six vectors from the class."""

    affine = False

    def __init__(self, width: int, *parts):
        super().__init__(width, *parts)
        self._make_modulation(width)

    def _make_modulation(self, width: int) -> None:
        self.ada_lin = Linear(width, 6 * width)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, C) -> gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp (B, 1, C)."""
        return self.ada_lin(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        attend: Attend,
        rotation: Tensor | None = None,
    ) -> Tensor:
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = modulation
        h = modulate(self.norm1(x), scale_attn, shift_attn)
        x = gated_residual(x, gate_attn, self.skip(self.attn(h, attend, rotation)))
        h = modulate(self.norm2(x), scale_mlp, shift_mlp)
        return gated_residual(x, gate_mlp, self.skip(self.mlp(h)))  # (B, n, C)

    def init_modulation(self, gate_init: float) -> None:
        scale_gates(self.ada_lin.weight.data.unflatten(0, (6, -1)), gate_init)


class SharedAdaLNBlock(AdaLNBlock):
    """Six vectors from one linear for all blocks, plus this block's learned offset."""

    def _make_modulation(self, width: int) -> None:
        self.ada_offset = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    @staticmethod
    def shared_modulation(width: int) -> nn.Module:
        return nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, 6C) -> the six vectors (B, 1, C)."""
        six = condition.view(len(condition), 1, 6, -1) + self.ada_offset  # (B, 1, 6, C)
        return six.unbind(2)

    def init_modulation(self, gate_init: float) -> None:
        scale_gates(self.ada_offset.data[0, 0], gate_init)


class Head(nn.Module):
    """Last norm and linear to the vocabulary, with GPT-2's affine norm; `norm` as in `Block`."""

    affine = True

    def __init__(self, width: int, vocab_size: int, norm: type[nn.Module]):
        super().__init__()
        self.norm = norm(width, NORM_EPS, elementwise_affine=self.affine)
        self.linear = Linear(width, vocab_size)

    def modulation(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        return self.logits(self.features(x, modulation))

    def features(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, V) float32."""
        return self.linear(features).float()


class AdaLNHead(Head):
    """The paper's head: its own scale and shift from the class, also with shared AdaLN."""

    affine = False

    def __init__(self, width: int, vocab_size: int, norm: type[nn.Module]):
        super().__init__(width, vocab_size, norm)
        self.ada_lin = Linear(width, 2 * width)

    def modulation(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """(B, C) -> scale, shift (B, 1, C)."""
        return self.ada_lin(F.silu(embedding)).unsqueeze(1).chunk(2, dim=-1)

    def features(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        return modulate(self.norm(x), *modulation)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return x + gate * branch


def scale_gates(six: Tensor, gate_init: float) -> None:
    """Multiply the two gate rows of a modulation (6, ...) by `gate_init`, the others by 0.5."""
    six[:2] *= gate_init
    six[2:] *= 0.5
