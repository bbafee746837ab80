"""How long the tokenizer takes: encoding, decoding and training, ours against the plain way.

    python -m benchmarks.tokenizer --precision fp32
    python -m benchmarks.tokenizer --precision bf16

Codes are always made in float32, as they are for training, so `--precision` is of the decoder and
of the tokenizer's own training; the plain way always computes in float32. Before anything is timed,
images must have the same codes, but where two codes are equally near to within rounding, codes the
same images, and a training step the same loss and gradients (`benchmarks/tokenizer_training.py`).
Writes `benchmarks/results/tokenizer_<precision>.json`, and prints the table.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, tokenizer_training
from benchmarks.baseline import PlainTokenizer
from benchmarks.harness import Candidate, Unequal, check_close, in_precision, kept
from benchmarks.limits import Work, counted, fewest_bytes
from benchmarks.networks import draw_images, make_networks
from var_exp.tokenizer import VQVAE

SAME = 1e-4  # relative difference of images in float32
TIE = 1e-4  # of the squared distance: two codes are equally near
PSNR = 40.0  # dB, of bf16 images in [0, 1]


def check_codes(plain: PlainTokenizer, images: Tensor, theirs: list, ours: list) -> int:
    """How many images have the same codes at all scales; others differ by a tie alone.

    Raises:
        Unequal: codes differ that are not equally near.
    """
    quantizer = plain.quantizer
    with torch.no_grad():
        residual = plain.quant_conv(plain.encoder(images))
    alike = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for k, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        vectors = quantizer.down(residual, k)  # (B, n_k, D)
        near = [(vectors - quantizer.weight[i]).square().sum(-1) for i in (a, b)]
        tie = (near[0] - near[1]).abs() <= TIE * near[0]
        wrong = alike.unsqueeze(1) & (a != b) & ~tie
        if wrong.any():
            raise Unequal(f"encode: {int(wrong.sum())} codes of scale {k} differ, not by a tie")
        alike &= (a == b).all(dim=1)
        residual = residual - quantizer.up(a, k)
    return int(alike.sum())


def check(
    plain: PlainTokenizer, tokenizer: VQVAE, images: Tensor, precision: str
) -> tuple[dict[str, Any], list[Tensor]]:
    """What both have in common, and the plain way's codes.

    Raises:
        Unequal: it is too little for a ratio.
    """
    codes = plain.encode_plain(images)
    alike = check_codes(plain, images, codes, tokenizer.encode(images))
    found: dict[str, Any] = {"images with the same codes": alike, "of images": len(images)}
    theirs, ours = plain.decode_plain(codes), decode(tokenizer, codes, precision)
    if precision == "fp32":
        found["difference of decoded images"] = check_close("images", theirs, ours, SAME)
    else:
        psnr = -10 * math.log10(float(((theirs - ours) / 2).square().mean()))
        found["PSNR of decoded images, dB"] = psnr
        if psnr < PSNR:
            raise Unequal(f"decode: images are {psnr:.1f} dB alike, below {PSNR}")
    return found, codes


def decode(tokenizer: VQVAE, codes: list[Tensor], precision: str) -> Tensor:
    with torch.inference_mode(), in_precision(precision, codes[0].device):
        return tokenizer.decode(codes)


def candidates_of(
    plain: PlainTokenizer,
    tokenizer: VQVAE,
    images: Tensor,
    codes: list[Tensor],
    args: argparse.Namespace,
) -> dict[str, list[Candidate]]:
    """Ways to encode and to decode."""
    runs = {
        "encode": (lambda: plain.encode_plain(images), lambda: tokenizer.encode(images), "fp32"),
        "decode": (
            lambda: plain.decode_plain(codes),
            lambda: decode(tokenizer, codes, args.precision),
            args.precision,
        ),
    }
    parts = {"encode": tokenizer.encoder, "decode": tokenizer.decoder}
    found = {}
    for name, (theirs, ours, precision) in runs.items():
        operations = min(counted(run)[0] for run in (theirs, ours))
        work = Work(operations, fewest_bytes([parts[name]], images, *codes))
        candidates = [
            Candidate("plain, fp32", theirs, "fp32", work),
            Candidate(f"ours, {precision}", ours, precision, work),
        ]
        candidates += [kept(candidate) for candidate in candidates]
        found[name] = candidates
    return found


def main(arguments: list[str] | None = None) -> None:
    args = harness.parse(__doc__.splitlines()[0], arguments)
    _, tokenizer = make_networks(args)
    plain = PlainTokenizer(tokenizer).eval().to(args.device)
    images = draw_images(args)
    checks, codes = check(plain, tokenizer, images, args.precision)
    works = candidates_of(plain, tokenizer, images, codes, args)
    steps, checks_of_steps = tokenizer_training.candidates_of(tokenizer, images, args)
    found = harness.compare(works | steps, args)
    harness.conclude(f"tokenizer_{args.precision}", args, found, checks | checks_of_steps)


if __name__ == "__main__":
    main()
