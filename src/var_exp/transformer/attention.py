"""Block-causal self-attention and its cache.

A token of scale k sees every token of scales 1..k (VAR, arXiv 2404.02905, section 3.1). Training
runs all scales at once (`var_exp.ops.attention`); sampling runs one scale at a time and keeps keys
and values in a cache that is allocated once. The caller passes which tokens are seen as a function.

    B batch, L tokens, n tokens of this call, C width, H heads, E = C / H head dimension
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.ops.attention import Attend
from var_exp.ops.linear import Linear, linear
from var_exp.transformer.rope import rotate


class KVCache:
    """Keys and values of every layer for a whole sequence, allocated once.

    Args:
        depth, batch_size, num_heads, seq_len, head_dim: sizes.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        depth: int,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (depth, batch_size, num_heads, seq_len, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        # The same tensors at every call, which is what CUDA graphs may write to.
        self.layers = [(self.keys[i], self.values[i]) for i in range(depth)]  # (B, H, L, E) each

    def attend(self, layer: int, tokens: slice) -> "CachedAttention":
        """Attention of these tokens to themselves and to all cached tokens before them."""
        return CachedAttention(*self.layers[layer], tokens)


class CachedAttention(NamedTuple):
    """One layer's keys and values (B, H, L, E), and the slice of the tokens to come."""

    keys: Tensor
    values: Tensor
    tokens: slice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        """Store k, v (B, H, n, E) and attend to all keys up to theirs: (B, H, n, E)."""
        self.keys[:, :, self.tokens] = k
        self.values[:, :, self.tokens] = v
        end = self.tokens.stop
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return F.scaled_dot_product_attention(q, keys, values, dropout_p=dropout, scale=scale)


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection.

    q and v have a bias, k has none: without QK-norm a bias of k adds the same to every logit
    of a query, which softmax ignores.

    Args:
        width: C; num_heads: H, must divide C.
        qk_norm: L2-normalise q and k and learn a scale per head (arXiv 2404.02905, appendix).
        softmax_scale: times 1 / sqrt(E), used without QK-norm; the published code has 0.25.
        dropout: of the attention weights and of the output, in [0, 1).

    Raises:
        ValueError: a width that the heads do not divide.
    """

    MAX_LOG_SCALE = math.log(100)

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: bool,
        softmax_scale: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"transformer: the width must be divisible by the number of heads, got width "
                f"{width} and {num_heads} heads (transformer.width, transformer.num_heads)"
            )
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scale = 1.0 if qk_norm else softmax_scale / math.sqrt(self.head_dim)
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        start = torch.full((1, num_heads, 1, 1), math.log(4))
        self.log_scale = nn.Parameter(start) if qk_norm else None

    def forward(self, x: Tensor, attend: Attend, rotation: Tensor | None = None) -> Tensor:
        """Attend to the tokens that `attend` shows.

        Args:
            x: (B, n, C).
            attend: queries, keys, values, scale, dropout -> (B, H, n, E); see
                `var_exp.ops.attention` and `KVCache.attend`.
            rotation: (2, n, E / 2) of these tokens, from `rope.rotation_table`. It comes after
                QK-norm, which it preserves; the cache holds rotated keys.

        Returns:
            (B, n, C).
        """
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias)  # (B, n, 3C)
        qkv = qkv.view(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, n, E)
        if self.log_scale is not None:
            scale = self.log_scale.clamp(max=self.MAX_LOG_SCALE).exp()
            q = F.normalize(upcast(q), dim=-1) * scale
            k = F.normalize(upcast(k), dim=-1)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        rate = self.dropout if self.training else 0.0
        out = attend(q.to(v.dtype), k.to(v.dtype), v, self.scale, rate)  # (B, H, n, E)
        out = self.proj(out.transpose(1, 2).reshape(b, n, c))  # (B, n, C)
        return F.dropout(out, rate, self.training)


def upcast(x: Tensor) -> Tensor:
    """x in float32 at least, whatever autocast computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
