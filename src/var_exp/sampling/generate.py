"""Sampling: labels to images, scale by scale.

VAR (arXiv 2404.02905, section 3.1) draws a whole token map at once, adds its upsampled codes to
f_hat, and takes f_hat resized as the input of the next scale; ten forward passes make an image.

Randomness belongs to the sample, not to the batch: image i of seed s draws one uniform number
for each token from a stream of (s, i), and turns it into a code by the inverse of the
cumulative distribution. So an image does not depend on the batch it is drawn in.

    B batch, K scales, n_k tokens of scale k, L tokens, V codes, D code dimension
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import NonNegativeInt
from torch import Tensor, nn

from var_exp.configurable import Seed, Zero, check_value
from var_exp.ops.linear import cached_weight_casts
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

# Batch sizes are multiples of this, so that kernels sum in the same order and a sample is the same
# to the last bit in every batch; as many samples are decoded at once, which bounds the memory.
ROWS = 8

CfgScale = Annotated[float, Ge(0), Le(1e4)]
Temperature = Annotated[float, Ge(1e-6), Le(1e6)]  # beyond, logits leave float32
TopP = Zero | Annotated[float, Ge(1e-6), Le(1)]
SETTINGS = {
    "cfg_scale": CfgScale,
    "top_k": NonNegativeInt,
    "top_p": TopP,
    "temperature": Temperature,
    "seed": Seed,
}


class Samples(NamedTuple):
    """images: (B, C, H, W) in [0, 1]; indices: K tensors (B, n_k)."""

    images: Tensor
    indices: list[Tensor]


class Settings(TypedDict, total=False):
    """Keyword arguments of `generate`."""

    num_samples: int | None
    cfg_scale: float
    top_k: int
    top_p: float
    temperature: float
    seed: int
    sample_ids: Sequence[int] | None


@overload
def generate(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: Tensor | Sequence[int] | None,
    *,
    return_indices: Literal[False] = False,
    **settings: Unpack[Settings],
) -> Tensor: ...


@overload
def generate(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: Tensor | Sequence[int] | None,
    *,
    return_indices: Literal[True],
    **settings: Unpack[Settings],
) -> Samples: ...


@torch.inference_mode()
def generate(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: Tensor | Sequence[int] | None,
    *,
    num_samples: int | None = None,
    cfg_scale: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    return_indices: bool = False,
) -> Tensor | Samples:
    """Draw one image for each label.

    Args:
        labels: (B,) classes in 0..num_classes - 1, or num_classes for no class; None draws
            `num_samples` (one, unless given) without a class.
        cfg_scale: guidance as published: at scale k (1-based) the logits are
            (1 + t) cond - t uncond with t = cfg_scale (k - 1) / (K - 1); 0 is no guidance.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the likeliest codes up to this mass, in [0, 1]; 0 keeps all.
        temperature: divides the guided logits, > 0.
        seed, sample_ids: image i is a function of (seed, sample_ids[i]) and the label; the ids
            are 0, 1, ... unless given.
        return_indices: return `Samples` instead of images.

    Returns:
        Images (B, C, H, W) in [0, 1], or `Samples`.

    Raises:
        ValueError: an argument out of its range, or networks that do not fit each other.
    """
    check_settings(
        cfg_scale=cfg_scale, top_k=top_k, top_p=top_p, temperature=temperature, seed=seed
    )
    check_fit(transformer, tokenizer)
    if labels is not None and num_samples not in (None, len(labels)):
        raise ValueError(
            f"sampling: got {len(labels)} labels and num_samples {num_samples}; one label is one "
            f"sample, so leave num_samples out"
        )
    if labels is None:
        labels = [transformer.num_classes] * (1 if num_samples is None else num_samples)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    labels = transformer.check_labels(labels, len(labels))
    ids = range(len(labels)) if sample_ids is None else sample_ids
    if not len(labels) == len(ids) > 0:
        raise ValueError(
            f"sampling: expected at least 1 sample and an id for each, got {len(labels)} labels "
            f"and {len(ids)} ids (num_samples=..., sample_ids=...)"
        )
    uniforms = torch.from_numpy(draw_uniforms(seed, ids, transformer.schedule.seq_len))
    indices: list[Tensor] = []
    with evaluating(transformer, tokenizer):
        with cached_weight_casts():
            for k, logits in guided_logits(transformer, tokenizer, labels, cfg_scale, indices):
                logits = filter_top_k_top_p(logits / temperature, top_k, top_p)  # (B, n_k, V)
                u = uniforms[:, transformer.schedule.slices[k]]  # (B, n_k)
                indices.append(draw(logits, u.to(logits.device, logits.dtype)))
        images = torch.cat(list(decode_in_parts(tokenizer, indices))).add_(1).div_(2)
    return Samples(images, indices) if return_indices else images


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and each of their modules back into its own at the end."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def iterate_samples(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: Sequence[int],
    *,
    batch_size: int,
    sample_ids: Sequence[int] | None = None,
    **settings,
) -> Iterator[tuple[list[int], Samples]]:
    """Draw many samples, a batch at a time: an iterator over (sample ids, samples).

    Arguments are checked at the call, before anything is drawn.

    Args:
        labels: one class per sample.
        batch_size: samples at once; whatever it is, a sample stays the same.
        sample_ids: as in `generate`.
        settings: cfg_scale, top_k, top_p, temperature and seed, as in `generate`.

    Raises:
        ValueError: no sample asked for, a batch size below 1, or as `generate`.
    """
    check_settings(**settings)
    check_fit(transformer, tokenizer)
    if not len(labels):
        raise ValueError("sampling: expected at least 1 sample, got 0 (num_samples=...)")
    if batch_size < 1:
        raise ValueError(f"sampling: batch_size must be at least 1, got {batch_size}")
    ids = list(range(len(labels)) if sample_ids is None else sample_ids)
    return _iterate(transformer, tokenizer, list(labels), ids, batch_size, settings)


def _iterate(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: list[int],
    ids: list[int],
    batch_size: int,
    settings: dict[str, Any],
) -> Iterator[tuple[list[int], Samples]]:
    rows = round_up(min(batch_size, len(ids)))
    for start in range(0, len(ids), rows):
        batch_ids, classes = ids[start : start + rows], labels[start : start + rows]
        # Kernels sum in another order for another number of rows, so a short batch is padded.
        n = len(batch_ids)
        padding = round_up(n) - n
        samples = generate(
            transformer,
            tokenizer,
            classes + classes[-1:] * padding,
            sample_ids=batch_ids + batch_ids[-1:] * padding,
            return_indices=True,
            **settings,
        )
        yield batch_ids, Samples(samples.images[:n], [codes[:n] for codes in samples.indices])


def decode_by_rows(tokenizer: VQVAE, indices: list[Tensor]) -> list[Tensor]:
    """`tokenizer.decode` after each scale, a fixed number of samples at a time.

    Convolutions choose their kernel, and with it the order of their sums, by the batch.
    """
    count = len(indices[0])
    padding = round_up(count) - count
    indices = [torch.cat([c, c[:1].expand(padding, -1)]) for c in indices]
    batches = (tokenizer.decode(rows, per_scale=True) for rows in in_parts(indices))
    return [torch.cat(images)[:count] for images in zip(*batches, strict=True)]


def decode_in_parts(tokenizer: VQVAE, indices: list[Tensor]) -> Iterator[Tensor]:
    """`tokenizer.decode` of `ROWS` samples at a time, and of the rest at the end."""
    return (tokenizer.decode(rows) for rows in in_parts(indices))


def in_parts(indices: list[Tensor]) -> Iterator[list[Tensor]]:
    for first in range(0, len(indices[0]), ROWS):
        yield [codes[first : first + ROWS] for codes in indices]


def round_up(rows: int) -> int:
    """The batch size that is drawn for so many rows: the next multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


def guided_logits(
    transformer: VAR,
    tokenizer: VQVAE,
    labels: Tensor,
    cfg_scale: float,
    indices: list[Tensor],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, guided logits (B, n_k, V)) scale by scale.

    The caller appends the codes (B, n_k) of scale k to `indices` before it asks for the next scale.
    """
    schedule, quantizer = transformer.schedule, tokenizer.quantizer
    guided = cfg_scale != 0
    rows = torch.cat((labels, torch.full_like(labels, transformer.num_classes)))
    condition = transformer.condition(rows if guided else labels)
    cache = transformer.make_cache(len(rows) if guided else len(labels))
    f_hat, inputs = None, None
    for k in range(schedule.num_scales):
        t = guidance_weight(cfg_scale, k, schedule.num_scales)
        mix = functools.partial(guide, t=t) if guided else None
        yield k, transformer.forward_scale(k, inputs, condition, cache, mix)
        if k + 1 < schedule.num_scales:
            h = quantizer.upsample_codes(indices[k], k)
            f_hat = h if f_hat is None else f_hat + h  # (B, D, H, W)
            inputs = quantizer.next_input(f_hat, k + 1)  # (B, n_k+1, D)
            inputs = torch.cat((inputs, inputs)) if guided else inputs


def guidance_weight(cfg_scale: float, k: int, num_scales: int) -> float:
    """t at scale k (0-based): rises linearly from 0 to cfg_scale."""
    return cfg_scale * k / (num_scales - 1) if num_scales > 1 else cfg_scale


def guide(features: Tensor, t: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): (2B, n, C) with "no class" rows -> (B, n, C).

    The published code mixes logits. The layer that makes them is affine and the weights add up to
    1, so mixing its input gives the same with half of its work.
    """
    cond, uncond = features.chunk(2)
    return torch.lerp(uncond, cond, 1 + t)  # in one pass


def filter_top_k_top_p(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits (..., V) of codes outside top-k, then outside top-p, to -inf.

    The code that crosses the mass top_p is kept (nucleus sampling, arXiv 1904.09751), and so are
    all codes as likely as the last one kept. 0 keeps all.
    """
    vocab_size = logits.shape[-1]
    by_rank, by_mass = 0 < top_k < vocab_size, 0 < top_p < 1
    if not by_rank and not by_mass:
        return logits
    kept = logits.topk(top_k if by_rank else vocab_size, dim=-1, sorted=by_mass).values
    if by_mass:
        mass = kept.softmax(dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= top_p  # mass before this code
        kept = kept.masked_fill(outside, torch.inf)
    return logits.masked_fill(logits < kept.amin(dim=-1, keepdim=True), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Codes by inverse transform: logits (B, n, V), uniforms in [0, 1) (B, n) -> (B, n) int64."""
    mass = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, n, V)
    whole = mass[..., -1:]
    # A uniform that float32 rounds up to 1 would point behind the last code.
    below = torch.nextafter(whole, torch.zeros_like(whole))
    target = torch.minimum(uniforms.to(mass.dtype).unsqueeze(-1) * whole, below)
    return torch.searchsorted(mass, target, right=True).squeeze(-1)


def draw_uniforms(seed: int, sample_ids: Sequence[int], seq_len: int) -> np.ndarray:
    """One uniform in [0, 1) per token, from a stream of its own for each sample: (B, L)."""
    return np.stack([_rng(seed, i).random(seq_len) for i in sample_ids])


def _rng(seed: int, sample_id: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(sample_id,)))


def check_settings(**settings: float) -> None:
    """Raise ValueError for a sampling setting of another name or type, or out of its range."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"sampling: expected {', '.join(SETTINGS)}, got a setting {name!r}")
        check_value(f"sampling: {name}", value, SETTINGS[name])


def check_fit(transformer: VAR, tokenizer: VQVAE) -> None:
    """Raise ValueError if transformer and tokenizer differ in schedule, vocabulary or dimension."""
    quantizer = tokenizer.quantizer
    for name in ("schedule", "vocab_size", "code_dim"):
        ours, theirs = getattr(transformer, name), getattr(quantizer, name)
        if ours != theirs:
            raise ValueError(
                f"the transformer and the tokenizer must have one {name}, got {ours} and "
                f"{theirs}; use the tokenizer that the transformer was trained with"
            )
