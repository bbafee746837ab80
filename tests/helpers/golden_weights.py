"""The published networks on tiny weights that a formula gives, read into ours.

tests/golden/ holds what the authors' published model computes with these weights, and the names
and shapes of every tensor in the files that they released.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from var_exp.checkpoint.official import load_official
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

GOLDEN = Path(__file__).parents[1] / "golden"
PATCH_NUMS = [1, 2, 3, 4, 5]


def formula(name: str, shape: list[int]) -> Tensor:
    """The golden value of a tensor, from its published name and shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape, dtype=np.float32)
    last = name.rpartition(".")[2]
    if "scale_mul" in name:
        x = math.log(4) + 0.1 * x
    elif "embedding.weight" in name:
        pass
    elif len(shape) == 1:
        x = 1 + 0.1 * x if last == "weight" else 0.05 * x
    elif last == "weight" and "emb" not in name:
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.5 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def golden_networks() -> tuple[VQVAE, VAR]:
    """Our tokenizer and transformer with the golden weights, read by the importer."""
    description = json.loads((GOLDEN / "official_tiny.json").read_text())
    states = {
        part: {
            entry["key"]: formula(f"{part}.{entry['key']}", entry["shape"])
            for entry in description[part]
            if entry["filled"]
        }
        for part in ("vae", "var")
    }
    transformer, tokenizer = load_official(states["var"], states["vae"], patch_nums=PATCH_NUMS)
    return tokenizer, transformer


def golden_arrays() -> dict[str, Tensor]:
    with np.load(GOLDEN / "official_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
