"""Stage one computes nothing twice that it has: passes are counted, and the slow way agrees."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from helpers.stages import NUM_BATCHES, assert_equal, run, weights
from tests.tokenizer.test_dino import published_state
from var_exp.io.pretrained import Frozen
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.discriminator import DinoDiscriminator, PatchGAN
from var_exp.tokenizer.losses import ReconstructionLoss
from var_exp.tokenizer.lpips import DEPTHS, Distance
from var_exp.training import TokenizerModule

SETS_IN = 4  # the number of the first batch with an adversary, counted from 1
PARTS = (4, 2)  # images of the micro-batches of a batch of six


class Perceptual(nn.Module):
    """LPIPS over features of two channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        layers = [nn.Conv2d(3, 2, 1), *(nn.Conv2d(2, 2, 1) for _ in range(DEPTHS[-1]))]
        distance = Distance(nn.Sequential(*layers), [torch.rand(2, 1, 1) for _ in DEPTHS])
        self.network = Frozen(distance)

    def forward(self, a, b):
        return self.network(a, b)


class Passes(Callback):
    """What went forward through some modules in each batch: (images, whether with a gradient)."""

    def __init__(self, **modules):
        self.now, self.seen = {}, {}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda _, args, name=name: self.note(name, args[0]))

    def setup(self, trainer, module, stage):
        if not self.seen:
            for name in ("encoder", "quantizer", "decoder"):
                part = module.tokenizer.get_submodule(name)
                part.register_forward_pre_hook(lambda _, args, name=name: self.note(name, args[0]))

    def note(self, name, images):
        self.now.setdefault(name, []).append((len(images), images.requires_grad))

    def on_train_batch_start(self, trainer, module, batch, i):
        self.now = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[module.batch + 1], self.now = self.now, {}  # a validation may follow


def make_discriminator(name, folder):
    torch.manual_seed(1)
    if name == "patchgan":
        return PatchGAN(width=8, num_layers=2)
    torch.save(published_state(), folder / "dino.pth")
    return DinoDiscriminator(folder / "dino.pth", image_size=16, depths=(0, 2), kernel_size=5)


def options(discriminator, **changes):
    """Of a run with everything that stage one can have, in micro-batches."""
    return {
        "adversary": AdversarialLoss(discriminator, start=2, ramp=2, lecam=0.01),
        "loss": ReconstructionLoss(lpips=0.5, perceptual=Perceptual()),
        "micro_batch_size": PARTS[0],
    } | changes


@pytest.mark.parametrize("name", ["patchgan", "dino"])
def test_each_network_sees_each_micro_batch_once(name, digits, tmp_path):
    discriminator = make_discriminator(name, tmp_path)
    given = options(discriminator)
    looking = {"perceptual": given["loss"].perceptual.network.network.features[0]}
    looking["discriminator"] = discriminator
    if name == "dino":
        looking["dino"] = discriminator.features.network
    passes = Passes(**looking)
    run("tokenizer", digits, tmp_path, passes, **given)
    assert sorted(passes.seen) == list(range(1, NUM_BATCHES + 1))
    for batch, seen in passes.seen.items():
        for part in ("encoder", "quantizer", "decoder"):
            assert [images for images, _ in seen[part]] == list(PARTS)
        # Reconstructions and images apart: of images no graph is kept, and nothing goes back.
        expected = [(n, fake) for n in PARTS for fake in (True, False)]
        assert seen["perceptual"] == expected
        # The tokenizer asks what its reconstructions look like; then the discriminator learns from
        # them and the images together.
        turns = [(n, True) for n in PARTS] + [(2 * n, False) for n in PARTS]
        for network in set(looking) - {"perceptual"}:
            assert seen.get(network, []) == (turns if batch >= SETS_IN else [])


def test_reconstructions_that_are_kept_are_those_that_would_be_made_again(
    digits, tmp_path, monkeypatch
):
    # A codebook that learned in the second pass too would be another one.
    given = {"freeze": ["codebook"], "quantizer_dropout": 0.0}
    ours = options(make_discriminator("patchgan", tmp_path), **given)
    _, losses = run("tokenizer", digits, tmp_path / "ours", **ours)
    descend = TokenizerModule.generator_step

    def descend_and_rebuild(self, optimizer, parts):
        _, terms = descend(self, optimizer, parts)
        with torch.no_grad():
            return [self.tokenizer(images).images for images in parts], terms

    monkeypatch.setattr(TokenizerModule, "generator_step", descend_and_rebuild)
    slow = options(make_discriminator("patchgan", tmp_path), **given)
    _, slow_losses = run("tokenizer", digits, tmp_path / "slow", **slow)
    assert losses == slow_losses and len(losses) == NUM_BATCHES
    assert_equal(weights(tmp_path / "ours", "tokenizer"), weights(tmp_path / "slow", "tokenizer"))
