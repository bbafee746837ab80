"""The design in five functions, with its defaults.

`build_tokenizer` and `build` make the two networks; `next_scale_prediction` asks one for the
next token map in the other's language.

    B batch, C image channels, s_k side of scale k, L tokens, V codes, D code dimension
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from var_exp.sampling.generate import check_fit
from var_exp.scales import ScaleSchedule, Side
from var_exp.tokenizer import VQVAE, Decoder, EMACodebook, Encoder, MultiScaleQuantizer
from var_exp.transformer import VAR

MULTIPLIERS = (1, 1, 2, 2, 4, 4, 4)


class TokenEncoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> list of K index tensors (B, s_k^2)."""

    def __init__(self, tokenizer: VQVAE):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        return self.tokenizer.quantizer

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.tokenizer.encode(images)


class TokenDecoder(nn.Module):
    """List of K index tensors (B, s_k^2) -> images (B, C, H, W) in [-1, 1]."""

    def __init__(self, tokenizer: VQVAE):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        return self.tokenizer.quantizer

    def forward(self, indices: Sequence[Tensor]) -> Tensor:
        return self.tokenizer.decode(indices)


def build_tokenizer(
    image_size: int | tuple[int, int] = 256,
    scales: Sequence[Side] = (1, 2, 4, 8, 16),
    codebook_size: int = 1024,
    embed_dim: int = 256,
    in_channels: int = 3,
    *,
    shared_codebook: bool = False,
    cosine: bool = False,
    width: int = 128,
    num_res_blocks: int = 2,
) -> tuple[TokenEncoder, TokenDecoder]:
    """A multi-scale VQ tokenizer as an (encoder, decoder) pair that shares one quantizer.

    Args:
        image_size: side, or (H, W), in pixels; image size / last scale must be a power of two.
        scales: sides of the token maps, growing.
        codebook_size: codes of each codebook, >= 2.
        embed_dim: dimension of a code.
        in_channels: channels of the images.
        shared_codebook: one codebook for all scales, as in the paper, instead of one each.
        cosine: nearest code by cosine instead of Euclidean distance.
        width: channels of the autoencoder at full resolution.
        num_res_blocks: residual blocks at each resolution.

    Both modules hold the whole network as `.tokenizer`, a `VQVAE`.

    Raises:
        ValueError: scales that do not grow or do not match the image, a codebook below 2.
    """
    schedule = ScaleSchedule(scales)
    height = image_size if isinstance(image_size, int) else image_size[0]
    stride = max(1, height // schedule.latent_size[0])
    power = stride.bit_length() - 1
    schedule.check_image(image_size, stride)
    if stride != 2**power or power >= len(MULTIPLIERS):
        raise ValueError(
            f"tokenizer: image size / last scale must be a power of two up to "
            f"{2 ** (len(MULTIPLIERS) - 1)}, got {stride} (image_size, scales)"
        )
    sizes: dict[str, Any] = {
        "code_dim": embed_dim,
        "width": width,
        "multipliers": MULTIPLIERS[: power + 1],
        "num_res_blocks": num_res_blocks,
    }
    quantizer = MultiScaleQuantizer(
        schedule.patch_nums,
        EMACodebook(codebook_size, embed_dim, cosine=cosine),
        per_scale=not shared_codebook,
        num_phi=min(4, schedule.num_scales),
    )
    tokenizer = VQVAE(Encoder(in_channels, **sizes), quantizer, Decoder(in_channels, **sizes))
    return TokenEncoder(tokenizer), TokenDecoder(tokenizer)


def build(
    hidden_size: int = 512,
    num_layers: int = 12,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    scales: Sequence[Side] = (1, 2, 4, 8, 16),
    codebook_size: int = 1024,
    dropout: float = 0.1,
    *,
    embed_dim: int = 256,
    num_classes: int = 1000,
    block: str = "gpt2",
    qk_norm: bool = False,
) -> VAR:
    """The GPT-2-style next-scale transformer; `block="adaln"` is the paper's backbone.

    Args:
        hidden_size: width, divisible by num_heads.
        num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        scales, codebook_size, embed_dim: those of the tokenizer.
        num_classes: classes; labels are optional even so.
        block: "gpt2", "adaln" or "shared_adaln".
        qk_norm: L2-normalised queries and keys with a learned scale.

    Returns:
        model(inputs (B, L - s_1^2, embed_dim), labels (B,) or None) -> logits (B, L, V).

    Raises:
        ValueError: scales that do not grow, a codebook below 2, a width not divisible by heads.
    """
    if codebook_size < 2:
        raise ValueError(
            f"transformer: expected at least 2 codes, got {codebook_size} (codebook_size)"
        )
    return VAR(
        scales,
        vocab_size=codebook_size,
        code_dim=embed_dim,
        num_classes=num_classes,
        depth=num_layers,
        width=hidden_size,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        block=block,
        qk_norm=qk_norm,
        dropout=dropout,
    )


def recommended_defaults() -> dict:
    """The defaults of the design, as a dict that `build(**...)` takes."""
    design = (p for p in signature(build).parameters.values() if p.kind is not p.KEYWORD_ONLY)
    return {parameter.name: parameter.default for parameter in design}


def next_scale_prediction(
    model: VAR,
    tokenizer: VQVAE | TokenEncoder | TokenDecoder | tuple[TokenEncoder, TokenDecoder],
    current_tokens: Sequence[Tensor],
    scale_idx: int,
    labels: Tensor | None = None,
) -> Tensor:
    """Logits (B, s^2, V) of scale `scale_idx` (0-based) from the codes of all coarser scales.

    Equal to that scale's slice of the full forward, in the mode that the model is in: call
    `model.eval()` first where dropout should rest.

    Args:
        model, tokenizer: as `build` and `build_tokenizer` make them.
        current_tokens: codes (B, s_k^2) of at least the first `scale_idx` scales.
        scale_idx: 0..K - 1; at 0 the batch size is that of the tokens, else of the labels, or 1.
        labels: (B,) or None for no class.

    Raises:
        ValueError: a scale out of range, too few tokens, or a label out of range.
    """
    owner = tokenizer[0] if isinstance(tokenizer, tuple) else tokenizer
    whole = owner if isinstance(owner, VQVAE) else owner.tokenizer
    check_fit(model, whole)
    quantizer, schedule = whole.quantizer, model.schedule
    if not 0 <= scale_idx < schedule.num_scales:
        raise ValueError(
            f"scale_idx: expected 0..{schedule.num_scales - 1} for {schedule}, got {scale_idx}"
        )
    known = list(current_tokens[:scale_idx])
    if len(known) < scale_idx:
        raise ValueError(
            f"current_tokens: scale {scale_idx} needs the {scale_idx} coarser scales, got "
            f"{len(known)}"
        )
    if known:
        inputs = quantizer.teacher_forcing_input(known)
    else:
        given = current_tokens[0] if len(current_tokens) else labels
        batch_size = 1 if given is None else len(given)
        inputs = torch.zeros(batch_size, 0, quantizer.code_dim, device=model.position.device)
    return model(inputs, labels)[:, schedule.slices[scale_idx]]
