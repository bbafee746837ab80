"""The next-scale transformer: predicts each token map from all coarser ones.

VAR (Tian et al., arXiv 2404.02905, section 3.1): p(r_1, ..., r_K) = prod_k p(r_k | r_<k), where
a whole map r_k of h_k x w_k codes is predicted in parallel. What the network reads at scale k
is the image as known after scale k - 1, resized to (h_k, w_k); the first scale reads the class.

    B batch, K scales, L tokens, n_k tokens of scale k, V codes, D code dimension, C width
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_exp.configurable import Fraction, VocabSize, Weight, checked, register_config
from var_exp.ops.attention import AUTO, Attend, block_causal_attention
from var_exp.ops.linear import Linear
from var_exp.scales import ScaleSchedule, Side
from var_exp.transformer.attention import KVCache, SelfAttention
from var_exp.transformer.block import (
    MLP,
    AdaLNBlock,
    AdaLNHead,
    Block,
    Head,
    SharedAdaLNBlock,
    SwiGLU,
)
from var_exp.transformer.rope import rotation_table

BLOCKS = {
    "gpt2": (Block, Head),
    "adaln": (AdaLNBlock, AdaLNHead),
    "shared_adaln": (SharedAdaLNBlock, AdaLNHead),
}
MLPS = {"gelu": MLP, "swiglu": SwiGLU}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def call_block(
    block: Block,
    x: Tensor,
    modulation: tuple[Tensor, ...],
    attend: Attend,
    rotation: Tensor | None,
) -> Tensor:
    return block(x, modulation, attend, rotation)


class ExecutionOptions(NamedTuple):
    """How a forward pass is executed, which changes its result by rounding at most.

    attention: "auto", or the name of a backend, see `var_exp.ops.attention`.
    activation_checkpointing: share of the blocks, in [0, 1] and evenly spread, that recompute their
        activations in the backward pass instead of keeping them (Chen et al., arXiv 1604.06174).
    call: calls a block in `VAR.forward`. Compiling it compiles all blocks at once and changes no
        key of a state dict.
    scale_call: calls a block in `VAR.forward_scale`.
    make_cache: makes the keys and values of a batch; takes the arguments of `KVCache`.
    """

    attention: str = AUTO
    activation_checkpointing: float = 0.0
    call: Callable[..., Tensor] = call_block
    scale_call: Callable[..., Tensor] = call_block
    make_cache: Callable[..., KVCache] = KVCache

    def checkpoints(self, block: int) -> bool:
        """Whether the block of that number, from 0, recomputes its activations."""
        share = self.activation_checkpointing
        return int((block + 1) * share) > int(block * share)


class Condition(NamedTuple):
    """What depends on the class alone, computed once for all scales.

    embedding: (B, C); blocks: the modulation vectors of each block; head: those of the head.
    """

    embedding: Tensor
    blocks: list[tuple[Tensor, ...]]
    head: tuple[Tensor, ...]


# More blocks take minutes to build before memory is found too small.
Depth = Annotated[int, Ge(1), Le(1000)]


@register_config
class VAR(nn.Module):
    """The next-scale transformer, with the paper's or GPT-2's blocks.

    Args:
        patch_nums: the schedule.
        vocab_size, code_dim: V and D of the tokenizer.
        num_classes: classes; row `num_classes` of the class table means "no class". 0 trains
            without classes.
        depth: number of blocks.
        width: C; the paper's 64 * depth unless given.
        num_heads: heads; C / 64 unless given.
        mlp_ratio: hidden width of the MLPs over C; see `SwiGLU` for its own.
        block: "adaln" (the paper), "shared_adaln" (its d36) or "gpt2".
        qk_norm, softmax_scale, dropout: see `SelfAttention`.
        drop_path: of the last block; grows linearly from 0 at the first.
        gate_init: factor on the gates' initial weights.
        mlp: "gelu" (the paper) or "swiglu" (arXiv 2002.05202), with as many parameters.
        norm: "layer" (the paper) or "rms" (arXiv 1910.07467), of the blocks and the head; with
            affine weights in GPT-2's blocks alone, whichever it is.
        rope: rotate queries and keys by their position in the image (`rope.py`, arXiv
            2104.09864). It has no weights and comes on top of the position embedding: the
            rotation encodes how far apart two tokens are, not where in the image they are.

    Raises:
        ValueError: an unknown block, MLP or norm, a width that the heads do not divide, or with
            rope a head dimension that 4 does not divide.
    """

    config: dict[str, Any]
    blocks: Sequence[Block]
    levels: Tensor
    mask: Tensor
    rotation: Tensor | None

    @checked
    def __init__(
        self,
        patch_nums: Sequence[Side],
        vocab_size: VocabSize = 4096,
        code_dim: PositiveInt = 32,
        num_classes: NonNegativeInt = 1000,
        depth: Depth = 16,
        width: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        mlp_ratio: PositiveFloat = 4.0,
        block: str = "adaln",
        qk_norm: bool = True,
        softmax_scale: PositiveFloat = 1.0,
        dropout: Fraction = 0.0,
        drop_path: Fraction = 0.0,
        gate_init: Weight = 1e-3,
        mlp: str = "gelu",
        norm: str = "layer",
        rope: bool = False,
    ):
        super().__init__()
        block_class, head_class = lookup(BLOCKS, "block", block)
        mlp_class, norm_class = lookup(MLPS, "mlp", mlp), lookup(NORMS, "norm", norm)
        self.schedule = ScaleSchedule(patch_nums)
        self.vocab_size, self.code_dim, self.num_classes = vocab_size, code_dim, num_classes
        self.width = 64 * depth if width is None else width
        self.num_heads = max(1, self.width // 64) if num_heads is None else num_heads
        self.dropout = nn.Dropout(dropout)
        self.execution = ExecutionOptions()

        self.class_embedding = nn.Embedding(num_classes + 1, self.width)
        self.code_projection = Linear(code_dim, self.width)
        self.start_position = nn.Parameter(torch.empty(1, self.schedule.num_tokens[0], self.width))
        self.position = nn.Parameter(torch.empty(1, self.schedule.seq_len, self.width))
        self.level_embedding = nn.Embedding(self.schedule.num_scales, self.width)
        self.shared_modulation = block_class.shared_modulation(self.width)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        # A ModuleList's type cannot say of what it is.
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            block_class(
                self.width,
                SelfAttention(self.width, self.num_heads, qk_norm, softmax_scale, dropout),
                mlp_class(self.width, mlp_ratio, dropout),
                norm_class,
                rate,
            )
            for rate in rates
        )
        self.head = head_class(self.width, vocab_size, norm_class)

        levels = self.schedule.level_ids()  # (L,)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("mask", levels[:, None] >= levels[None, :], persistent=False)
        rotation = rotation_table(self.schedule, self.width // self.num_heads) if rope else None
        self.register_buffer("rotation", rotation, persistent=False)  # (2, L, E / 2)
        self.init_weights(gate_init)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of all scales at once, each from the coarser ones.

        Args:
            inputs: (B, L - n_1, D), `quantizer.teacher_forcing_input`; fewer scales may be
                given, then fewer are predicted.
            labels: (B,) int64 in 0..num_classes; None means "no class".

        Returns:
            (B, L, V) float32.

        Raises:
            ValueError: a label out of range, or inputs that end inside a scale.
        """
        condition = self.condition(self.check_labels(labels, len(inputs)))
        start = self.start_tokens(condition)  # (B, n_1, C)
        x = torch.cat((start, self.code_projection(inputs).to(start.dtype)), dim=1)  # (B, L, C)
        length = x.shape[1]
        self.schedule.num_scales_in(length)
        tokens, options = slice(0, length), self.execution
        x = self.dropout(x + self.position_embedding(tokens))
        rotation = self.rotation_of(tokens)
        mask = self.mask[:length, :length]
        attend = block_causal_attention(options.attention, self.schedule, mask)
        for i, (block, modulation) in enumerate(zip(self.blocks, condition.blocks, strict=True)):
            call = options.call
            if torch.is_grad_enabled() and options.checkpoints(i):
                call = functools.partial(checkpoint, call, use_reentrant=False)
            x = call(block, x, modulation, attend, rotation)  # (B, L, C)
        return self.head(x, condition.head)  # (B, L, V)

    def forward_scale(
        self,
        k: int,
        inputs: Tensor | None,
        condition: Condition,
        cache: KVCache,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, n_k, V) of scale k, whose coarser scales are in the cache.

        Args:
            k: scale, from 0; scales must come in order.
            inputs: (B, n_k, D), `quantizer.next_input`; None at scale 0.
            condition: from `condition(labels)`.
            cache: from `make_cache`; extended by this scale.
            mix: applied to the input of the head's last layer, (B, n_k, C) -> (B / 2, n_k, C), to
                make one sample of two for guidance; the logits are then (B / 2, n_k, V).
        """
        tokens = self.schedule.slices[k]
        x = self.start_tokens(condition) if inputs is None else self.code_projection(inputs)
        x = x + self.position_embedding(tokens)  # (B, n_k, C)
        rotation, call = self.rotation_of(tokens), self.execution.scale_call
        for i, (block, modulation) in enumerate(zip(self.blocks, condition.blocks, strict=True)):
            x = call(block, x, modulation, cache.attend(i, tokens), rotation)  # (B, n_k, C)
        features = self.head.features(x, condition.head)
        return self.head.logits(features if mix is None else mix(features))

    def condition(self, labels: Tensor) -> Condition:
        """Class embedding and modulation vectors of labels (B,) int64."""
        embedding = self.class_embedding(labels)  # (B, C)
        shared = self.shared_modulation(embedding)  # (B, C), (B, 6C) with shared AdaLN
        blocks = [block.modulation(shared) for block in self.blocks]
        return Condition(embedding, blocks, self.head.modulation(embedding))

    def check_labels(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Labels (B,) on the network's device; None becomes "no class" for all.

        Raises:
            ValueError: a label outside 0..num_classes.
        """
        device = self.class_embedding.weight.device
        if labels is None:
            return torch.full((batch_size,), self.num_classes, device=device)
        # Reading values of a GPU would make every step wait for it.
        if labels.device.type == "cpu" and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"labels: expected classes in 0..{self.num_classes - 1} (or "
                    f"{self.num_classes} for no class), got {low if low < 0 else high}"
                )
        return labels.to(device)

    def start_tokens(self, condition: Condition) -> Tensor:
        """The class embedding at every position of the first scale: (B, n_1, C)."""
        return condition.embedding.unsqueeze(1) + self.start_position

    def position_embedding(self, tokens: slice) -> Tensor:
        """Position plus level embedding of some tokens: (1, n, C)."""
        return self.position[:, tokens] + self.level_embedding(self.levels[tokens])

    def rotation_of(self, tokens: slice) -> Tensor | None:
        """Rotation of the queries and keys of some tokens, (2, n, E / 2); None without rope."""
        return None if self.rotation is None else self.rotation[:, tokens]

    def make_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """Make a cache for one batch of whole sequences.

        Args:
            dtype: of keys and values; None takes autocast's where it is on, else the weights'.
        """
        weight = self.code_projection.weight
        device = weight.device.type
        available = torch.amp.is_autocast_available(device)  # not on the meta device
        if dtype is None and available and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return self.execution.make_cache(
            len(self.blocks),
            batch_size,
            self.num_heads,
            self.schedule.seq_len,
            self.width // self.num_heads,
            dtype or weight.dtype,
            weight.device,
        )

    @torch.no_grad()
    def init_weights(self, gate_init: float) -> None:
        """Initialise as the published code of arXiv 2404.02905 does."""
        std = math.sqrt(1 / (3 * self.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        for block in self.blocks:
            block.attn.proj.weight /= math.sqrt(2 * len(self.blocks))
            block.mlp.fc2.weight /= math.sqrt(2 * len(self.blocks))
            block.init_modulation(gate_init)
        self.head.linear.weight *= 0.02
        if isinstance(self.head, AdaLNHead):
            self.head.ada_lin.weight *= 0.5


def lookup(choices: dict[str, Any], key: str, name: str) -> Any:
    """The choice of that name; raise ValueError, which names `transformer.<key>`, for another."""
    if name not in choices:
        raise ValueError(
            f"transformer: {key} must be one of {sorted(choices)}, got {name!r} (transformer.{key})"
        )
    return choices[name]
