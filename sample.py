"""Draw images: numbered PNG files, pictures of the whole, and one npz.

python sample.py ckpt=runs/latest 'classes=[3,7]' num_samples=16 seed=0
python sample.py official=var_d16 'classes=[207]'         the published networks
python sample.py ckpt=runs/latest num_samples=0 export=DIR   the networks in one portable folder
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from var_exp.cli import launch, record_composition, remove_if_empty, report_errors, table
from var_exp.evaluation.pictures import class_grid, coarse_to_fine, save_png, to_uint8
from var_exp.files import replacing
from var_exp.official import MODELS, save_official
from var_exp.pipeline import VARPipeline
from var_exp.sampling import Samples, iterate_samples
from var_exp.sources import Found, read_networks, read_published

SETTINGS = ("seed", "cfg_scale", "top_k", "top_p", "temperature")
EXPORTS = {"export": "portable folder", "export_official": "published files"}
MAX_GRID = 400  # samples that the grid shows
STRIP = 8  # samples that are shown scale by scale


def sample(cfg: DictConfig, out: Path) -> None:
    """Export the networks where that is asked for; draw, and write all samples into `out`."""
    found = choose_networks(cfg)
    networks = VARPipeline(found.transformer, found.tokenizer, found.class_names)
    asked = {key: cfg[key] for key in EXPORTS if cfg[key] is not None}
    only_export = bool(asked) and cfg.num_samples == 0
    labels = [] if only_export else choose_labels(cfg.classes, cfg.num_samples, networks)
    networks.to(choose_device(cfg.device))
    settings = {name: cfg[name] for name in SETTINGS}
    batches = None
    if labels:  # before anything is written: this refuses wrong settings
        batches = iterate_samples(
            networks.transformer, networks.tokenizer, labels, batch_size=cfg.batch_size, **settings
        )
    export(networks, asked)
    done = {"checkpoint": found.path} | {EXPORTS[key]: folder for key, folder in asked.items()}
    if batches is None:
        remove_if_empty(out)
    else:
        record_composition(cfg, out)
        write_samples(out, batches, labels, networks)
        done["folder"] = out
    print(table(f"{len(labels)} samples" if labels else "exported", done))


def choose_networks(cfg: DictConfig) -> Found:
    """The networks of `ckpt`, or the published ones that `official` names."""
    if (cfg.ckpt is None) == (cfg.official is None):
        raise ValueError(
            f"sample: expected either ckpt=PATH, such as runs/latest, or official=NAME, one of "
            f"{', '.join(MODELS)}; got ckpt={cfg.ckpt} and official={cfg.official}"
        )
    if cfg.official is not None:
        return read_published(cfg.official, cfg.official_dir)
    found = read_networks(cfg.ckpt, cfg.weights)
    if found.transformer is None:
        raise ValueError(
            f"ckpt: {str(found.path)!r} holds a tokenizer only; expected a checkpoint of the var "
            f"stage"
        )
    if found.tokenizer is None:
        raise ValueError(
            f"ckpt: {str(found.path)!r} holds a transformer only; to draw with published files "
            f"use official=NAME, and official_dir=DIR for where they are"
        )
    return found


def export(networks: VARPipeline, folders: dict[str, str]) -> None:
    """Write the networks into the folders of `export` and `export_official`, where given."""
    for key, folder in folders.items():
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{key}: expected a folder, {str(folder)!r} is a file")
    if "export_official" in folders:  # first: it may refuse
        save_official(folders["export_official"], networks.transformer, networks.tokenizer)
    if "export" in folders:
        networks.save_pretrained(folders["export"])


def choose_labels(classes, num_samples: int, networks: VARPipeline) -> list[int]:
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


def write_samples(
    out: Path,
    batches: Iterator[tuple[list[int], Samples]],
    labels: list[int],
    networks: VARPipeline,
) -> None:
    """Draw, and write each sample, then what shows the whole."""
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


def write_whole(
    out: Path, pixels: Tensor, labels: Tensor, codes: list[Tensor], networks: VARPipeline
) -> None:
    """The grid, the strip and the npz of all samples.

    Args:
        pixels, labels: (N, C, H, W) uint8 and (N,).
        codes: of the first STRIP samples, scale by scale.
    """
    names = networks.class_names
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
