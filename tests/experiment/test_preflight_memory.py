"""What the check counts without memory is what a real step, optimizer and checkpoint take."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from helpers.stages import make_module, run
from helpers.tiny import tiny_transformer
from var_exp.experiment.preflight.rehearsal import AsOnGPU, SavedBytes, last_step, rehearse
from var_exp.experiment.preflight.resources import (
    KEPT,
    Devices,
    bytes_of,
    cache_of,
    checkpoints_bytes,
    devices_of,
    estimate_memory,
    moments_of,
    parameters_of,
    ready,
)
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.discriminator import PatchGAN

SHAPE = (1, 16, 16)
NUM_BATCHES = 10
BOTH = pytest.mark.parametrize("stage", ["tokenizer", "var"])


def module_of(stage, **changes):
    if stage == "tokenizer":
        game = AdversarialLoss(PatchGAN(width=8, num_layers=1), start=0, ramp=0, lecam=0.1)
        changes = {"adversary": game} | changes
    return make_module(stage, ema_decay=0.9, **changes)


def for_real(module, number, precision="32-true"):
    """The same step with content, on a copy."""
    module = copy.deepcopy(module)
    module.tokenizer.quantizer.started.fill_(True)
    return last_step(module, torch.rand(number, *SHAPE) * 2 - 1, NUM_BATCHES, precision)


@BOTH
@pytest.mark.parametrize("micro_batch_size", [None, 4, 16])
def test_the_bytes_kept_for_backward_are_those_of_a_real_step(stage, micro_batch_size):
    module = module_of(stage, micro_batch_size=micro_batch_size)
    counted = rehearse(module, SHAPE, 12, NUM_BATCHES, "32-true")
    real = for_real(module, 12)  # three micro-batches of 4
    labels = 0 if micro_batch_size is None else 8 * 12  # of the whole batch, in each part of it
    assert counted.kept == pytest.approx(real.kept, abs=labels) and real.kept > 100_000
    assert counted.most == pytest.approx(real.most, rel=0.01)
    assert counted.most > counted.kept


@BOTH
def test_under_autocast_they_are_but_for_the_statistics_of_norms(stage):
    module = module_of(stage)
    counted = rehearse(module, SHAPE, 12, NUM_BATCHES, "bf16-mixed")
    real = for_real(module, 12, "bf16-mixed")
    assert counted.kept == pytest.approx(real.kept, rel=0.01)
    assert counted.kept < 0.9 * rehearse(module, SHAPE, 12, NUM_BATCHES, "32-true").kept


def test_on_a_gpu_norms_are_kept_in_float32():
    x = torch.randn(2, 8, 4, dtype=torch.bfloat16)
    with AsOnGPU(), torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.group_norm(x, 2).dtype == torch.float32
        assert nn.functional.normalize(x).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert nn.functional.group_norm(x, 2).dtype == torch.bfloat16
    module = module_of("tokenizer")
    on_cpu, on_gpu = (
        rehearse(module, SHAPE, 12, NUM_BATCHES, "bf16-mixed", accelerator)
        for accelerator in ("cpu", "gpu")
    )
    assert on_gpu.kept > on_cpu.kept


def test_on_a_gpu_no_way_of_attending_keeps_its_weights():
    def kept(attention, accelerator):
        module = module_of("var", dropout=0.0, attention=attention)
        return rehearse(module, SHAPE, 12, NUM_BATCHES, "bf16-mixed", accelerator).kept

    (on_gpu,) = {kept(attention, "gpu") for attention in ("auto", "mask", "per_scale", "flex")}
    assert on_gpu == kept("mask", "cpu") < kept("per_scale", "cpu")


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_blocks_that_are_computed_anew_are_not_held_until_the_backward_pass(accelerator):
    held = []
    for share in (0.0, 1.0):
        module = make_module("var", activation_checkpointing=share)
        held.append(rehearse(module, SHAPE, 12, NUM_BATCHES, "bf16-mixed", accelerator).most)
    assert held[1] < held[0]


def test_shared_memory_is_counted_once_and_weights_not_at_all():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with SavedBytes([layer.weight]) as saved:
        y = layer(x).exp()  # keeps x and its own result
        z = y.view(2, 16) * y.view(2, 16)  # keeps views of it
    assert saved.take() == bytes_of([x, y]) == 256
    assert saved.take() == 0
    z.sum().backward()
    assert x.grad is not None


def test_a_micro_batch_keeps_its_share_of_what_the_whole_batch_would():
    whole, micro = (
        rehearse(module_of("var", micro_batch_size=size), SHAPE, 12, NUM_BATCHES, "32-true").kept
        for size in (None, 4)
    )
    assert micro == pytest.approx(whole / 3, rel=0.1)


def test_the_module_that_is_rehearsed_stays_as_it_is():
    module = module_of("tokenizer")
    before = copy.deepcopy(module.state_dict())
    rehearse(module, SHAPE, 4, NUM_BATCHES, "32-true")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.adversary.adaptive_weight == 0 and not hasattr(module, "factor")


# -- what is there all the time -----------------------------------------------------------


@BOTH
@pytest.mark.parametrize("make", [AdamW, functools.partial(SGD, momentum=0.9), SGD])
def test_moments_are_those_of_a_real_optimizer_after_a_step(stage, make):
    module = module_of(stage, optimizer=functools.partial(make, lr=0.1))
    counted = [moments_of(o) for o in ready(module).configure_optimizers()]
    module.setup("fit")
    for optimizer, expected in zip(module.configure_optimizers(), counted, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values()]
        assert expected == bytes_of([v for v in states if isinstance(v, torch.Tensor)])
        if make is AdamW:
            assert expected == 2 * bytes_of(parameters) + 4 * len(parameters)


@BOTH
def test_a_checkpoint_is_as_large_as_the_one_that_is_written(stage, digits, tmp_path):
    needs = estimate_memory(ready(make_module(stage)), **options())
    run(stage, digits, tmp_path)
    written = (tmp_path / stage / "last.ckpt").stat().st_size
    assert needs.checkpoint < written < needs.checkpoint + 400_000  # names and plain data
    assert sum(f.stat().st_size for f in (tmp_path / stage).glob("*.ckpt")) < checkpoints_bytes(
        [written]
    )
    assert len(list((tmp_path / stage).glob("*.ckpt"))) <= KEPT


def options(**changes):
    return {
        "image_shape": SHAPE,
        "share": 8,
        "num_batches": NUM_BATCHES,
        "samples": 5,
        "precision": "32-true",
        "accelerator": "cpu",
    } | changes


def test_every_byte_of_a_module_is_counted_where_it_belongs():
    module = module_of("tokenizer", optimizer=functools.partial(AdamW, lr=0.1))
    needs = estimate_memory(ready(module), **options())
    network = bytes_of([*module.tokenizer.parameters(), *module.tokenizer.buffers()])
    adversary = bytes_of([*module.adversary.parameters(), *module.adversary.buffers()])
    assert (needs.weights, needs.average, needs.others) == (network, network, adversary)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert needs.gradients == bytes_of(trained)
    assert needs.steady == needs.weights + needs.average + needs.moments + needs.others
    assert needs.training == needs.steady + needs.step


def test_parameters_are_told_by_whether_they_are_trained():
    numbers = parameters_of(ready(module_of("var")))
    assert numbers["transformer"].frozen == numbers["tokenizer"].trained == 0
    assert numbers["averaged_transformer"] == (0, numbers["transformer"].trained)
    frozen = parameters_of(ready(make_module("tokenizer", freeze=["encoder"])))["tokenizer"]
    assert 0 < frozen.frozen and 0 < frozen.trained


def test_keys_and_values_are_those_of_samples_with_and_without_their_class():
    transformer = tiny_transformer()
    cache = transformer.make_cache(10)
    assert cache_of(transformer, 5) == bytes_of([cache.keys, cache.values])
    assert cache_of(nn.Linear(2, 2), 5) == 0


# -- devices ------------------------------------------------------------------------------


def test_shards_split_what_is_trained_and_data_parallelism_does_not():
    one = estimate_memory(ready(module_of("var")), **options())
    assert one.shared(Devices(1, 1)) == one
    ddp, fsdp = one.shared(Devices(2, 2, 1, True)), one.shared(Devices(2, 2, 4))
    assert ddp.weights == one.weights and ddp.gradients == 2 * one.gradients
    assert ddp.training == one.training + one.gradients
    assert one.step - fsdp.step == one.gradients - one.gradients // 4
    for name in ("weights", "average", "moments", "gradients"):
        assert getattr(fsdp, name) == getattr(one, name) // 4
    assert fsdp.others == one.others and fsdp.kept == one.kept
    assert fsdp.whole == one.weights + one.average and one.whole == 0
    assert fsdp.checkpoint == one.checkpoint


@pytest.mark.parametrize(
    "trainer, expected",
    [
        ({"devices": 1, "num_nodes": 1, "strategy": "auto"}, Devices(1, 1)),
        ({"devices": "auto"}, Devices(3, 1, 1, True)),
        ({"devices": [0, 2], "num_nodes": 2, "strategy": "ddp"}, Devices(2, 2, 1, True)),
        ({"devices": 8, "num_nodes": 4, "strategy": "fsdp"}, Devices(8, 4, 32)),
        (
            {"devices": 2, "strategy": {"_target_": "var_exp.training.fsdp.Sharded"}},
            Devices(2, 1, 2),
        ),
    ],
)
def test_devices_are_read_off_the_trainers_arguments(trainer, expected):
    assert devices_of(trainer, 3) == expected


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"devices": "two"}, {"num_nodes": 0}])
def test_a_wrong_number_of_devices_is_refused(wrong):
    with pytest.raises(ValueError, match="trainer.devices, trainer.num_nodes"):
        devices_of({"devices": 1} | wrong, 1)
