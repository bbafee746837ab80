"""Published checkpoints of any configuration, and what they compute, spelled out slowly.

Names, order and shapes are written down here a second time, apart from the tables of
`var_exp.checkpoint.official`; the released manifests and the golden files check them.
`reference_logits` and `reference_codes` follow the paper with plain functions on the published
tensors.

    B batch, K scales, L tokens, C width, H heads, V codes, D code dimension
"""

import functools
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.golden_weights import GOLDEN, formula
from var_exp.checkpoint.official import load_official
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

DESCRIPTION = json.loads((GOLDEN / "official_tiny.json").read_text())
GOLDEN_SCALES = DESCRIPTION["config"]["patch_nums"]
COMPUTED = {"lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV"}


def transformer_shapes(
    patch_nums=GOLDEN_SCALES,
    depth=2,
    width=128,
    heads=2,
    classes=10,
    vocab_size=64,
    code_dim=8,
    shared=False,
    qk_norm=True,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published transformer, in the order of the file."""
    C, L = width, sum(p * p for p in patch_nums)
    shapes = {
        "pos_start": (1, patch_nums[0] ** 2, C),
        "pos_1LC": (1, L, C),
        "lvl_1L": (1, L),
        "attn_bias_for_masking": (1, 1, L, L),
        "word_embed.weight": (C, code_dim),
        "word_embed.bias": (C,),
        "class_emb.weight": (classes + 1, C),
        "lvl_embed.weight": (len(patch_nums), C),
    }
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * C, C), "shared_ada_lin.1.bias": (6 * C,)}
    block = {"ada_gss": (1, 1, 6, C)} if shared else {}
    block |= {"attn.scale_mul_1H11": (1, heads, 1, 1)} if qk_norm else {}
    block |= {"attn.q_bias": (C,), "attn.v_bias": (C,), "attn.zero_k_bias": (C,)}
    block |= {"attn.mat_qkv.weight": (3 * C, C)}
    block |= {"attn.proj.weight": (C, C), "attn.proj.bias": (C,)}
    block |= {"ffn.fc1.weight": (4 * C, C), "ffn.fc1.bias": (4 * C,)}
    block |= {"ffn.fc2.weight": (C, 4 * C), "ffn.fc2.bias": (C,)}
    block |= {} if shared else {"ada_lin.1.weight": (6 * C, C), "ada_lin.1.bias": (6 * C,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"head_nm.ada_lin.1.weight": (2 * C, C), "head_nm.ada_lin.1.bias": (2 * C,)}
    return shapes | {"head.weight": (vocab_size, C), "head.bias": (vocab_size,)}


def phi_names(phis: str, num_scales: int) -> list[str]:
    """The published names of the phis: "groups" (of 4), "all" or "each"."""
    return {
        "groups": [f"quantize.quant_resi.qresi_ls.{i}" for i in range(4)],
        "all": ["quantize.quant_resi.qresi"],
        "each": [f"quantize.quant_resi.{i}" for i in range(num_scales)],
    }[phis]


def tokenizer_shapes(patch_nums=GOLDEN_SCALES, phis="groups") -> dict[str, tuple[int, ...]]:
    """As `transformer_shapes`, for the golden tokenizer with other scales and phis."""
    shapes = {}
    for entry in DESCRIPTION["vae"]:
        name, shape = entry["key"], tuple(entry["shape"])
        if name == "quantize.ema_vocab_hit_SV":
            shapes[name] = (len(patch_nums), shape[1])
            for phi in phi_names(phis, len(patch_nums)):
                shapes |= {f"{phi}.weight": (8, 8, 3, 3), f"{phi}.bias": (8,)}
        elif "quant_resi" not in name:
            shapes[name] = shape
    return shapes


def meta_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors without memory."""
    return {
        name: torch.empty(
            shape, device="meta", dtype=torch.int64 if name == "lvl_1L" else torch.float32
        )
        for name, shape in shapes.items()
    }


@functools.cache
def value(name: str, shape: tuple[int, ...]) -> Tensor:
    return formula(name, shape)


def transformer_state(patch_nums=GOLDEN_SCALES, **sizes) -> dict[str, Tensor]:
    """A published transformer with golden weights; its tensors are shared by all tests."""
    shapes = transformer_shapes(patch_nums, **sizes)
    levels = torch.tensor([k for k, p in enumerate(patch_nums) for _ in range(p * p)])
    state = {name: value(f"var.{name}", shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name == "lvl_1L":
            state[name] = levels[None]
        elif name == "attn_bias_for_masking":
            sees = levels[:, None] >= levels[None, :]
            state[name] = torch.where(sees, 0.0, -torch.inf)[None, None]
        elif name.endswith("zero_k_bias"):
            state[name] = torch.zeros(shape)
    return state


def tokenizer_state(patch_nums=GOLDEN_SCALES, phis="groups") -> dict[str, Tensor]:
    """A published tokenizer with golden weights and some history of used codes."""
    shapes = tokenizer_shapes(patch_nums, phis)
    state = {name: value(f"vae.{name}", shape) for name, shape in shapes.items()}
    state["quantize.ema_vocab_hit_SV"] = state["quantize.ema_vocab_hit_SV"].abs()
    return state


def load_transformer(state, **arguments) -> VAR:
    return load_official(transformer=state, **arguments).transformer


def load_tokenizer(state, patch_nums=(1, 2, 3, 4, 5), **arguments) -> VQVAE:
    return load_official(tokenizer=state, patch_nums=patch_nums, **arguments).tokenizer


def assert_same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names in the same order, and in each tensor the same type and bytes."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert ours[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def reference_logits(state: dict[str, Tensor], heads: int, inputs: Tensor, label: Tensor) -> Tensor:
    """Inputs (B, L - p_1^2, D), label (B,) -> logits (B, L, V)."""
    C = state["pos_1LC"].shape[2]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, scale, shift):
        return F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift

    start = state["class_emb.weight"][label]  # (B, C)
    x = torch.cat((start[:, None] + state["pos_start"], linear("word_embed", inputs)), dim=1)
    x = x + state["pos_1LC"] + state["lvl_embed.weight"][state["lvl_1L"]]  # (B, L, C)
    for i in range(depth):
        b = f"blocks.{i}."
        if f"{b}ada_gss" in state:
            six = linear("shared_ada_lin.1", F.silu(start)).view(-1, 1, 6, C)
            six = six + state[f"{b}ada_gss"]
        else:
            six = linear(f"{b}ada_lin.1", F.silu(start)).view(-1, 1, 6, C)
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)  # (B, 1, C)
        h = norm(x, scale1, shift1)
        x = x + gate1 * linear(f"{b}attn.proj", reference_attention(state, f"{b}attn.", heads, h))
        h = F.gelu(linear(f"{b}ffn.fc1", norm(x, scale2, shift2)), approximate="tanh")
        x = x + gate2 * linear(f"{b}ffn.fc2", h)
    scale, shift = linear("head_nm.ada_lin.1", F.silu(start)).view(-1, 1, 2, C).unbind(2)
    return linear("head", norm(x, scale, shift))


def reference_attention(state: dict[str, Tensor], name: str, heads: int, x: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, C), before the output projection."""
    bias = torch.cat([state[f"{name}{part}"] for part in ("q_bias", "zero_k_bias", "v_bias")])
    qkv = (x @ state[f"{name}mat_qkv.weight"].T + bias).unflatten(2, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, C / H)
    if f"{name}scale_mul_1H11" in state:
        scale = state[f"{name}scale_mul_1H11"].clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    else:
        q = q * 0.25 / math.sqrt(q.shape[-1])
    weights = (q @ k.transpose(2, 3) + state["attn_bias_for_masking"]).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def reference_codes(
    state: dict[str, Tensor], patch_nums, phis: list[str], f: Tensor, cosine: bool
) -> tuple[list[Tensor], Tensor]:
    """Features (B, D, H, W) -> codes of each scale and f_hat; `phis`: each scale's, by name."""
    codes, size = state["quantize.embedding.weight"], f.shape[2:]
    rest, f_hat, indices = f, torch.zeros_like(f), []
    for p, phi in zip(patch_nums, phis, strict=True):
        z = F.interpolate(rest, size=(p, p), mode="area").permute(0, 2, 3, 1).flatten(1, 2)
        if cosine:
            index = (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(dim=-1)
        else:
            index = (z[:, :, None] - codes).square().sum(dim=-1).argmin(dim=-1)  # (B, p^2)
        h = codes[index].transpose(1, 2).unflatten(2, (p, p))
        h = F.interpolate(h, size=size, mode="bicubic") if p != patch_nums[-1] else h
        h = 0.5 * h + 0.5 * F.conv2d(h, state[f"{phi}.weight"], state[f"{phi}.bias"], padding=1)
        rest, f_hat = rest - h, f_hat + h
        indices.append(index)
    return indices, f_hat
