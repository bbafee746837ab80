"""Sampling, plainly: ten forward passes, each doing all that it needs anew.

VAR (Tian et al., arXiv 2404.02905, section 3.1), with guidance in batches twice as large at every
scale, and a full sort for top-p. Draws are made from given uniform numbers, by the inverse of the
cumulative distribution, so that they can be compared.

    B batch, K scales, n_k tokens of scale k, L tokens, V codes, D code dimension
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baseline.tokenizer import PlainTokenizer
from benchmarks.baseline.transformer import PlainTransformer


class PlainSamples(NamedTuple):
    """images (B, C, H, W) in [0, 1]; indices: K tensors (B, n_k); masses: the cumulative
    distributions they were drawn from, K tensors (B, n_k, V)."""

    images: Tensor
    indices: list[Tensor]
    masses: list[Tensor]


@torch.no_grad()
def sampling_plain(
    transformer: PlainTransformer,
    tokenizer: PlainTokenizer,
    labels: Tensor,
    uniforms: Tensor,
    cfg_scale: float,
    top_k: int,
    top_p: float,
) -> PlainSamples:
    """An image for each label.

    Args:
        labels: (B,). uniforms: (B, L) in [0, 1).
        cfg_scale: guidance, rising from 0 at the first scale.
        top_k, top_p: as in `keep`.
    """
    quantizer = tokenizer.quantizer
    num_scales = len(quantizer.sizes)
    none = torch.full_like(labels, transformer.num_classes)
    rows = torch.cat((labels, none))  # (2B,)
    caches: list[list[Tensor]] = [[] for _ in transformer.blocks]
    inputs, indices, masses, first = None, [], [], 0
    f_hat: Tensor | float = 0.0
    for k in range(num_scales):
        logits = transformer.forward_scale(k, inputs, rows, caches)  # (2B, n_k, V)
        t = cfg_scale * k / max(num_scales - 1, 1)
        with_class, without = logits.chunk(2)
        logits = keep((1 + t) * with_class - t * without, top_k, top_p)  # (B, n_k, V)
        masses.append(logits.softmax(dim=-1).cumsum(dim=-1))
        u = uniforms[:, first : first + logits.shape[1], None]
        chosen = torch.searchsorted(masses[-1], u * masses[-1][..., -1:], right=True)
        indices.append(chosen.squeeze(-1).clamp(max=logits.shape[-1] - 1))
        first += logits.shape[1]
        f_hat = f_hat + quantizer.up(indices[-1], k)  # (B, D, H, W)
        if k + 1 < num_scales:
            inputs = quantizer.down(f_hat, k + 1).repeat(2, 1, 1)  # (2B, n_k+1, D)
    images = tokenizer.decoder(tokenizer.post_quant_conv(f_hat)).clamp(-1, 1)
    return PlainSamples((images + 1) / 2, indices, masses)


def keep(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V), -inf but for the top_k likeliest codes, and of these but for the likeliest
    that first reach the mass top_p; 0 keeps all."""
    if top_k:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        dropped = mass.cumsum(dim=-1) - mass >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits
