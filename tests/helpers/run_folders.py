"""Small run folders as a finished run leaves them, made up rather than trained."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (1, 2, 4)

CONFIG = """\
data:
  _target_: var_exp.data.Digits
  name: digits
scales:
  patch_nums: [1, 2, 4]
tokenizer:
  width: 32
model:
  tokenizer: {num_batches: 40}
  var: {num_batches: 60, lr: 0.003}
evaluation: {num_samples: 500, num_samples_per_scale: 500}
sampling:
  cfg_scale: 1.5
name: ${data.name}
seed: 7
stages: [tokenizer, var]
expected:
  var/loss: [3.9, 4.0]
"""

FIGURES = {
    "tokenizer/psnr": 29.754,
    "tokenizer/rfid_classifier": 0.0434,
    "tokenizer/seconds": 166.0,
    "var/loss": 3.946,
    "var/acc": 0.0921,
    "var/fid_classifier": 1.2549,
    "var/inception_score_classifier": 9.12,
    "var/class_accuracy_classifier": 1.0,
    "var/seconds": 169.0,
    **{f"tokenizer/usage_scale_{n}": 0.9 + n / 100 for n in SIZES},
    **{f"var/loss_scale_{n}": 4.5 - n / 10 for n in SIZES},
    **{f"var/fid_classifier_scale_{n}": 120.0 / n**3 for n in SIZES},
}

ENVIRONMENT = {
    "command": "train.py data=digits",
    "date": "2026-11-24 19:30",
    "git_commit": "abc123def456",
    "git_dirty": False,
    "machine": "AMD EPYC, 2 cores, no GPU",
    "python": "3.11.9",
    "versions": {"torch": "2.14.1"},
}


def protocol(**sampling: object) -> dict:
    """How scores of samples were obtained."""
    return {
        "images": {"what": "samples", "number": 500, "per_class": [50]},
        "sampling": {"cfg_scale": 1.5, "seed": 7, **sampling},
        "network": {"name": "classifier", "weights": "9f2c7a1b", "num_features": 64},
        "reference": {"what": "digits train", "hash": "51ab34ff", "crop": None},
    }


def make_run(folder: Path, figures: dict | None = None, config: str = CONFIG, **sampling) -> Path:
    """A finished run of both stages, with every file that a report reads."""
    write(folder / ".hydra" / "config.yaml", config)
    write(folder / ".hydra" / "overrides.yaml", "- data=digits\n- seed=7\n")
    write(folder / "environment.json", json.dumps(ENVIRONMENT))
    register_config = {"tokenizer": protocol(), "var": protocol(**sampling)}
    metrics = FIGURES | (figures or {}) | {"protocol": register_config}
    write(folder / "metrics.json", json.dumps(metrics))
    write(folder / "csv" / "tokenizer" / "metrics.csv", table(40, "val/psnr", 29.7))
    write(folder / "csv" / "var" / "metrics.csv", table(60, "val/loss", 3.946))
    rng = np.random.default_rng(0)
    for name in ("grid", "coarse_to_fine", "reconstructions", "neighbours"):
        save(folder / "samples" / f"{name}.png", rng.integers(0, 256, (150, 300, 3), np.uint8))
    steps = rng.integers(0, 256, (len(SIZES), 4, 8, 8, 1), np.uint8)
    np.savez(folder / "samples" / "steps.npz", arr_0=steps, names=list("abcd"))
    return folder


def table(num_batches: int, column: str, last: float) -> str:
    """A CSV file of a stage as Lightning writes it: sparse rows, steps from 0."""
    lines = [f"epoch,step,train/loss,train/lr,{column}"]
    for step in range(9, num_batches, 10):
        lines.append(f"0,{step},{5 - step / 100},0.001,")
        lines.append(f"0,{step},,,{last + (num_batches - 1 - step) / 100}")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
