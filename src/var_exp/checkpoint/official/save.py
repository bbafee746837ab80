"""Networks to published checkpoints."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from var_exp.checkpoint.official.names import entries
from var_exp.checkpoint.official.sizes import PHI_RATIO, SOFTMAX_SCALE
from var_exp.io.files import atomic_write
from var_exp.tokenizer import VQVAE, Codebook
from var_exp.transformer import VAR
from var_exp.transformer.block import MLP, AdaLNHead

File = TypeVar("File", bound=Path | None)


class OfficialFiles(NamedTuple, Generic[File]):
    """Paths of the files; None where no network was given."""

    transformer: File
    tokenizer: File


def official_state_dict(network: VAR | VQVAE) -> dict[str, Tensor]:
    """The published state dict of a transformer or tokenizer, computed buffers included.

    Like `state_dict`, it holds the network's own tensors and not copies.

    Raises:
        ValueError: the network has a part that the published one has not.
    """
    if not isinstance(network, VAR | VQVAE):
        raise ValueError(f"official: expected a VAR or a VQVAE, got {type(network).__name__}")
    for reason in _unsayable(network):
        raise ValueError(f"official: the published networks have no {reason}")
    tensors = entries(network)
    written = {id(entry.tensor) for entry in tensors}
    for name, parameter in network.named_parameters():
        if id(parameter) not in written:
            raise ValueError(f"official: the published networks have no place for {name}")
    return {entry.name: entry.tensor.detach() for entry in tensors}


def save_official(
    folder: str | os.PathLike, transformer: VAR | None = None, tokenizer: VQVAE | None = None
) -> OfficialFiles[Path | None]:
    """Write networks for the authors' code, under names like those of the published files.

    Returns:
        The paths: `load_official(*save_official(folder, transformer, tokenizer))` gives the
        networks back.

    Raises:
        ValueError: as `official_state_dict`; then nothing is written.
    """
    networks = (transformer, tokenizer)
    states = [None if n is None else official_state_dict(n) for n in networks]
    paths = [None if n is None else Path(folder) / _file_name(n) for n in networks]
    for state, path in zip(states, paths, strict=True):
        if state is not None and path is not None:
            with atomic_write(path) as unfinished:
                torch.save({name: tensor.cpu() for name, tensor in state.items()}, unfinished)
    return OfficialFiles(*paths)


def _file_name(network: VAR | VQVAE) -> str:
    if isinstance(network, VAR):
        return f"var_d{len(network.blocks)}.pth"
    width, quantizer = network.encoder.conv_in.out_channels, network.quantizer
    return f"vae_ch{width}v{quantizer.vocab_size}z{quantizer.code_dim}.pth"


def _unsayable(network: VAR | VQVAE) -> Iterator[str]:
    """What makes a network compute something that a published file cannot say."""
    if isinstance(network, VAR):
        if not isinstance(network.head, AdaLNHead):
            yield "block 'gpt2', only 'adaln' and 'shared_adaln' (transformer.block)"
        block = network.blocks[0]
        if not isinstance(block.mlp, MLP):
            yield f"{type(block.mlp).__name__}, only the MLP with GELU (transformer.mlp)"
        if not isinstance(block.norm1, nn.LayerNorm):
            yield f"{type(block.norm1).__name__}, only LayerNorm (transformer.norm)"
        if network.rotation is not None:
            yield "rotary position embedding (transformer.rope)"
        attention = block.attn
        scale = attention.scale * math.sqrt(attention.head_dim)
        if attention.log_scale is None and not math.isclose(scale, SOFTMAX_SCALE):
            yield (
                f"softmax_scale {scale:g} without QK-norm, only {SOFTMAX_SCALE} "
                f"(transformer.softmax_scale)"
            )
        return
    quantizer = network.quantizer
    if len(quantizer.codebooks) > 1:
        yield "codebook for each scale, only one for all (tokenizer.quantizer.per_scale)"
    if not isinstance(quantizer.codebooks[0], Codebook):
        yield f"{type(quantizer.codebooks[0]).__name__} (tokenizer.quantizer.codebook)"
    if quantizer.phi_ratio != PHI_RATIO:
        yield (f"phi_ratio {quantizer.phi_ratio}, only {PHI_RATIO} (tokenizer.quantizer.phi_ratio)")
    if network.encoder.patch_size != 1:
        yield f"patch_size {network.encoder.patch_size}, only 1 (tokenizer.encoder.patch_size)"
