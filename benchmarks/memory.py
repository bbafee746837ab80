"""What fits: images that a GPU takes at once in stage two, for the paper's sizes.

    python -m benchmarks.memory

Computed, not measured: weights, gradients, averages and moments are counted, and a training step
is gone through without numbers (`var_exp.preflight`), that of the images' encoding included. Steps
of two numbers of IMAGES give what an image takes and what does not depend on them; a step of few
holds most at another moment, when the gradients are summed, which would hide them. RESERVE is left
to what that does not see: the allocator's rounding, workspaces, the context. Writes
`benchmarks/results/memory.json`, and prints the table.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch

from benchmarks.harness import RESULTS, markdown
from var_exp.official.sizes import SCHEDULES
from var_exp.preflight.memory import Devices, Needs, needs_of, ready
from var_exp.tokenizer import VQVAE, Codebook, Decoder, Encoder, MultiScaleQuantizer
from var_exp.training import VARModule
from var_exp.training.optim import LinearSchedule
from var_exp.transformer import VAR

# Image size in pixels, depth, and the form of the modulation: VAR, table 1 and section 4.
SIZES = (
    (256, 16, "adaln"),
    (256, 20, "adaln"),
    (256, 24, "adaln"),
    (256, 30, "adaln"),
    (512, 36, "shared_adaln"),
)
GPUS = (24, 40, 80)  # GB
RESERVE = 0.1  # of a GPU's memory
IMAGES = (32, 64)
RECOMPUTE = (0.0, 0.5, 1.0)
STRATEGIES = {"ddp": Devices(8, 1, 1, True), "fsdp": Devices(8, 1, 8, False)}
VOCAB_SIZE, CODE_DIM, WIDTH = 4096, 32, 160


def make_module(image_size: int, depth: int, block: str, recompute: float) -> VARModule:
    """Stage two of the published recipe, without content."""
    schedule = next(s for s in SCHEDULES if s.latent_size[0] * 16 == image_size)
    sizes = {"code_dim": CODE_DIM, "width": WIDTH}
    with torch.device("meta"):
        quantizer = MultiScaleQuantizer(schedule.patch_nums, Codebook(VOCAB_SIZE, CODE_DIM))
        tokenizer = VQVAE(Encoder(**sizes), quantizer, Decoder(**sizes))
        transformer = VAR(schedule.patch_nums, VOCAB_SIZE, CODE_DIM, depth=depth, block=block)
    return VARModule(
        transformer,
        tokenizer,
        partial(torch.optim.AdamW, lr=1e-4),
        LinearSchedule(),
        average_decay=0.9999,
        recompute=recompute,
    )


def needs_for(module: VARModule, image_size: int, images: int) -> Needs:
    """What so many images need on a GPU that is alone."""
    return needs_of(
        module,
        image_shape=(3, image_size, image_size),
        share=images,
        num_batches=1,
        samples=1,
        precision="bf16-mixed",
        accelerator="gpu",
    )


def rows_of(image_size: int, depth: int, block: str) -> list[dict[str, Any]]:
    """What fits, for each strategy and share of recomputed blocks."""
    rows = []
    for recompute in RECOMPUTE:
        module = ready(make_module(image_size, depth, block, recompute))
        needs = [needs_for(module, image_size, images) for images in IMAGES]
        for strategy, devices in STRATEGIES.items():
            few, many = (needed.shared(devices).training for needed in needs)
            each = (many - few) // (IMAGES[1] - IMAGES[0])
            fixed = few - IMAGES[0] * each
            fits = {
                f"{gb} GB": max(0, int((gb * 1e9 * (1 - RESERVE) - fixed) // each)) for gb in GPUS
            }
            sizes = {"image_size": image_size, "depth": depth, "recompute": recompute}
            about = sizes | {"strategy": strategy, "fixed_bytes": fixed, "bytes_per_image": each}
            rows.append(about | {"images": fits})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = ["size", "strategy", "recompute", "fixed", "an image", *(f"{gb} GB" for gb in GPUS)]
    cells = [head]
    for row in rows:
        fits = [str(n) if n else "none" for n in row["images"].values()]
        amounts = [f"{row[key] / 1e9:.2f} GB" for key in ("fixed_bytes", "bytes_per_image")]
        size = f"d{row['depth']}, {row['image_size']} px"
        cells.append([size, row["strategy"], f"{row['recompute']:g}", *amounts, *fits])
    return markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default=str(RESULTS), help="folder of the results")
    args = parser.parse_args()
    rows = [row for size in SIZES for row in rows_of(*size)]
    found = {"torch": torch.__version__, "computed": True, "reserve": RESERVE, "rows": rows}
    with open(f"{args.results}/memory.json", "w") as file:
        json.dump(found, file, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()
