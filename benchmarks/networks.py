"""Networks of the published form and any size, with seeded weights that make every part matter.

Fresh transformers have gates near zero and logits that hardly differ, which would hide mistakes
from the checks that come before a ratio; so their parameters are drawn anew.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from var_exp.checkpoint.official.sizes import SCHEDULES
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE, Codebook, Decoder, Encoder, MultiScaleQuantizer
from var_exp.transformer import VAR

STRIDE = 16  # of the published tokenizer: pixels of a side for each place of the latent grid
VOCAB_SIZE, CODE_DIM = 4096, 32


def schedule_for(image_size: int) -> ScaleSchedule:
    """The published schedule of that size; else that of 256 pixels, cut and ended by the grid's.

    Raises:
        ValueError: a size that the stride does not divide, or above 256 without a schedule.
    """
    side, rest = divmod(image_size, STRIDE)
    for schedule in SCHEDULES:
        if schedule.latent_size == (side, side):
            return schedule
    if rest or not 0 < side < 16:
        raise ValueError(
            f"benchmarks: expected 256, 512, 1024 or a smaller multiple of {STRIDE} pixels, got "
            f"{image_size} (--image-size)"
        )
    return ScaleSchedule([p for p in SCHEDULES[0].patch_nums if p < side] + [side])


def make_networks(
    args: argparse.Namespace, patch_nums: Sequence[int] | None = None
) -> tuple[VAR, VQVAE]:
    """A transformer of the depth and a tokenizer of the width that the arguments ask for.

    Args:
        patch_nums: the schedule; that of the image size unless given.
    """
    torch.manual_seed(args.seed)
    patch_nums = patch_nums or schedule_for(args.image_size).patch_nums
    transformer = VAR(patch_nums, VOCAB_SIZE, CODE_DIM, depth=args.depth)
    sizes = {"code_dim": CODE_DIM, "width": args.tokenizer_width}
    quantizer = MultiScaleQuantizer(patch_nums, Codebook(VOCAB_SIZE, CODE_DIM))
    tokenizer = VQVAE(Encoder(**sizes), quantizer, Decoder(**sizes))
    stir(transformer)
    for network in (transformer, tokenizer):
        network.eval().to(args.device)
    return transformer, tokenizer.requires_grad_(False)


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Matrices of unit gain, and everything else moved a little from its start."""
    for parameter in network.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim == 2:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)


def draw_images(args: argparse.Namespace) -> Tensor:
    """Smooth noise (B, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(args.seed)
    coarse = torch.randn(args.batch, 3, 8, 8, generator=generator)
    images = nn.functional.interpolate(coarse, size=(args.image_size,) * 2, mode="bicubic")
    return images.tanh().to(args.device)


def draw_labels(args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(1000, (args.batch,), generator=generator).to(args.device)


def draw_codes(args: argparse.Namespace) -> list[Tensor]:
    """Uniform codes of all scales, K tensors (B, n_k)."""
    generator = torch.Generator().manual_seed(args.seed)
    counts = schedule_for(args.image_size).num_tokens
    shapes = [(args.batch, n) for n in counts]
    return [torch.randint(VOCAB_SIZE, s, generator=generator).to(args.device) for s in shapes]
