"""How long whole images take: ours against the plain way, from labels to pixels.

    python -m benchmarks.sampling --precision fp32
    python -m benchmarks.sampling --precision bf16 --compile

The plain way always computes in float32. Settings are those of the published scores (guidance 1.5,
top-k 900, top-p 0.96). Before anything is timed, the same seed must give the same codes, and the
same codes the same images; in bf16, which draws others, the logits and the images of given codes
must come close to those of float32. A code may differ where its uniform number lies on the border
of two codes to within rounding; from there on that sample is another one. Writes
`benchmarks/results/sampling_<precision>.json`, with `--compile`
`sampling_<precision>_compiled.json`, and prints the table.
"""

import argparse
import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.baseline import PlainTokenizer, PlainTransformer, sampling_plain
from benchmarks.baseline.sampling import PlainSamples
from benchmarks.harness import Candidate, Unequal, check_close, in_precision, kept
from benchmarks.limits import PRECISIONS, Work, counted, fewest_bytes
from benchmarks.networks import draw_labels, make_networks
from var_exp.sampling.compile import compile_for_sampling
from var_exp.sampling.generate import Samples, draw_uniforms, evaluating, generate, guided_logits
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

FILTER = {"top_k": 900, "top_p": 0.96}
CFG_SCALE = 1.5
Networks = tuple[VAR, VQVAE]
BORDER = 5e-4  # share of the mass within which a uniform number lies on a border, under top-p too
SAME, CLOSE = 1e-4, 5e-2  # relative differences, float32 and bf16
PSNR = 40.0  # dB, of bf16 images


class Sampler:
    """Ours and the plain way, with the same weights, labels and uniform numbers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.networks = transformer, tokenizer = make_networks(args)
        self.plain = PlainTransformer(transformer), PlainTokenizer(tokenizer)
        for network in self.plain:
            network.eval().to(args.device)
        self.labels = draw_labels(args)
        numbers = draw_uniforms(args.seed, range(args.batch), transformer.schedule.seq_len)
        self.uniforms = torch.from_numpy(numbers).float().to(args.device)

    def run_plain(self) -> PlainSamples:
        return sampling_plain(*self.plain, self.labels, self.uniforms, CFG_SCALE, **FILTER)

    def run_ours(self, networks: Networks, precision: str) -> Samples:
        with in_precision(precision, self.args.device):
            return generate(
                *networks,
                self.labels,
                cfg_scale=CFG_SCALE,
                seed=self.args.seed,
                return_indices=True,
                **FILTER,
            )

    def forced_logits(self, networks: Networks, indices: list[Tensor], precision: str) -> Tensor:
        """Guided logits (B, L, V) of ours where these codes are drawn."""
        given: list[Tensor] = []
        found = []
        with torch.inference_mode(), evaluating(*networks):
            with in_precision(precision, self.args.device):
                steps = guided_logits(*networks, self.labels, CFG_SCALE, given)
                for k, logits in steps:
                    found.append(logits.float())
                    given.append(indices[k])
        return torch.cat(found, dim=1)

    @torch.inference_mode()
    def decoded(self, networks: Networks, indices: list[Tensor], precision: str) -> Tensor:
        """Images of ours in [0, 1]."""
        with in_precision(precision, self.args.device):
            return (networks[1].decode(indices) + 1) / 2

    def compiled(self) -> Networks:
        """The same networks, which sample by compiled code."""
        networks = copy.deepcopy(self.networks)
        compile_for_sampling(*networks)
        return networks


def same_codes(plain: PlainSamples, ours: Samples, uniforms: Tensor) -> Tensor:
    """Which samples have all codes alike: (B,) bool; the others differ by rounding alone.

    Raises:
        Unequal: codes differ that rounding does not explain.
    """
    alike = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)
    first = 0
    for k, (a, b, mass) in enumerate(zip(plain.indices, ours.indices, plain.masses, strict=True)):
        target = uniforms[:, first : first + a.shape[1]] * mass[..., -1]  # (B, n_k)
        first += a.shape[1]
        lower = torch.minimum(a, b)
        before = (torch.maximum(a, b) - 1).clamp_min(0)  # of what is before the upper one
        borders = [mass.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (lower, before)]
        away = torch.stack([(border - target).abs() for border in borders]).amax(dim=0)
        wrong = alike.unsqueeze(1) & (a != b) & (away > BORDER)
        if wrong.any():
            raise Unequal(
                f"sampling: {int(wrong.sum())} codes of scale {k} differ, not by rounding"
            )
        alike &= (a == b).all(dim=1)
    return alike


def check(
    sampler: Sampler, networks: Networks, plain: PlainSamples, ours: Samples, precision: str
) -> dict[str, Any]:
    """What ours in float32 and the plain way have in common, and ours in the precision.

    Raises:
        Unequal: it is too little for a ratio.
    """
    alike = same_codes(plain, ours, sampler.uniforms)
    found: dict[str, Any] = {"samples with the same codes in float32": int(alike.sum())}
    found["of samples"] = len(alike)
    if alike.any():
        found["difference of their images in float32"] = check_close(
            "images", plain.images[alike], ours.images[alike], SAME
        )
    decoded = sampler.decoded(networks, plain.indices, precision)
    if precision == "fp32":
        found["difference of images of the same codes"] = check_close(
            "images", plain.images, decoded, SAME
        )
        return found
    error = (plain.images - decoded).square().mean()
    found["PSNR of images of the same codes, dB"] = psnr = -10 * math.log10(float(error))
    if psnr < PSNR:
        raise Unequal(f"sampling: images of the same codes are {psnr:.1f} dB alike, below {PSNR}")
    logits = [
        sampler.forced_logits(pair, plain.indices, p)
        for pair, p in ((sampler.networks, "fp32"), (networks, precision))
    ]
    found["difference of logits of the same codes"] = check_close("logits", *logits, CLOSE)
    return found


def fewest_bytes_of(sampler: Sampler, images: Tensor) -> dict[str, float]:
    """The transformer is read at each scale, the decoder once."""
    transformer, tokenizer = sampler.networks
    drawing = fewest_bytes([transformer], passes=transformer.schedule.num_scales)
    decoding = fewest_bytes([tokenizer.decoder], images)
    return {precision: drawing[precision] + decoding[precision] for precision in PRECISIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="measure ours compiled, too")


def main(arguments: list[str] | None = None) -> None:
    args = harness.parse(__doc__.splitlines()[0], arguments, add_arguments)
    sampler, precision = Sampler(args), args.precision
    theirs, plain = counted(sampler.run_plain)
    others, ours = counted(lambda: sampler.run_ours(sampler.networks, "fp32"))
    checks = check(sampler, sampler.networks, plain, ours, precision)
    work = Work(min(theirs, others), fewest_bytes_of(sampler, plain.images))
    run = functools.partial(sampler.run_ours, sampler.networks, precision)
    candidates = [
        Candidate("plain, fp32", sampler.run_plain, "fp32", work),
        Candidate(f"ours, {precision}", run, precision, work),
    ]
    candidates += [kept(candidate) for candidate in candidates]
    if args.compile:
        compiled = sampler.compiled()
        ours = sampler.run_ours(compiled, "fp32")
        of_compiled = check(sampler, compiled, plain, ours, precision)
        checks |= {f"{name}, compiled": value for name, value in of_compiled.items()}
        run = functools.partial(sampler.run_ours, compiled, precision)
        candidates.append(kept(Candidate(f"ours, {precision}, compiled", run, precision, work)))
    found = harness.compare({"sampling": candidates}, args)
    suffix = "_compiled" if args.compile else ""
    harness.conclude(f"sampling_{precision}{suffix}", args, found, checks)


if __name__ == "__main__":
    main()
