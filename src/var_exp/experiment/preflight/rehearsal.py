"""A training step without numbers: what it would hold in memory, counted to the byte.

The step is the module's own `training_step`, on tensors that have sizes and no content
(`FakeTensorMode`), so that networks of any size take no memory here. Two things are counted: what
autograd keeps for the backward pass, and the most that the step holds at once, gradients and
temporaries included. Operators are those of CPUs, with the precisions that autocast has on a GPU
where there is to be one. Not in it: what a GPU's allocator rounds up, its context, the workspaces
of its convolutions, the optimizer's own temporaries. Attention with dropout is counted as on CPUs,
where all its weights are kept.

Torch's `MemTracker` does not serve: it hooks the gradient of every parameter of a module that runs
forward, which raises for frozen ones ("cannot register a hook on a tensor that doesn't require
gradient", torch 2.14: the tokenizer of stage two, each network of stage one in the other's turn),
and it does not say what autograd keeps.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from var_exp.data import Batch
from var_exp.training.module import StageModule
from var_exp.transformer import VAR


class Rehearsed(NamedTuple):
    """kept: bytes that autograd keeps for the backward pass of one micro-batch.

    most: bytes at once besides weights, averages and optimizer: these, gradients, temporaries.
    """

    kept: int
    most: int


class SavedBytes:
    """Within this block, the bytes of all that autograd keeps; shared memory counts once.

    Args:
        besides: tensors that are there anyway, such as the weights.
    """

    def __init__(self, besides: Sequence[Tensor]):
        self.besides = {storage_of(tensor)._cdata for tensor in besides}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> "SavedBytes":
        self.hooks = saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage._cdata not in self.besides:
            self.storages[storage._cdata] = storage  # held, or its address might be used again
        return tensor

    def take(self) -> int:
        """The bytes so far; from here on a new count."""
        total = sum(storage.nbytes() for storage in self.storages.values())
        self.storages.clear()
        return total


class LiveBytes(TorchDispatchMode):
    """Within this block, the bytes of all tensors that were made in it and are alive.

    Args:
        besides: tensors that are there anyway.
    """

    def __init__(self, besides: Sequence[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {storage_of(tensor)._cdata: 0 for tensor in besides}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(storage_of(leaf))
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class AsOnGPU(TorchFunctionMode):
    """Within this block autocast on the CPU computes in float32 what it does so on a GPU.

    Of PyTorch's list ("CUDA ops that autocast to float32") what networks and losses here call.
    """

    FLOAT32 = {
        *(F.normalize, F.layer_norm, F.group_norm, F.softplus, F.mse_loss, F.l1_loss),
        *(F.cross_entropy, torch.norm, Tensor.norm, torch.exp, Tensor.exp, Tensor.pow),
        *(torch.sum, Tensor.sum, F.softmax, Tensor.softmax, Tensor.log_softmax),
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tree_map(in_float32, args)
        return func(*args, **(kwargs or {}))


def in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def call_as_on_gpu(function: Callable[..., Tensor], *args: Any) -> Tensor:
    with AsOnGPU():
        return function(*args)


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def rehearse(
    module: StageModule,
    image_shape: Sequence[int],
    share: int,
    num_batches: int,
    precision: str,
    accelerator: str = "cpu",
) -> Rehearsed:
    """Go through the last step of a stage, when all scales and the adversary take part.

    Args:
        module: its networks may be on the meta device; it is left as it is.
        image_shape: (C, H, W).
        share: images of a batch that one device has; one micro-batch of them is gone through, with
            the gradients of those before it where there are some.
        num_batches: of the stage.
        precision: "bf16-mixed" or "32-true".
        accelerator: "cpu", or anything else for the precisions of a GPU.
    """
    size = min(share, module.micro_batch_size or share)
    module = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        images = torch.empty(size, *image_shape)
    # Read as a number, and that of all networks but fresh ones: codebooks have started.
    module.tokenizer.quantizer.started = torch.tensor(True)
    if accelerator != "cpu" and isinstance(module.network, VAR):
        # Blocks are recomputed within the backward pass, where the mode around it is off. On a GPU
        # no way of attending keeps its weights; on a CPU attention per scale does, a mask does not.
        execution = module.network.execution
        call = functools.partial(call_as_on_gpu, execution.call)
        module.network.execution = execution._replace(call=call, attention="mask")
    with contextlib.nullcontext() if accelerator == "cpu" else AsOnGPU():
        return last_step(module, images, num_batches, precision, continued=size < share)


def last_step(
    module: StageModule, images: Tensor, num_batches: int, precision: str, continued: bool = False
) -> Rehearsed:
    """The last step of a stage, but for that of the optimizer, on images (B, C, H, W).

    With content or without.

    Args:
        continued: gradients of earlier micro-batches are there already.
    """
    module.setup("fit")
    module.train()
    there = [*module.parameters(), *module.buffers(), images]
    saved, live = SavedBytes(there), LiveBytes(there)
    kept = [0]

    def backward(loss: Tensor) -> None:
        kept.append(saved.take())
        loss.backward()

    stand_alone(module, backward)
    module.on_progress(num_batches - 1, num_batches)
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))
    with live, saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        for parameter in module.parameters() if continued else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        module.training_step(batch, 0)
    return Rehearsed(max(kept), live.most)


def stand_alone(module: StageModule, backward: Callable[[Tensor], None]) -> None:
    """Give a module what it asks of Lightning in a training step, but for logging and stepping."""
    optimizers = module.configure_optimizers()
    strategy = SimpleNamespace(reduce=lambda values, **_: values)
    trainer: Any = SimpleNamespace(optimizers=optimizers, strategy=strategy)
    module.trainer = trainer

    def step(optimizer: Optimizer, name: str = "") -> bool:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.zero_grad()
        return True

    instead = {
        "optimizers": lambda **_: optimizers if len(optimizers) > 1 else optimizers[0],
        "toggled": lambda optimizer, last: module.toggled_optimizer(optimizer),
        "manual_backward": backward,
        "step": step,
        "log_step": lambda *_: None,
        "log": lambda *_, **__: None,
    }
    for name, function in instead.items():
        object.__setattr__(module, name, function)
