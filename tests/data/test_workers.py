"""Loading processes: a number that fits the machine unless it is given, and the same batches."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import stages
from helpers.exact_loading import BATCH, NUM_BATCHES, batches, loaders, write_images
from var_exp.data import Digits, ImageDataModule, ImageFolder, Shapes
from var_exp.data.workers import cores_of_process, number_of_workers
from var_exp.experiment.resume import is_free

SLURM = ("SLURM_CPUS_PER_TASK", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many usable cores, and what Slurm says of a task on it."""

    def make(cores, **slurm):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 1000)
        for name in SLURM:
            monkeypatch.delenv(name, raising=False)
        for name, value in slurm.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return make


@pytest.fixture
def folder(tmp_path):
    return ImageFolder(str(write_images(tmp_path)), image_size=16)


# -- how many -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cores, processes, expected",
    [
        (1, 1, 0),  # nobody would train meanwhile
        (2, 1, 1),
        (8, 1, 7),
        (8, 2, 3),
        (8, 4, 1),
        (8, 8, 0),
        (2, 8, 0),
        (17, 1, 16),
        (128, 1, 16),
        (128, 8, 15),
    ],
)
def test_all_cores_load_but_one_which_trains(cores, processes, expected, machine):
    machine(cores)
    assert number_of_workers("auto", processes) == expected


@pytest.mark.parametrize(
    "cores, processes, slurm, expected",
    [
        # Eight tasks of srun, each bound to its own eight cores or not bound at all.
        (8, 8, {"CPUS_PER_TASK": 8, "STEP_NUM_TASKS": 8}, 8),
        (64, 8, {"CPUS_PER_TASK": 8, "STEP_NUM_TASKS": 8}, 8),
        (8, 8, {"CPUS_PER_TASK": 8, "STEP_NUM_TASKS": 16, "STEP_NUM_NODES": 2}, 8),
        # One task for each node, which starts eight processes: torchrun, or Lightning.
        (64, 8, {"CPUS_PER_TASK": 64, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 2}, 8),
        (64, 8, {"CPUS_PER_TASK": 64}, 8),
        # Without --cpus-per-task the cores are those of the machine, or the one that it binds to.
        (64, 8, {"STEP_NUM_TASKS": 8}, 8),
        (1, 8, {"STEP_NUM_TASKS": 8}, 1),
    ],
)
def test_a_task_of_slurm_has_cores_of_its_own(cores, processes, slurm, expected, machine):
    machine(cores, **slurm)
    assert cores_of_process(processes) == expected


def test_a_number_is_taken_as_it_is(machine):
    machine(4)
    assert [number_of_workers(asked, 8) for asked in (0, 1, 40)] == [0, 1, 40]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_workers": -1}, "num_workers: expected 'auto' or a number >= 0, got -1"),
        ({"num_workers": "all"}, "num_workers: expected .*, got 'all'"),
        ({"num_workers": True}, "num_workers: expected .*, got True"),
        ({"num_workers": 2.0}, "num_workers: expected .*, got 2.0"),
        ({"pin_memory": "yes"}, "pin_memory: expected true or false or 'auto', got 'yes'"),
        ({"pin_memory": 1}, "pin_memory: expected .*, got 1"),
        ({"prefetch": 0}, "prefetch: expected a number >= 1, got 0"),
    ],
    ids=str,
)
def test_what_is_no_number_of_workers_is_refused_by_its_option(options, named):
    with pytest.raises(ValueError, match=named):
        ImageDataModule(Digits(), **options)


# -- of which images ----------------------------------------------------------------------


def placed(source, device="cpu", num_devices=1, **options):
    """Loaders of a run on a device."""
    source.setup()
    made = ImageDataModule(source, **options)
    strategy = SimpleNamespace(root_device=torch.device(device))
    made.trainer = SimpleNamespace(
        global_rank=0, world_size=1, num_devices=num_devices, strategy=strategy
    )
    made.plan(BATCH, NUM_BATCHES)
    return made


def test_images_that_are_decoded_have_workers_and_those_in_memory_none(folder, machine):
    machine(8)
    for source, expected in ((folder, 3), (Digits(), 0), (Shapes(), 0), (Shapes(image_size=65), 3)):
        made = placed(source, num_devices=2, num_workers="auto", prefetch=5)
        for loader in (made.train_dataloader(), made.val_dataloader()):
            assert loader.num_workers == expected
            assert loader.prefetch_factor == (5 if expected else None)
            assert loader.persistent_workers == (expected > 0)


def test_batches_are_page_locked_where_a_gpu_is_used(monkeypatch):
    for device, asked, expected in (
        ("cpu", "auto", False),
        ("cuda:1", "auto", True),
        ("mps", "auto", False),  # its memory is that of the CPU
        ("cuda:1", False, False),
        ("cpu", True, True),
    ):
        loader = placed(Digits(), device, pin_memory=asked).train_dataloader()
        assert loader.pin_memory == expected


def test_without_a_trainer_this_is_the_only_process_and_has_no_gpu(folder, machine):
    machine(4)
    folder.setup()
    made = ImageDataModule(folder, num_workers="auto", pin_memory="auto")
    loader = made.val_dataloader()
    assert (loader.num_workers, loader.pin_memory) == (3, False)


# -- the same batches ---------------------------------------------------------------------


def test_the_chosen_workers_load_the_batches_that_this_process_would(folder, machine):
    alone = batches(folder)
    machine(3)
    for prefetch in (1, 4):
        made = placed(folder, seed=3, num_workers="auto", prefetch=prefetch)
        assert made.train_dataloader().num_workers == 2
        found = [
            [
                (image.numpy().tobytes(), label.item(), index.item())
                for image, label, index in zip(*batch, strict=True)
            ]
            for batch in made.train_dataloader()
        ]
        assert found == alone


def test_the_chosen_workers_validate_the_images_that_this_process_would(folder, machine):
    alone = [image for batch in loaders(folder).val_dataloader() for image in batch.images]
    machine(3)
    made = placed(folder, num_workers="auto")
    together = [image for batch in made.val_dataloader() for image in batch.images]
    assert len(alone) == 3 and all(map(torch.equal, alone, together))


class CostlyDigits(Digits):
    costly = True


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_a_run_with_the_chosen_workers_is_the_run_without(stage, machine, monkeypatch, tmp_path):
    source = CostlyDigits()
    source.setup()
    _, alone = stages.run(stage, source, tmp_path / "alone")
    machine(3)
    chosen = partial(ImageDataModule, num_workers="auto", pin_memory="auto")
    monkeypatch.setattr(stages, "ImageDataModule", chosen)
    _, losses = stages.run(stage, source, tmp_path / "workers")
    assert losses == alone and len(losses) == stages.NUM_BATCHES
    ours, theirs = (stages.weights(tmp_path / name, stage) for name in ("workers", "alone"))
    stages.assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["num_workers", "pin_memory", "prefetch"])
def test_a_run_may_go_on_with_other_ways_of_loading(name):
    assert is_free(f"datamodule.{name}", ["tokenizer", "var"])
