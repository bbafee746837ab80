"""A training step of the transformer, plainly: encode, read, predict, step, all in float32.

VAR (Tian et al., arXiv 2404.02905, section 3.1), with AdamW and clipping by the norm as published.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline.tokenizer import PlainTokenizer
from benchmarks.baseline.transformer import PlainTransformer


class PlainTraining:
    """The transformer in training, and the tokenizer that its codes come from.

    Args:
        lr, weight_decay, betas, clip: of AdamW and of the gradient's norm. Parameters of at most
            one dimension, and places and scales in tables, do not decay.
    """

    NO_DECAY = ("position", "level_embedding", "log_scale")

    def __init__(
        self,
        transformer: PlainTransformer,
        tokenizer: PlainTokenizer,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        clip: float,
    ):
        self.transformer, self.tokenizer, self.clip = transformer.train(), tokenizer, clip
        groups: dict[float, list[Tensor]] = {weight_decay: [], 0.0: []}
        for name, parameter in transformer.named_parameters():
            exempt = parameter.ndim <= 1 or any(key in name for key in self.NO_DECAY)
            groups[0.0 if exempt else weight_decay].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
            lr=lr,
            betas=betas,
        )

    def training_step_plain(self, images: Tensor, labels: Tensor) -> Tensor:
        """From images (B, C, H, W) in [-1, 1] and labels (B,): the mean cross-entropy."""
        return self.step_from_codes(self.tokenizer.encode_plain(images), labels)

    def step_from_codes(self, indices: list[Tensor], labels: Tensor) -> Tensor:
        """From the codes of all scales, K tensors (B, n_k)."""
        loss = self.gradients(indices, labels)
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, indices: list[Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            inputs = self.tokenizer.quantizer.teacher_forcing_input(indices)
        logits = self.transformer(inputs, labels)  # (B, L, V)
        targets = torch.cat(indices, dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()
