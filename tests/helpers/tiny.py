"""Tiny networks with weights that make every part of them matter, and the variants to try.

A fresh transformer hardly differs from a constant (its gates start near zero), which would hide
mistakes: `stir` draws its parameters again.
"""

from itertools import product

import torch
from torch import nn

from var_exp.tokenizer import (
    VQVAE,
    BaseCodebook,
    BitwiseCodebook,
    Codebook,
    Decoder,
    EMACodebook,
    Encoder,
    FSQCodebook,
    MultiScaleQuantizer,
)
from var_exp.transformer import VAR

SCALES = [1, 2, 3, 4, 5]
ODD_SCALES = {
    "pow2": [1, 2, 4],
    "skips": [1, 2, 3, 5],
    "three": [1, 3, 4],
    "starts_at_2": [2, 3, 4],
    "two_to_one": [[1, 2], [2, 4], [3, 6]],
    "grows_one_way": [[1, 1], [1, 2], [2, 2], [3, 4]],
    "single": [3],
}
BLOCKS = ["gpt2", "adaln", "shared_adaln"]
IMPLICIT = {  # codebooks without a table, of dimension 4
    "bitwise": lambda: BitwiseCodebook(4),
    "fsq": lambda: FSQCodebook([3, 4, 3, 5]),  # even and odd numbers of levels
}
IMPLICIT_ON = ((0, "five"), (1, "five"), (0, "two_to_one"), (1, "two_to_one"), (1, "single"))


def quantizer_variants() -> dict[str, dict]:
    """Arguments of `tiny_quantizer`: every variant on one schedule, a few on the odd ones."""
    variants = {}
    for ema, per_scale, cosine, num_phi in product((0, 1), (0, 1), (0, 1), (1, 4, 5)):
        name = "-".join(
            (
                "ema" if ema else "gradient",
                "per_scale" if per_scale else "shared",
                "cosine" if cosine else "euclidean",
                f"{num_phi}phi",
            )
        )
        variants[name] = {"ema": ema, "per_scale": per_scale, "cosine": cosine, "num_phi": num_phi}
    for scales, patch_nums in ODD_SCALES.items():
        for per_scale, num_phi in ((0, 1), (0, 4), (1, len(patch_nums))):
            name = f"{scales}-{'per_scale' if per_scale else 'shared'}-{num_phi}phi"
            variants[name] = {"patch_nums": patch_nums, "per_scale": per_scale, "num_phi": num_phi}
    for implicit, (per_scale, schedule) in product(IMPLICIT, IMPLICIT_ON):
        name = f"{implicit}-{'per_scale' if per_scale else 'shared'}-{schedule}"
        patch_nums = ODD_SCALES.get(schedule, SCALES)
        variants[name] = {"implicit": implicit, "per_scale": per_scale, "patch_nums": patch_nums}
    return variants


QUANTIZERS = quantizer_variants()


def tiny_quantizer(
    patch_nums=SCALES,
    ema=False,
    per_scale=False,
    cosine=False,
    num_phi=4,
    implicit=None,
    **others,
) -> MultiScaleQuantizer:
    book = EMACodebook if ema else Codebook
    vocab_size = others.pop("vocab_size", 16)
    codebook = IMPLICIT[implicit]() if implicit else book(vocab_size, 4, cosine=bool(cosine))
    quantizer = MultiScaleQuantizer(patch_nums, codebook, bool(per_scale), num_phi, **others)
    if implicit:
        magnitudes_that_shrink(quantizer)
    return quantizer.eval()


def magnitudes_that_shrink(quantizer: MultiScaleQuantizer) -> None:
    """As residuals do: 1.3 at the first scale."""
    for k, codebook in enumerate(quantizer.codebooks):
        torch.nn.init.constant_(codebook.log_magnitude, 0.26 - 0.2 * k)


def table(codebook: BaseCodebook) -> torch.Tensor:
    """All codes (V, D)."""
    return codebook.lookup(torch.arange(codebook.vocab_size))


def features(quantizer: MultiScaleQuantizer, batch_size: int = 3) -> torch.Tensor:
    return torch.randn(batch_size, quantizer.code_dim, *quantizer.schedule.latent_size)


def tiny_tokenizer(quantizer: MultiScaleQuantizer | None = None, channels: int = 3) -> VQVAE:
    """Stride 2, width 8; codes of dimension 4 unless the quantizer has others."""
    quantizer = quantizer or tiny_quantizer()
    sizes = {"code_dim": quantizer.code_dim, "width": 8, "multipliers": (1, 2)}
    network = VQVAE(
        Encoder(channels, num_res_blocks=1, **sizes),
        quantizer,
        Decoder(channels, num_res_blocks=1, **sizes),
    )
    return network.eval()


def tiny_transformer(patch_nums=SCALES, block="adaln", qk_norm=True, **others) -> VAR:
    sizes = {"vocab_size": 16, "code_dim": 4, "num_classes": 3, "depth": 2, "width": 16}
    network = VAR(patch_nums, block=block, qk_norm=qk_norm, **sizes | {"num_heads": 2} | others)
    return stir(network).eval()


@torch.no_grad()
def stir(network: nn.Module) -> nn.Module:
    """Parameters that matter: weights of unit gain, everything else around its start."""
    for parameter in network.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim == 2 else 0.3
        noise = std * torch.randn_like(parameter)
        parameter.copy_(noise if parameter.ndim == 2 else parameter + noise)
    return network
