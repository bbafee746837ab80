"""How long a training step of the transformer takes: ours against the plain way.

    python -m benchmarks.training --precision fp32
    python -m benchmarks.training --precision bf16 --compile

A step is forward, backward, clipping and AdamW. It is taken from codes that are at hand, and with
where codes come from: the plain way encodes images at every step, as the published code does; ours
does so too, and reads a token cache of CACHED images, whose reading is timed by itself as well. The
plain way always computes in float32. Before anything is timed, loss and gradients must agree, and
the losses of the next steps. Writes `benchmarks/results/training_<precision>.json`, with
`--compile` `training_<precision>_compiled.json`, and prints the table.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.baseline import PlainTokenizer, PlainTraining, PlainTransformer
from benchmarks.harness import Candidate, check_close, in_precision, kept
from benchmarks.limits import Work, counted, fewest_bytes
from benchmarks.networks import draw_codes, draw_images, draw_labels, make_networks
from var_exp.data.sampler import GlobalBatchSampler
from var_exp.data.tokens.cache import ROWS, TokenCache
from var_exp.data.tokens.dataset import TrainCodes
from var_exp.ops.attention import AUTO, BACKENDS
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE
from var_exp.training.fsdp import clip_gradients
from var_exp.training.optim import param_groups
from var_exp.training.var_module import token_losses
from var_exp.transformer import VAR
from var_exp.transformer.var import ExecutionOptions, call_block

RATES = {"lr": 1e-4, "weight_decay": 0.05, "betas": (0.9, 0.95)}  # as published
CLIP = 2.0
SAME, CLOSE = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 1e-3, "bf16": 0.1}  # of losses, gradients
CACHED = 20_000  # images in the cache that is read
ADAMW_BYTES = 28  # a parameter: weight and two moments read and written, the gradient read


class OurTraining:
    """What `VARModule` does in a step, without Lightning around it."""

    def __init__(
        self, transformer: VAR, tokenizer: VQVAE, precision: str, attention: str, compiled: bool
    ):
        call = torch.compile(call_block, dynamic=False) if compiled else call_block
        transformer.execution = ExecutionOptions(attention, call=call)
        self.transformer, self.tokenizer = transformer.train(), tokenizer
        self.precision = precision
        rates = dict(RATES)
        groups = param_groups(transformer, rates.pop("weight_decay"))
        self.optimizer = torch.optim.AdamW(groups, fused=True, **rates)

    def step_from_images(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.step_from_codes(self.tokenizer.encode(images), labels)

    def step_from_codes(self, indices: list[Tensor], labels: Tensor) -> Tensor:
        loss = self.gradients(indices, labels)
        clip_gradients(list(self.transformer.parameters()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, indices: list[Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            inputs = self.tokenizer.quantizer.teacher_forcing_input(indices)
        with in_precision(self.precision, labels.device):
            logits = self.transformer(inputs, labels)
            loss = token_losses(logits, torch.cat(indices, dim=1)).mean()
        loss.backward()
        return loss.detach()


def pair(args: argparse.Namespace) -> tuple[PlainTraining, OurTraining]:
    """The plain way and ours, with the same weights."""
    transformer, tokenizer = make_networks(args)
    plain = PlainTransformer(transformer).to(args.device), PlainTokenizer(tokenizer).to(args.device)
    return (
        PlainTraining(*plain, **RATES, clip=CLIP),
        OurTraining(transformer, tokenizer, args.precision, args.attention, args.compile),
    )


def make_cache(args: argparse.Namespace, tokenizer: VQVAE, folder: Path) -> TokenCache:
    """A cache of drawn codes, in as many files as a real one of that size."""
    key = {
        "tokenizer": tokenizer.fingerprint(),
        "patch_nums": tokenizer.schedule.patch_nums,
        "vocab_size": tokenizer.quantizer.vocab_size,
        "num_train": CACHED,
        "num_val": 0,
        "rows": ROWS,
    }
    cache, generator = TokenCache(folder, key), np.random.default_rng(args.seed)
    cache.begin()
    for part in cache.parts():
        codes = generator.integers(0, key["vocab_size"], (part.rows, cache.length))
        cache.write(part, codes, generator.integers(0, 1000, part.rows))
    cache.finish()
    return cache


def batches_of(cache: TokenCache, batch_size: int, seed: int) -> Iterator[list[torch.Tensor]]:
    """Codes of batches at random, (B, n_k) for each scale, as training reads them."""
    items = TrainCodes(cache, stride=0)
    schedule = ScaleSchedule(cache.key["patch_nums"])
    for keys in GlobalBatchSampler(CACHED, batch_size, num_batches=10**9, seed=seed):
        yield schedule.split(items.__getitems__(keys).codes)


def check(plain: PlainTraining, ours: OurTraining, indices: list[Tensor], labels: Tensor) -> dict:
    """How far loss, gradients and the losses of three steps differ, relatively.

    Raises:
        Unequal: by too much for a ratio.
    """
    precision = ours.precision
    losses = [training.gradients(indices, labels) for training in (plain, ours)]
    found = {"difference of the loss": check_close("loss", *losses, SAME[precision])}
    gradients = dict(plain.transformer.named_parameters())
    pairs = [(gradients[n].grad, p.grad) for n, p in ours.transformer.named_parameters()]
    whole = [torch.cat([grad.flatten() for grad in side]) for side in zip(*pairs, strict=True)]
    found["difference of the gradient"] = check_close("gradient", *whole, CLOSE[precision])
    steps = []
    for training in (plain, ours):
        training.optimizer.zero_grad()
        steps.append(torch.stack([training.step_from_codes(indices, labels) for _ in range(3)]))
    found["difference of the losses of three steps"] = check_close(
        "losses of three steps", *steps, SAME[precision]
    )
    return found


def main(arguments: list[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(harness.parse(__doc__.splitlines()[0], arguments, add_arguments), Path(folder))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", choices=[AUTO, *BACKENDS], default=AUTO, help="of ours")
    parser.add_argument("--compile", action="store_true", help="the blocks of ours")


def measure(args: argparse.Namespace, folder: Path) -> None:
    plain, ours = pair(args)
    codes, images, labels = draw_codes(args), draw_images(args), draw_labels(args)
    checks = check(plain, ours, codes, labels)
    from_codes = (
        lambda: plain.step_from_codes(codes, labels),
        lambda: ours.step_from_codes(codes, labels),
    )
    read = batches_of(make_cache(args, ours.tokenizer, folder), args.batch, args.seed)
    from_images = (
        lambda: plain.training_step_plain(images, labels),
        lambda: ours.step_from_images(images, labels),
    )
    name, precision = f"ours, {args.precision}", args.precision
    bytes_ = fewest_bytes([ours.transformer], *codes, passes=2, per_parameter=ADAMW_BYTES)
    work = Work(min(counted(run)[0] for run in from_codes), bytes_)
    step = [
        Candidate("plain, fp32", from_codes[0], "fp32", work),
        Candidate(name, from_codes[1], precision, work),
    ]
    step += [kept(candidate) for candidate in step]
    with_codes = [
        Candidate("plain, fp32, from images", from_images[0], "fp32"),
        Candidate(f"{name}, from images", from_images[1], precision),
        Candidate(f"{name}, cache", lambda: ours.step_from_codes(next(read), labels), precision),
    ]
    with_codes.append(kept(with_codes[-1]))
    reading = [
        Candidate(f"{name}, a step", from_codes[1], precision),
        Candidate("reading its codes", lambda: next(read), precision),
    ]
    works = {
        "training step": step,
        "training step with its codes": with_codes,
        "codes of a training step": reading,
    }
    found = harness.compare(works, args)
    suffix = "_compiled" if args.compile else ""
    harness.conclude(f"training_{precision}{suffix}", args, found, checks)


if __name__ == "__main__":
    main()
