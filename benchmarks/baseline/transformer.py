"""The next-scale transformer, plainly: AdaLN blocks under a dense mask or with a growing cache.

VAR (Tian et al., arXiv 2404.02905, section 3.1 and appendix), with QK-norm and an AdaLN of each
block's own.

    B batch, K scales, L tokens, n tokens of this call, H heads, E head dimension, C width
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.transformer import VAR


class PlainAttention(nn.Module):
    """Attention under an additive mask (1, 1, L, L), or to a cache grown by these tokens."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(1, num_heads, 1, 1))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, n, E)
        q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp()
        k = F.normalize(k, dim=-1)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))  # (B, n, C)


class PlainMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlainBlock(nn.Module):
    """Computes its six vectors from the class whenever it is called."""

    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainMLP(width, hidden)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(
        self, x: Tensor, embedding: Tensor, mask: Tensor | None, cache: list[Tensor] | None
    ) -> Tensor:
        vectors = self.ada_lin(F.silu(embedding)).view(len(x), 1, 6, -1)  # (B, 1, 6, C)
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = vectors.unbind(2)
        h = self.norm1(x) * (scale_attn + 1) + shift_attn
        x = x + self.attn(h, mask, cache) * gate_attn
        h = self.norm2(x) * (scale_mlp + 1) + shift_mlp
        return x + self.mlp(h) * gate_mlp  # (B, n, C)


class PlainHead(nn.Module):
    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.ada_lin(F.silu(embedding)).view(len(x), 1, 2, -1).unbind(2)
        return self.linear(self.norm(x) * (scale + 1) + shift)


class PlainTransformer(nn.Module):
    """The plain form of a `VAR`, with its weights.

    Args:
        ours: with blocks "adaln", QK-norm, LayerNorm, a GELU MLP and no rope, as published.
    """

    def __init__(self, ours: VAR):
        super().__init__()
        width, self.num_classes = ours.width, ours.num_classes
        self.num_tokens = [h * w for h, w in ours.schedule.sizes]
        hidden = ours.blocks[0].mlp.fc1.out_features
        self.class_embedding = nn.Embedding(ours.num_classes + 1, width)
        self.code_projection = nn.Linear(ours.code_dim, width)
        self.start_position = nn.Parameter(torch.zeros(1, self.num_tokens[0], width))
        self.position = nn.Parameter(torch.zeros(1, sum(self.num_tokens), width))
        self.level_embedding = nn.Embedding(len(self.num_tokens), width)
        self.blocks = nn.ModuleList(PlainBlock(width, ours.num_heads, hidden) for _ in ours.blocks)
        self.head = PlainHead(width, ours.vocab_size)
        levels = [torch.full((n,), k) for k, n in enumerate(self.num_tokens)]
        self.register_buffer("levels", torch.cat(levels), persistent=False)  # (L,)
        hidden_from = self.levels[:, None] < self.levels[None, :]
        mask = torch.zeros(hidden_from.shape).masked_fill(hidden_from, -torch.inf)
        self.register_buffer("mask", mask[None, None], persistent=False)  # (1, 1, L, L)
        self.load_state_dict(ours.state_dict())

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: inputs (B, L - n_1, D), labels (B,) -> logits (B, L, V)."""
        embedding = self.class_embedding(labels)  # (B, C)
        start = embedding.unsqueeze(1) + self.start_position
        x = torch.cat((start, self.code_projection(inputs)), dim=1)
        x = x + self.level_embedding(self.levels) + self.position
        for block in self.blocks:
            x = block(x, embedding, self.mask, None)
        return self.head(x, embedding)

    def forward_scale(
        self, k: int, inputs: Tensor | None, labels: Tensor, caches: list[list[Tensor]]
    ) -> Tensor:
        """Logits (B, n_k, V) of scale k; `caches` holds a list for each block, empty at first."""
        embedding = self.class_embedding(labels)
        first = sum(self.num_tokens[:k])
        where = slice(first, first + self.num_tokens[k])
        if inputs is None:
            x = embedding.unsqueeze(1) + self.start_position
        else:
            x = self.code_projection(inputs)
        x = x + self.level_embedding(self.levels[where]) + self.position[:, where]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, embedding, None, cache)
        return self.head(x, embedding)
