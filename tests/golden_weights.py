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

from var_exp.tokenizer import VQVAE, Codebook, Decoder, Encoder, MultiScaleQuantizer
from var_exp.transformer import VAR

GOLDEN = Path(__file__).parent / "golden"

# What the published code computes when it builds its networks; ours are not in checkpoints.
COMPUTED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")

# Published part of a key -> ours, in this order; a key may hold several.
TOKENIZER_KEYS = {
    "quantize.quant_resi.qresi_ls": "quantizer.phis",
    "quantize.embedding": "quantizer.codebooks.0",
}
TRANSFORMER_KEYS = {
    "head_nm.ada_lin.1": "HEAD.ada_lin",
    "head.": "HEAD.linear.",
    "HEAD": "head",
    "pos_start": "start_position",
    "pos_1LC": "position",
    "word_embed": "code_projection",
    "class_emb": "class_embedding",
    "lvl_embed": "level_embedding",
    "shared_ada_lin.1": "shared_modulation.1",
    "ada_lin.1": "ada_lin",
    "ada_gss": "ada_offset",
    "scale_mul_1H11": "log_scale",
    "mat_qkv": "qkv",
    "ffn": "mlp",
}


def rename(key: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


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
    """Our tokenizer and transformer with the golden weights, strictly loaded."""
    description = json.loads((GOLDEN / "official_tiny.json").read_text())
    c = description["config"]
    tokenizer = published_tokenizer(c["patch_nums"], c["vocab_size"], c["z_channels"], c["ch"])
    transformer = VAR(
        c["patch_nums"],
        vocab_size=c["vocab_size"],
        code_dim=c["z_channels"],
        num_classes=c["num_classes"],
        depth=c["depth"],
        num_heads=c["num_heads"],
    )
    for network, part, names in (
        (tokenizer, "vae", TOKENIZER_KEYS),
        (transformer, "var", TRANSFORMER_KEYS),
    ):
        state = {
            rename(entry["key"], names): formula(f"{part}.{entry['key']}", entry["shape"])
            for entry in description[part]
            if entry["filled"]
        }
        state |= {"quantizer.started": torch.tensor(True)} if part == "vae" else {}
        network.load_state_dict(state)
    return tokenizer.eval(), transformer.eval()


def published_tokenizer(patch_nums, vocab_size: int, code_dim: int, width: int) -> VQVAE:
    sizes = {"code_dim": code_dim, "width": width}
    quantizer = MultiScaleQuantizer(patch_nums, Codebook(vocab_size, code_dim))
    return VQVAE(Encoder(3, **sizes), quantizer, Decoder(3, **sizes))


def golden_arrays() -> dict[str, Tensor]:
    with np.load(GOLDEN / "official_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def released() -> dict[str, dict]:
    """Of each released file its configuration and `tensors`, {key: shape}, buffers left out."""
    manifests = json.loads((GOLDEN / "released_checkpoints.json").read_text())
    for manifest in manifests.values():
        manifest["tensors"] = {
            key: tuple(shape)
            for key, shape in manifest["tensors"].items()
            if key.rpartition(".")[2] not in COMPUTED
        }
    return manifests
