"""A moving average of a network's weights.

A frozen copy beside the network, chosen for evaluation instead of swapped in: the one form that
stays right with manual optimisation, sharding and resuming.
"""

import copy

import torch
from torch import nn

from var_exp.training.fsdp import local


def ema_copy(network: nn.Module) -> nn.Module:
    """A frozen copy, in evaluation mode, to be led by `update_ema`."""
    return copy.deepcopy(network).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Lead the average towards the network: parameters by lerp, buffers by copy.

    Where both are sharded, each process leads its part.
    """
    ours, theirs = ([local(p) for p in n.parameters()] for n in (average, network))
    torch._foreach_lerp_(ours, theirs, 1 - decay)
    for buffer, other in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(other)
