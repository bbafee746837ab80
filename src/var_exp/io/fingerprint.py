"""A short hash that tells networks apart."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of a description and named tensors, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def with_form(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """The same with the shape and dtype of each in its name."""
    return ((f"{name} {tuple(x.shape)} {x.dtype}\n", x) for name, x in tensors)
