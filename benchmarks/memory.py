"""What fits: images that a GPU takes at once in stage two, for the paper's sizes.

    python -m benchmarks.memory

Computed, not measured: weights, gradients, averages and moments are counted, and a training step
is gone through without numbers (`var_exp.experiment.preflight`) from images, whose encoding is the
moment that takes most where blocks are recomputed. It is done for each number of IMAGES; between
them memory is taken to grow evenly, which is no less than it does. RESERVE is left to what that
does not see: the allocator's rounding, workspaces, the context. Writes
`benchmarks/results/memory.json`, and prints the table.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, markdown
from var_exp.checkpoint.official.sizes import SCHEDULES
from var_exp.experiment.preflight.resources import Devices, MemoryEstimate, estimate_memory, ready
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
IMAGES = (1, 2, 8, 32, 128, 512)
RECOMPUTE = (0.0, 0.5, 1.0)
STRATEGIES = {"ddp": Devices(8, 1, 1, True), "fsdp": Devices(8, 1, 8, False)}
VOCAB_SIZE, CODE_DIM, WIDTH = 4096, 32, 160


def make_module(
    image_size: int, depth: int, block: str, activation_checkpointing: float
) -> VARModule:
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
        ema_decay=0.9999,
        activation_checkpointing=activation_checkpointing,
    )


def needs_for(module: VARModule, image_size: int, images: int) -> MemoryEstimate:
    """What so many images need on a GPU that is alone."""
    return estimate_memory(
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
    for activation_checkpointing in RECOMPUTE:
        module = ready(make_module(image_size, depth, block, activation_checkpointing))
        needs = [needs_for(module, image_size, images) for images in IMAGES]
        for strategy, devices in STRATEGIES.items():
            total = [needed.shared(devices).training for needed in needs]
            row = {"image_size": image_size, "depth": depth, "recompute": activation_checkpointing}
            row |= {"strategy": strategy, "bytes": dict(zip(IMAGES, total, strict=True))}
            row["images"] = {f"{gb} GB": fitting(gb * 1e9 * (1 - RESERVE), total) for gb in GPUS}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def fitting(available: float, total: Sequence[int]) -> int:
    """How many images fit into some bytes, of which `total` are taken by each of IMAGES."""
    if available < total[0]:
        return 0
    return int(np.interp(available, total, IMAGES))


def table(rows: list[dict[str, Any]]) -> str:
    cells = [["size", "strategy", "recompute", *(f"{gb} GB" for gb in GPUS)]]
    for row in rows:
        fits = [str(n) if n else "none" for n in row["images"].values()]
        size = f"d{row['depth']}, {row['image_size']} px"
        cells.append([size, row["strategy"], f"{row['recompute']:g}", *fits])
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
