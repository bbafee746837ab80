"""Draw images from a checkpoint: numbered PNG files, pictures of the whole, and one npz.

python sample.py ckpt=runs/latest 'classes=[3,7]' num_samples=16 seed=0
"""

from collections.abc import Sequence
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from var_exp.checkpoint import Networks, find_checkpoint, load_networks
from var_exp.cli import launch, record_composition, report_errors, table
from var_exp.evaluation.pictures import class_grid, coarse_to_fine, save_png, to_uint8
from var_exp.files import replacing
from var_exp.sampling import iterate_samples

SETTINGS = ("seed", "cfg_scale", "top_k", "top_p", "temperature")
MAX_GRID = 400  # samples that the grid shows
STRIP = 8  # samples that are shown scale by scale


def sample(cfg: DictConfig, out: Path) -> None:
    """Draw, and write everything into the folder `out`."""
    path = find_checkpoint(cfg.ckpt)
    networks = load_networks(path, cfg.weights)
    if networks.transformer is None:
        raise ValueError(
            f"ckpt: {str(path)!r} holds a tokenizer only; expected a checkpoint of the var stage"
        )
    labels = choose_labels(cfg.classes, cfg.num_samples, networks)
    device = choose_device(cfg.device)
    transformer, tokenizer = networks.transformer.to(device), networks.tokenizer.to(device)
    batches = iterate_samples(
        transformer,
        tokenizer,
        labels,
        batch_size=cfg.batch_size,
        **{name: cfg[name] for name in SETTINGS},
    )
    record_composition(cfg, out)
    for stale in out.glob("[0-9]" * 6 + ".png"):  # of another draw, which would mix with this one
        stale.unlink()
    pixels, codes = [], []
    with tqdm(total=len(labels), desc="sampling", unit="image", disable=None) as bar:
        for ids, samples in batches:
            pixels.append(to_uint8(samples.images.cpu()))
            if ids[0] < STRIP:
                codes.append([scale[: STRIP - ids[0]] for scale in samples.indices])
            for i, image in zip(ids, pixels[-1], strict=True):
                save_png(image.permute(1, 2, 0).numpy(), out / f"{i:06d}.png")
            bar.update(len(ids))
    first = [torch.cat(scale) for scale in zip(*codes, strict=True)]  # K x (up to STRIP, n_k)
    write_whole(out, torch.cat(pixels), torch.tensor(labels), first, networks)
    print(table(f"{len(labels)} samples", {"checkpoint": path, "folder": out}))


def choose_labels(classes, num_samples: int, networks: Networks) -> list[int]:
    """One label per sample; the asked classes take turns."""
    num_classes = networks.transformer.num_classes
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples: expected a whole number >= 1, got {num_samples}")
    if classes is None or num_classes == 0:
        return [num_classes] * num_samples
    asked = range(num_classes) if classes == "all" else classes
    listed = isinstance(asked, Sequence) and not isinstance(asked, str) and len(asked) > 0
    if not listed or any(type(c) is not int or not 0 <= c < num_classes for c in asked):
        raise ValueError(
            f"classes: expected a list of numbers in 0..{num_classes - 1}, all or null, got {asked}"
        )
    return [asked[i % len(asked)] for i in range(num_samples)]


def choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError):  # no such device, or torch built without it
            raise ValueError(f"device: expected auto, cpu, cuda or mps, got {name!r}") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def write_whole(
    out: Path, pixels: Tensor, labels: Tensor, codes: list[Tensor], networks: Networks
) -> None:
    """The grid, the strip and the npz of all samples.

    Args:
        pixels, labels: (N, C, H, W) uint8 and (N,).
        codes: of the first STRIP samples, scale by scale.
    """
    names = networks.info["class_names"]
    array = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    with replacing(out / "samples.npz") as unfinished:
        np.savez(unfinished, arr_0=array, arr_1=labels.numpy())
    shown = pixels[:MAX_GRID] / 255
    save_png(class_grid(shown, labels[:MAX_GRID], names), out / "grid.png")
    steps = networks.tokenizer.decode(codes, per_scale=True)
    row_names = [[*names, "no class"][label] for label in labels[:STRIP].tolist()]
    strip = coarse_to_fine(
        [x.add(1).div(2).cpu() for x in steps], networks.tokenizer.schedule.sizes, row_names
    )
    save_png(strip, out / "coarse_to_fine.png")


@hydra.main(version_base=None, config_path="conf", config_name="sample")
@report_errors
def main(cfg: DictConfig) -> None:
    sample(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    launch(main, "sample")
