"""Draws numbered samples of a pair of networks, for training and for `sample.py`.

B batch, K scales
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from var_exp.io.fingerprint import fingerprint, with_form
from var_exp.sampling.generate import Samples, check_settings, iterate_samples, round_up
from var_exp.sampling.labels import take_turns
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

PRECISIONS = {"32-true": False, "bf16-mixed": True}  # and whether that is autocast's work


class Sampler:
    """Sample i is a function of (networks, settings, seed, i) and of its class.

    Args:
        transformer, tokenizer: networks that fit each other.
        classes: that take turns; "all" of them, or None for samples without a class.
        settings: cfg_scale, top_k, top_p, temperature and seed, as in `generate`.
        precision: of the networks, "32-true" or "bf16-mixed".
        compiled: whether the networks are, which rounds differently.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        transformer: VAR,
        tokenizer: VQVAE,
        classes: str | Sequence[int] | None,
        settings: dict[str, Any],
        precision: str = "32-true",
        compiled: bool = False,
    ):
        check_settings(**settings)
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r} (precision=...)"
            )
        self.transformer, self.tokenizer = transformer, tokenizer
        self.classes = choose_classes(classes, transformer.num_classes)
        self.settings, self.precision, self.compiled = settings, precision, compiled

    def plan(self) -> dict[str, Any]:
        """What decides every sample, as plain data."""
        networks = {"transformer": self.transformer, "tokenizer": self.tokenizer}
        return {
            "networks": {name: network_fingerprint(net) for name, net in networks.items()},
            "image_size": list(self.tokenizer.image_size),
            "classes": self.classes,
            "precision": self.precision,
            **({"compiled": True} if self.compiled else {}),  # older sets do not have the key
            **self.settings,
        }

    def labels(self, ids: Sequence[int]) -> list[int]:
        return take_turns(self.classes, ids)

    def autocast(self) -> torch.autocast:
        """A context in which networks compute in this precision."""
        device = device_of(self.tokenizer)
        return torch.autocast(device.type, torch.bfloat16, PRECISIONS[self.precision])

    def sample_batch(self, ids: Sequence[int]) -> Samples:
        """The samples with these numbers, in one batch."""
        networks, options = (self.transformer, self.tokenizer), self.settings
        with self.autocast():
            ((_, samples),) = iterate_samples(
                *networks, self.labels(ids), sample_ids=ids, batch_size=len(ids), **options
            )
        return samples

    def batches(self, ids: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Samples]]:
        """The samples with these numbers, a batch at a time: (numbers (B,), samples)."""
        rows = round_up(min(batch_size, max(1, len(ids))))
        for start in range(0, len(ids), rows):
            batch = list(ids[start : start + rows])
            yield batch, self.sample_batch(batch)


def choose_classes(classes: str | Sequence[int] | None, num_classes: int) -> list[int]:
    """The classes that take turns; [num_classes], which stands for no class, for None.

    Raises:
        ValueError: not a list of numbers in 0..num_classes - 1, nor "all" or None.
    """
    if classes is None or num_classes == 0:
        return [num_classes]
    chosen = range(num_classes) if classes == "all" else classes
    listed = isinstance(chosen, Sequence) and not isinstance(chosen, str) and len(chosen) > 0
    if not listed or any(type(c) is not int or not 0 <= c < num_classes for c in chosen):
        raise ValueError(
            f"classes: expected a list of numbers in 0..{num_classes - 1}, all or null, got "
            f"{chosen}"
        )
    return [int(c) for c in chosen]


def network_fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits that change with any weight of a recorded network, or its form."""
    tensors = with_form(sorted(network.state_dict().items()))
    return fingerprint(json.dumps(network.config, sort_keys=True), tensors)


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
