"""A training step of the tokenizer, ours beside the plain way; `benchmarks.tokenizer` runs it.

A step is forward, backward, clipping and AdamW of the tokenizer, and with a PatchGAN of both
networks. Ours lets the discriminator learn from the reconstructions that the tokenizer's step has
made; the plain way makes them again, from the weights after that step. The adaptive weight of ours
is that of the batch before; so the gradients are compared on one batch, seen twice. They are
compared in float32: in bf16 features choose other codes, and of ours the loss alone is near.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

from benchmarks.baseline import PlainPatchGAN, PlainTokenizer, PlainTokenizerTraining
from benchmarks.harness import Candidate, Unequal, check_close, in_precision, kept
from benchmarks.limits import Work, counted, fewest_bytes
from var_exp.tokenizer import VQVAE
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.discriminator import PatchGAN
from var_exp.tokenizer.losses import ReconstructionLoss
from var_exp.training.fsdp import clip_gradients
from var_exp.training.optim import param_groups

RATES = {"lr": 3e-4, "betas": (0.5, 0.9)}  # vaex, for both networks
CLIP, WEIGHT = 1.0, 0.4
PIXELS = {"l1": 0.2, "l2": 1.0}
PATCHGAN = {"width": 64, "num_layers": 3}
CLOSE = (1e-4, 1e-3)  # relative differences of losses and of gradients in float32
# A discriminator's gradient jumps where its leaky ReLUs bend, so that rounding shows in it.
WITH_KINKS = (1e-3, 5e-2)
IN_BF16 = 0.1  # of losses
ADAMW_BYTES = 28  # a parameter: weight and two moments read and written, the gradient read
STEPS = {"training step": False, "training step with a discriminator": True}


class OurTokenizerTraining:
    """What `TokenizerModule` does in a step, without Lightning around it."""

    def __init__(
        self, tokenizer: VQVAE, adversary: AdversarialLoss | None, precision: str = "fp32"
    ):
        self.tokenizer, self.adversary, self.precision = tokenizer.train(), adversary, precision
        self.loss = ReconstructionLoss(**PIXELS)
        networks = [n for n in (tokenizer, self.discriminator) if n is not None]
        self.optimizers = {n: torch.optim.AdamW(param_groups(n, 0.0), **RATES) for n in networks}

    @property
    def discriminator(self) -> nn.Module | None:
        return self.adversary and self.adversary.discriminator

    def training_step(self, images: Tensor) -> Tensor:
        loss, reconstructed = self.gradients(images)
        self.step(self.tokenizer)
        if self.adversary is not None:
            self.discriminator_gradients(images, reconstructed)
            self.step(self.discriminator)
        return loss

    def step(self, network: nn.Module) -> None:
        clip_gradients(list(network.parameters()), CLIP)
        self.optimizers[network].step()
        self.optimizers[network].zero_grad()

    def gradients(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokenizer; its loss, and the reconstructions."""
        if self.adversary is not None:
            self.adversary.requires_grad_(False)
        with in_precision(self.precision, images.device):
            output = self.tokenizer(images)
            loss = self.loss(output, images)["loss"]
            if self.adversary is not None:
                adversarial = self.adversary.generator_loss(output.images)
                self.adversary.measure(loss, adversarial, self.tokenizer.decoder.conv_out.weight)
                loss = loss + self.adversary.generator_weight(1.0) * adversarial
        loss.backward()
        return loss.detach(), output.images.detach()

    def discriminator_gradients(self, images: Tensor, reconstructed: Tensor) -> Tensor:
        self.adversary.requires_grad_(True)
        with in_precision(self.precision, images.device):
            loss = self.adversary.discriminator_loss(images, reconstructed)["loss"]
        loss.backward()
        self.adversary.finish_batch()
        return loss.detach()


def pair(
    tokenizer: VQVAE, args: argparse.Namespace, adversarial: bool
) -> tuple[PlainTokenizerTraining, OurTokenizerTraining]:
    """The plain way and ours, with copies of the same weights, both in float32."""
    ours = copy.deepcopy(tokenizer).requires_grad_(True)
    plain = PlainTokenizer(tokenizer).to(args.device)
    judge = adversary = None
    if adversarial:
        torch.manual_seed(args.seed)
        adversary = AdversarialLoss(PatchGAN(**PATCHGAN), weight=WEIGHT).to(args.device)
        judge = PlainPatchGAN(**PATCHGAN).to(args.device)
        judge.load_state_dict(adversary.discriminator.state_dict())
    return (
        PlainTokenizerTraining(plain, judge, **RATES, clip=CLIP, **PIXELS, weight=WEIGHT),
        OurTokenizerTraining(ours, adversary),
    )


def alike(plain: PlainTokenizer, tokenizer: VQVAE, images: Tensor) -> Tensor:
    """The images whose codes both choose alike; with others gradients differ by more than rounding.

    Raises:
        Unequal: there is none.
    """
    pairs = zip(plain.encode_plain(images), tokenizer.encode(images), strict=True)
    same = torch.stack([(a == b).all(dim=1) for a, b in pairs]).all(dim=0)  # (B,)
    if not same.any():
        raise Unequal(f"training: none of {len(images)} images has the same codes")
    return images[same]


def gradient(network: nn.Module) -> Tensor:
    """All of a network's gradients in one row, in the order of the plain names; forgotten then."""
    found = {n.replace("codebooks.0.", ""): p.grad for n, p in network.named_parameters()}
    network.zero_grad()
    return torch.cat([found[name].flatten() for name in sorted(found)])


def check(
    plain: PlainTokenizerTraining, ours: OurTokenizerTraining, images: Tensor
) -> dict[str, float]:
    """How far losses and gradients differ, relatively; without a discriminator, or of both.

    Raises:
        Unequal: by too much for a ratio.
    """
    images = alike(plain.tokenizer, ours.tokenizer, images)
    adversarial = ours.adversary is not None
    if adversarial:  # measure the adaptive weight, which counts from the next batch on
        ours.discriminator_gradients(images, ours.gradients(images)[1])
        for network in ours.optimizers:
            network.zero_grad()
    loss, reconstructed = ours.gradients(images)
    losses = [(plain.gradients(images), loss)]
    if adversarial:
        judged = plain.discriminator_gradients(images)
        losses.append((judged, ours.discriminator_gradients(images, reconstructed)))
    names = ["deceiving tokenizer", "discriminator"] if adversarial else ["tokenizer"]
    same, close = WITH_KINKS if adversarial else CLOSE
    found: dict[str, float] = {}
    rows = zip(names, losses, plain.optimizers, ours.optimizers, strict=True)
    for name, values, *networks in rows:
        for what, pair_, limit in (
            ("loss", values, same),
            ("gradient", map(gradient, networks), close),
        ):
            what = f"{what} of the {name}"
            found[f"difference of the {what}"] = check_close(what, *pair_, limit)
    return found | {f"images in training, {names[0]}": len(images)}


def candidates_of(
    tokenizer: VQVAE, images: Tensor, args: argparse.Namespace
) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Ways to do each step in `STEPS`, and the checks passed before."""
    found, checks = {}, {}
    for name, adversarial in STEPS.items():
        plain, ours = pair(tokenizer, args, adversarial)
        checks |= check(plain, ours, images)
        ours.precision = args.precision
        if args.precision != "fp32":
            losses = plain.gradients(images), ours.gradients(images)[0]
            checks[f"difference of the loss, {name}, {args.precision}"] = check_close(
                f"loss of the {name}", *losses, IN_BF16
            )
        runs = [lambda p=plain: p.training_step_plain(images)]
        runs += [lambda o=ours: o.training_step(images)]
        networks = list(ours.optimizers)
        bytes_ = fewest_bytes(networks, images, passes=2, per_parameter=ADAMW_BYTES)
        work = Work(min(counted(run)[0] for run in runs), bytes_)
        candidates = [
            Candidate("plain, fp32", runs[0], "fp32", work),
            Candidate(f"ours, {args.precision}", runs[1], args.precision, work),
        ]
        candidates += [kept(candidate) for candidate in candidates]
        found[name] = candidates
    return found, checks
