"""The published tokenizer, plainly: a convolutional autoencoder around a residual quantizer.

VQGAN's networks (Esser et al., arXiv 2012.09841) and the multi-scale quantizer of VAR (Tian et
al., arXiv 2404.02905, section 3.2, algorithms 1 and 2), with torch's own resizes.

    B batch, K scales, p_k side of scale k, D code dimension, (H, W) latent grid, V codes
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline.autoencoder import PlainDecoder, PlainEncoder
from var_exp.tokenizer import VQVAE


class PlainQuantizer(nn.Module):
    """One table of codes for all scales, searched by Euclidean distance; several phis."""

    def __init__(self, sizes: list[tuple[int, int]], vocab_size: int, code_dim: int, phis: int):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.zeros(vocab_size, code_dim))
        self.phis = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(phis))
        self.phi_of_scale: list[int] = []

    def encode(self, f: Tensor) -> list[Tensor]:
        """Features (B, D, H, W) -> K tensors of codes (B, h_k * w_k)."""
        residual, indices = f, []
        for k in range(len(self.sizes)):
            indices.append(self.nearest(self.down(residual, k)))
            residual = residual - self.up(indices[-1], k)
        return indices

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Vectors (B, n, D) -> the codes nearest to them (B, n)."""
        flat = vectors.reshape(-1, vectors.shape[-1])
        distances = flat.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        distances = distances - 2 * flat @ self.weight.T  # (B n, V)
        return distances.argmin(dim=1).view(len(vectors), -1)

    def quantize(self, f: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
        """Features (B, D, H, W) -> those of their codes, straight-through, and the loss."""
        residual, f_hat, loss = f.detach(), torch.zeros_like(f), f.new_zeros(())
        for k in range(len(self.sizes)):
            part = self.up(self.nearest(self.down(residual, k)), k)
            f_hat, residual = f_hat + part, residual - part.detach()
            loss = loss + beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
        return (f_hat - f).detach() + f, loss / len(self.sizes)

    def up(self, indices: Tensor, k: int) -> Tensor:
        """What the codes of scale k add to the reconstruction: (B, D, H, W)."""
        h = F.embedding(indices, self.weight).transpose(1, 2).unflatten(2, self.sizes[k])
        if self.sizes[k] != self.sizes[-1]:
            h = F.interpolate(h.contiguous(), size=self.sizes[-1], mode="bicubic")
        return h * 0.5 + self.phis[self.phi_of_scale[k]](h) * 0.5

    def down(self, f: Tensor, k: int) -> Tensor:
        """Area resize to scale k: (B, D, H, W) -> (B, h_k * w_k, D)."""
        if self.sizes[k] != self.sizes[-1]:
            f = F.interpolate(f, size=self.sizes[k], mode="area")
        return f.flatten(2).transpose(1, 2)

    def teacher_forcing_input(self, indices: list[Tensor]) -> Tensor:
        """What the transformer reads: codes of all scales -> (B, L - n_1, D)."""
        f_hat, inputs = 0.0, []
        for k in range(len(self.sizes) - 1):
            f_hat = f_hat + self.up(indices[k], k)
            inputs.append(self.down(f_hat, k + 1))
        return torch.cat(inputs, dim=1)


class PlainTokenizer(nn.Module):
    """The plain form of a `VQVAE`, with its weights.

    Args:
        ours: with attention, patch size 1, one `Codebook` searched by distance and phis of
            ratio 0.5, as published.
    """

    def __init__(self, ours: VQVAE):
        super().__init__()
        quantizer = ours.quantizer
        sizes = list(quantizer.schedule.sizes)
        self.encoder = PlainEncoder(ours.encoder.config)
        self.quantizer = PlainQuantizer(
            sizes, quantizer.vocab_size, quantizer.code_dim, len(quantizer.phis)
        )
        self.quantizer.phi_of_scale = list(quantizer.phi_of_scale)
        self.decoder = PlainDecoder(ours.decoder.config)
        dim = quantizer.code_dim
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(dim, dim, 3, padding=1) for _ in "ab")
        state = dict(ours.state_dict())
        state["quantizer.weight"] = state.pop("quantizer.codebooks.0.weight")
        state.pop("quantizer.started")  # says whether training has set the codes
        self.load_state_dict(state)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> reconstructions, not clamped, and the codes' loss."""
        f_hat, loss = self.quantizer.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(f_hat)), loss

    @torch.no_grad()
    def encode_plain(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> K tensors of codes (B, h_k * w_k)."""
        return self.quantizer.encode(self.quant_conv(self.encoder(images)))

    @torch.no_grad()
    def decode_plain(self, indices: list[Tensor]) -> Tensor:
        """Codes of all scales -> images (B, C, H, W) in [-1, 1]."""
        f_hat = sum(self.quantizer.up(codes, k) for k, codes in enumerate(indices))
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)
