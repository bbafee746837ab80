"""Fully sharded training: each process keeps a part of every weight, gradient and moment.

Fully sharded data parallelism (ZeRO stage 3, Rajbhandari et al., arXiv 1910.02054; PyTorch's
FSDP2, Zhao et al., arXiv 2304.11277). A unit, such as the attention of a block, is gathered just
before it computes and freed afterwards, so a network may be larger than a device's memory could
hold together with its gradients and moments.

Whoever uses a network outside of training, to sample from it, score it or hand it on, gets a whole
and ordinary one. So a network exists twice: its shards, which are trained, and the network that
was given, which has no weights meanwhile and is filled to be used. FSDP2's own `unshard()` would
save the second, but leaves FSDP modules (measured with torch 2.14): reading a state dict reshards
them, `copy.deepcopy` refuses them, a weight seen through `.numpy()` can no longer be freed, and a
block that runs before the first forward of its network, as in sampling, ends the training.

Checkpoints are single files with whole tensors, the same as those of one process: any number of
processes resumes from them. The price is that the first process holds all of a checkpoint in its
main memory while it saves.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from var_exp.distributed.collectives import all_reduce_sum, broadcast, is_main_process, world_size
from var_exp.tokenizer.autoencoder import Downsample, ResidualBlock, SpatialAttention, Upsample
from var_exp.transformer.attention import SelfAttention
from var_exp.transformer.block import MLP, AdaLNBlock, SwiGLU

# What is gathered at once. Not whole transformer blocks: their modulation vectors are computed
# ahead of all blocks, and would gather each of them once more.
UNITS = (SelfAttention, MLP, SwiGLU, ResidualBlock, SpatialAttention, Downsample, Upsample)


class Sharded(ModelParallelStrategy):
    """Shards over all processes of all machines; Lightning's "auto" sizes would shard nothing."""

    lightning_module: L.LightningModule

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Lightning's own way of writing whole tensors numbers them otherwise than an optimizer does,
    # and restores callbacks after they were told that training starts.

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(getattr(optimizer, "optimizer", optimizer).state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {
            name: like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = parameters_of(optimizer)
            moments = {
                i: {name: like(value, parameters[i]) for name, value in entries.items()}
                for i, entries in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": moments})


# -- networks -------------------------------------------------------------------------------


class ShardableModule(L.LightningModule):
    """A module that trains one network, sharded where the strategy is `Sharded`."""

    network_name: str  # the attribute that the network is
    #: Submodules of the network whose parameters every process has whole.
    kept_whole: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        # By attribute, while shards are trained; dicts hide them from `self.modules()`.
        self.shards: dict[str, nn.Module] = {}
        self.whole_networks: dict[str, nn.Module] = {}
        self.times_gathered = 0

    @property
    def average_name(self) -> str:
        """The attribute that holds the moving average of the network, where one is kept."""
        return f"averaged_{self.network_name}"

    def configure_model(self) -> None:
        """Shard what is trained; called before the optimizers are made."""
        if self.device_mesh is None or self.trainer.state.fn != "fit":
            return
        mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
        for name in (self.network_name, self.average_name):
            if hasattr(self, name):
                self.whole_networks[name] = getattr(self, name)
                self.shards[name] = shard(getattr(self, name), mesh, device, self.kept_whole)
                setattr(self, name, self.shards[name])

    def gather(self) -> None:
        """Put whole networks in the place of the shards. All processes call it alike."""
        self.times_gathered += 1
        if self.times_gathered == 1:
            for name, network in self.whole_networks.items():
                fill(network, self.shards[name])
                setattr(self, name, network)

    def release(self) -> None:
        """Go back to the shards, once it was called as often as `gather`."""
        self.times_gathered -= 1
        if self.times_gathered == 0:
            for name, network in self.whole_networks.items():
                setattr(self, name, self.shards[name])
                empty(network)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within this block, to be entered by all processes, no network is sharded."""
        self.gather()
        try:
            yield
        finally:
            self.release()

    # Validation sees whole networks, and so do the callbacks that look at them at its end, which
    # are called before the module. Not in the hooks for modes: Lightning keeps no modes then.

    def on_validation_start(self) -> None:
        self.gather()

    def on_validation_end(self) -> None:
        self.release()

    def on_fit_end(self) -> None:
        self.gather()
        self.shards, self.whole_networks, self.times_gathered = {}, {}, 0


def shard(
    network: nn.Module, mesh: DeviceMesh, device: torch.device, kept_whole: Sequence[str]
) -> nn.Module:
    """A sharded copy of a network, which itself is left without weights."""
    shards = copy.deepcopy(network)
    empty(network)
    network.to(device)
    # All start like the first. One tensor after another: the whole may not fit on the device.
    for tensor in (*shards.parameters(), *shards.buffers()):
        tensor.data.copy_(broadcast(tensor.detach().to(device, copy=True)))
    for unit in list(shards.modules()):
        if isinstance(unit, UNITS):
            fully_shard(unit, mesh=mesh)
        elif type(unit) is AdaLNBlock:
            fully_shard(unit.ada_lin, mesh=mesh)
    kept = {p for name in kept_whole for p in shards.get_submodule(name).parameters()}
    fully_shard(shards, mesh=mesh, ignored_params=kept)
    return shards


def empty(network: nn.Module) -> None:
    """Free the weights of a network."""
    for parameter in network.parameters():
        parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def fill(network: nn.Module, shards: nn.Module) -> None:
    """Give a network the weights, buffers and modes of its shards."""
    # Validation runs in inference mode; weights made in it could not be trained later.
    with torch.inference_mode(False):
        for whole, part in zip(network.parameters(), shards.parameters(), strict=True):
            data = part.detach()
            whole.data = data.full_tensor() if isinstance(data, DTensor) else data.clone()
        for ours, theirs in zip(network.buffers(), shards.buffers(), strict=True):
            ours.copy_(theirs)
    for module, shard in zip(network.modules(), shards.modules(), strict=True):
        module.training = shard.training


# -- tensors --------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which it shares its memory with."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Any, own: Tensor) -> Any:
    """A whole tensor by shards, if `own` of its shape is; every process has the whole one."""
    if not isinstance(own, DTensor) or not torch.is_tensor(value) or value.shape != own.shape:
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def gathered(tree: Any) -> Any:
    """A tree of plain data and tensors, whole on the CPU of the first process.

    One tensor after another, so that a device never holds all of them; the other processes,
    which have to call it too, get None in the place of tensors that are sharded.
    """
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    whole = tree.detach().full_tensor()  # type: ignore[attr-defined]  # it stays a DTensor
    return whole.cpu() if is_main_process() else None


def parameters_of(optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
    """In the order in which the state dict of an optimizer numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# -- gradients ------------------------------------------------------------------------------


def average_whole_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of those that are not sharded over the processes, in one message."""
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if grads:
        means = all_reduce_sum(torch.cat([grad.flatten() for grad in grads])) / world_size()
        for grad, mean in zip(grads, means.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where some are sharded: the norm of all, the same for all.

    That norm is the same number in all processes, so they clip, or skip a batch, alike.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(whole, limit)
    norms = []
    for group in (sharded, whole):
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.stack(norms).norm()
    for group in (sharded, whole):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm
