"""A training step of the tokenizer, plainly, alone or against a discriminator, all in float32.

VQGAN (Esser et al., arXiv 2012.09841, section 3.1). As in its published code each network's step
runs the tokenizer: the discriminator's asks it for new reconstructions, and judges images and
reconstructions one after the other. The perceptual loss is left out: its weights are a download.

B batch, N places that the discriminator judges, images (B, C, H, W) in [-1, 1]
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline.autoencoder import norm
from benchmarks.baseline.tokenizer import PlainTokenizer


class PlainPatchGAN(nn.Module):
    """The discriminator of pix2pix (arXiv 1611.07004), with GroupNorm: images -> logits (B, N)."""

    def __init__(self, width: int, num_layers: int):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, num_layers + 1):
            after, stride = width * min(2**i, 8), 2 if i < num_layers else 1
            layers += [nn.Conv2d(before, after, 4, stride, padding=1), norm(after)]
            layers += [nn.LeakyReLU(0.2)]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class PlainTokenizerTraining:
    """A tokenizer in training, and the discriminator that it has to adversarial_terms, or None.

    Args:
        lr, betas, clip: of AdamW, for both networks, and of the gradients' norms.
        l1, l2: weights of the pixels' errors.
        weight: of the adversarial term, times the ratio of the gradients at the last layer.
    """

    def __init__(
        self,
        tokenizer: PlainTokenizer,
        discriminator: PlainPatchGAN | None,
        lr: float,
        betas: tuple[float, float],
        clip: float,
        l1: float,
        l2: float,
        weight: float,
    ):
        self.tokenizer, self.discriminator, self.clip = tokenizer.train(), discriminator, clip
        self.l1, self.l2, self.weight = l1, l2, weight
        networks = [n for n in (tokenizer, discriminator) if n is not None]
        self.optimizers = {
            n: torch.optim.AdamW(n.parameters(), lr=lr, betas=betas, weight_decay=0.0)
            for n in networks
        }

    def training_step_plain(self, images: Tensor) -> Tensor:
        """One step of each network; the tokenizer's loss."""
        loss = self.gradients(images)
        self.step(self.tokenizer)
        if self.discriminator is not None:
            self.discriminator_gradients(images)
            self.step(self.discriminator)
        return loss

    def step(self, network: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        self.optimizers[network].step()
        self.optimizers[network].zero_grad()

    def gradients(self, images: Tensor) -> Tensor:
        """Of the tokenizer; its loss."""
        reconstructed, loss = self.tokenizer(images)
        loss = (
            loss
            + self.l1 * F.l1_loss(reconstructed, images)
            + self.l2 * F.mse_loss(reconstructed, images)
        )
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(reconstructed).mean()
            loss = loss + self.weight * self.ratio(loss, adversarial) * adversarial
        loss.backward()
        return loss.detach()

    def ratio(self, loss: Tensor, adversarial: Tensor) -> Tensor:
        """Equation 7 of VQGAN, clamped as in its code."""
        last = self.tokenizer.decoder.conv_out.weight
        ours, theirs = (
            torch.autograd.grad(term, last, retain_graph=True)[0].norm()
            for term in (loss, adversarial)
        )
        return (ours / (theirs + 1e-6)).clamp(0, 1e4).detach()

    def discriminator_gradients(self, images: Tensor) -> Tensor:
        """Of the discriminator, on reconstructions that are made for it; its hinge loss."""
        self.discriminator.requires_grad_(True)
        self.tokenizer.requires_grad_(False)
        reconstructed, _ = self.tokenizer(images)
        self.tokenizer.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstructed.detach())
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        loss.backward()
        return loss.detach()
