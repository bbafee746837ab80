"""Where published names meet ours: the only place.

The files of VAR (arXiv 2404.02905), `var_d16.pth` to `var_d36.pth` and
`vae_ch160v4096z32.pth`, are plain state dicts. The tables below say what such a file must hold
when one is read, and what is written when a network is saved.

What the published code computes when it builds a network is computed here too. The counts of
used codes are a statistic of the training that made the file; they and the spelling of the
phis' names travel with the tokenizer, as `tokenizer.official`, while it lives in memory.

    K scales, L tokens, C width, V codes
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR
from var_exp.transformer.block import Block


class Carried(NamedTuple):
    """What a tokenizer's file says that the network has no use for.

    phis: the published name of its phis, a key of `PHIS`.
    code_hits: (K, V), how often each code was used at each scale while the file was trained.
    """

    phis: str | None = None
    code_hits: Tensor | None = None


def carried(network: VQVAE) -> Carried:
    return vars(network).get("official", Carried())


# -- tensors of a file that are no weights of ours ----------------------------------------


def level_ids(network: VAR) -> Tensor:
    return network.levels.unsqueeze(0)  # (1, L)


def attention_bias(network: VAR) -> Tensor:
    mask = network.mask
    bias = torch.zeros(mask.shape, dtype=network.position.dtype, device=mask.device)
    return bias.masked_fill(~mask, -torch.inf)[None, None]  # (1, 1, L, L)


def zero_k_bias(block: Block) -> Tensor:
    return torch.zeros_like(block.attn.q_bias)  # (C,)


def code_hits(network: VQVAE) -> Tensor:
    """Those of the file that the network came from; zeros, as in a new one, without a file."""
    hits = carried(network).code_hits
    codes = network.get_parameter("quantizer.codebooks.0.weight")
    if hits is None:
        return codes.new_zeros(network.schedule.num_scales, len(codes))
    return hits.to(codes.device)


# -- the tables ---------------------------------------------------------------------------

# Published name -> ours, in the order of the published files. A name is that of a tensor, or of
# a module with all its tensors; networks of one kind may lack it. A function gives a tensor that
# is no weight of ours, a table holds for each module of a list.
BLOCK = {
    "ada_gss": "ada_offset",
    "attn.scale_mul_1H11": "attn.log_scale",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.zero_k_bias": zero_k_bias,
    "attn.mat_qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "ada_lin.1": "ada_lin",
}
TRANSFORMER = {
    "pos_start": "start_position",
    "pos_1LC": "position",
    "lvl_1L": level_ids,
    "attn_bias_for_masking": attention_bias,
    "word_embed": "code_projection",
    "class_emb": "class_embedding",
    "lvl_embed": "level_embedding",
    "shared_ada_lin": "shared_modulation",
    "blocks": BLOCK,
    "head_nm.ada_lin.1": "head.ada_lin",
    "head": "head.linear",
}
# A file has one of these: phis for groups of scales, one phi for all, one for each.
PHIS = {
    "quantize.quant_resi.qresi_ls": "quantizer.phis",
    "quantize.quant_resi.qresi": "quantizer.phis.0",
    "quantize.quant_resi": "quantizer.phis",
}
PHI_GROUPS, PHI_FOR_ALL, PHI_FOR_EACH = PHIS
TOKENIZER = {
    "encoder": "encoder",
    "decoder": "decoder",
    "quantize.ema_vocab_hit_SV": code_hits,
    **PHIS,
    "quantize.embedding.weight": "quantizer.codebooks.0.weight",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}


class Entry(NamedTuple):
    """One tensor of a published file: a parameter of the network unless `computed`."""

    name: str
    tensor: Tensor
    computed: bool


def entries(network: VAR | VQVAE) -> list[Entry]:
    """All tensors of the published file of a network, in its order."""
    if isinstance(network, VAR):
        return list(_walk(network, TRANSFORMER))
    phis = _phi_row(network)
    table = {name: ours for name, ours in TOKENIZER.items() if name not in PHIS or name == phis}
    return list(_walk(network, table))


def _walk(module: nn.Module, table: dict[str, Any], prefix: str = "") -> Iterator[Entry]:
    for theirs, ours in table.items():
        name = prefix + theirs
        if isinstance(ours, dict):
            for i, part in enumerate(getattr(module, theirs)):
                yield from _walk(part, ours, f"{name}.{i}.")
        elif callable(ours):
            yield Entry(name, ours(module), computed=True)
        else:
            found = _find(module, ours)
            if isinstance(found, nn.Module):
                for leaf, tensor in found.state_dict(keep_vars=True).items():
                    yield Entry(f"{name}.{leaf}", tensor, computed=False)
            elif found is not None:
                yield Entry(name, found, computed=False)


def _find(module: nn.Module, path: str) -> nn.Module | Tensor | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _phi_row(network: VQVAE) -> str:
    """The row of `PHIS` that the network came with, or else the one that its number suggests."""
    num_phi, num_scales = len(network.quantizer.phis), network.schedule.num_scales
    if phis := carried(network).phis:
        return phis
    if num_phi == 1:
        return PHI_FOR_ALL
    return PHI_FOR_EACH if num_phi == num_scales and num_phi != 4 else PHI_GROUPS
