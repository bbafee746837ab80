"""The method of the quantizer written out step by step, to compare with."""

import copy

import torch
import torch.nn.functional as F

from helpers.tiny import table
from var_exp.tokenizer import FSQCodebook


def slow_nearest(book, codes, vectors):
    """The best of all codes (V, D) for each vector; of FSQ that of its rounded bounds."""
    if isinstance(book, FSQCodebook):
        levels = torch.tensor(book.levels)
        half, offset = (levels.double() - 1) / 2, 0.5 * (levels % 2 == 0)
        scaled = vectors / book.log_magnitude.exp()
        rounded = (half * torch.tanh(scaled + torch.atanh(offset / half)) - offset).round()
        vectors = rounded / (levels // 2) * book.log_magnitude.exp()  # a code exactly
    if getattr(book, "cosine", False):
        return F.cosine_similarity(vectors[:, None], codes[None], dim=-1).argmax(dim=1)
    return (vectors[:, None] - codes[None]).norm(dim=-1).argmin(dim=1)


def slow_quantize(quantizer, f, used=None):
    """The method's five steps in float64, with torch's own resizes and all distances.

    With `used`, K tensors of codes (B, h_k * w_k), it goes on from these instead of the nearest.
    Returns (nearest codes, what is added after each scale, the residual that is left, the
    vectors that each scale quantized).
    """
    quantizer = copy.deepcopy(quantizer).double()
    residual, last = f.double(), quantizer.schedule.num_scales - 1
    all_indices, parts, seen = [], [], []
    for k, size in enumerate(quantizer.schedule.sizes):
        z = residual if k == last else F.interpolate(residual, size=size, mode="area")
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        book = quantizer.codebooks[k if len(quantizer.codebooks) > 1 else 0]
        codes = table(book)
        indices = slow_nearest(book, codes, vectors)
        chosen = indices if used is None else used[k].flatten()
        h = codes[chosen].view(len(f), *size, -1).permute(0, 3, 1, 2)
        if k != last:
            h = F.interpolate(h, size=f.shape[2:], mode="bicubic")
        h = 0.5 * h + 0.5 * quantizer.phis[quantizer.phi_of_scale[k]](h)
        residual = residual - h
        all_indices.append(indices.view(len(f), -1))
        parts.append(h)
        seen.append(vectors)
    return all_indices, parts, residual, seen
