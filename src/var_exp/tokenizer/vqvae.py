"""The multi-scale VQ tokenizer: images to token maps and back.

VAR (arXiv 2404.02905, section 3.2): a VQGAN autoencoder around the multi-scale residual
quantizer. Frozen, it makes the tokens that the next-scale transformer predicts.

    B batch, K scales, (h_k, w_k) sides of scale k, D code dimension, images (B, C, H, W) in [-1, 1]
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from var_exp.configurable import register_config
from var_exp.io.fingerprint import fingerprint
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer.autoencoder import Decoder, Encoder
from var_exp.tokenizer.quantizer import MultiScaleQuantizer


class Reconstruction(NamedTuple):
    """images: (B, C, H, W), not clamped; indices: K tensors (B, h_k * w_k); loss: scalar."""

    images: Tensor
    indices: list[Tensor]
    loss: Tensor


@register_config
class VQVAE(nn.Module):
    """Encoder, multi-scale quantizer, decoder.

    Args:
        encoder, quantizer, decoder: the parts; their code dimensions must agree.

    Raises:
        ValueError: the parts disagree on the code dimension or the stride.
    """

    config: dict[str, Any]

    def __init__(self, encoder: Encoder, quantizer: MultiScaleQuantizer, decoder: Decoder):
        super().__init__()
        dims = encoder.conv_out.out_channels, quantizer.code_dim, decoder.conv_in.in_channels
        if len(set(dims)) > 1:
            raise ValueError(
                f"tokenizer: encoder, quantizer and decoder must have one code_dim, got {dims} "
                f"(tokenizer.*.code_dim)"
            )
        if encoder.stride != decoder.stride:
            raise ValueError(
                f"tokenizer: encoder and decoder must have one stride, got {encoder.stride} and "
                f"{decoder.stride} (tokenizer.*.patch_size, tokenizer.*.multipliers)"
            )
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        d = quantizer.code_dim
        self.quant_conv = nn.Conv2d(d, d, kernel_size=3, padding=1)
        self.post_quant_conv = nn.Conv2d(d, d, kernel_size=3, padding=1)

    @property
    def schedule(self) -> ScaleSchedule:
        return self.quantizer.schedule

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the schedule's last scale stands for, in pixels."""
        h, w = self.schedule.latent_size
        return h * self.encoder.stride, w * self.encoder.stride

    @property
    def channels(self) -> int:
        return self.encoder.in_channels

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> what the quantizer reads: (B, D, h, w)."""
        return self.quant_conv(self.encoder(images))

    def to_images(self, f_hat: Tensor) -> Tensor:
        """(B, D, h, w) -> images (B, C, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat))

    def forward(self, images: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.features(images))
        return Reconstruction(self.to_images(quantized.f_hat), quantized.indices, quantized.loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> K tensors of codes (B, h_k * w_k) int64.

        In full precision under autocast too, as the published training does: another rounding is
        another code.

        Raises:
            ValueError: images of another size or number of channels.
        """
        expected = (self.channels, *self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"tokenizer: expected images of (C, H, W) = {expected}, got "
                f"{tuple(images.shape[1:])} (data.image_size, scales.patch_nums)"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.encode(self.features(images))

    @overload
    def decode(self, indices: Sequence[Tensor], per_scale: Literal[False] = False) -> Tensor: ...

    @overload
    def decode(self, indices: Sequence[Tensor], per_scale: Literal[True]) -> list[Tensor]: ...

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor], per_scale: bool = False) -> Tensor | list[Tensor]:
        """Codes of the first n scales -> images (B, C, H, W) in [-1, 1].

        With `per_scale` a list of n images each: what is decoded after each scale.
        """
        sums = list(self.quantizer.partial_sums(indices))
        decoded = sums if per_scale else sums[-1:]
        images = [self.to_images(f_hat).float().clamp(-1, 1) for f_hat in decoded]
        return images if per_scale else images[0]

    def fingerprint(self) -> str:
        """16 hex digits that change with any weight, the schedule, or the rule of quantizing."""
        quantizer = self.quantizer
        rule = (self.schedule.patch_nums, quantizer.codebook(0).rule, quantizer.phi_ratio)
        return fingerprint(
            repr(rule), ((name, x.float()) for name, x in sorted(self.named_parameters()))
        )
