"""Block-causal self-attention and its cache.

A token of scale k sees every token of scales 1..k (VAR, arXiv 2404.02905, section 3.1). In
training all scales run at once (`backends.py`); in sampling one scale at a time, its keys and
values kept in a cache that is allocated once. How tokens see each other is handed in.

    B batch, L tokens, n tokens of this call, C width, H heads, E = C / H head dimension
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.ops.attention import Attend
from var_exp.ops.attention_cpu import attend_by_products, by_products
from var_exp.ops.linear import Linear, linear
from var_exp.ops.qk_norm import unit_vectors
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
        self.layers: list[tuple[Tensor, Tensor]] = []  # of `hold_layers`

    def attend(self, index: int, where: slice) -> Attend:
        """What the tokens at `where` see in a layer: themselves and all that it holds before."""
        if self.layers:
            return CachedAttention(*self.layers[index], where)
        return CachedAttention(self.keys[index], self.values[index], where)

    def hold_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, L, E) of each layer, as the same tensors from now on."""
        self.layers = [(self.keys[i], self.values[i]) for i in range(len(self.keys))]
        return self.layers


class CachedAttention(NamedTuple):
    """One layer's keys and values (B, H, L, E), and the place of the tokens that come."""

    keys: Tensor
    values: Tensor
    where: slice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        """Store k, v (B, H, n, E), and attend to all up to their end."""
        end = self.where.stop
        self.keys[:, :, self.where] = k
        self.values[:, :, self.where] = v
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if dropout == 0 and by_products(q, end):
            return attend_by_products(q, keys, values, scale)
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
        if qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        else:
            self.log_scale = None

    def forward(self, x: Tensor, attend: Attend, rotation: Tensor | None = None) -> Tensor:
        """Attend to whatever tokens are seen.

        Args:
            x: (B, n, C).
            attend: queries, keys, values, scale, dropout -> (B, H, n, E); see `backends.py` and
                `KVCache.attend`.
            rotation: (2, n, E / 2) of these tokens, from `rotation_of`. It comes after QK-norm,
                which it leaves as it is; the cache holds turned keys.

        Returns:
            (B, n, C).
        """
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias)  # (B, n, 3C)
        three = qkv.view(b, n, 3, self.num_heads, self.head_dim).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in three)  # (B, H, n, E)
        if self.log_scale is not None:
            scale = self.log_scale.clamp(max=self.MAX_LOG_SCALE).exp()
            q, k = unit_vectors(q, scale), unit_vectors(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        rate = self.dropout if self.training else 0.0
        out = attend(q.to(v.dtype), k.to(v.dtype), v, self.scale, rate)  # (B, H, n, E)
        out = self.proj(out.transpose(1, 2).reshape(b, n, c))  # (B, n, C)
        return F.dropout(out, rate, self.training)
