"""`python train.py check=true` finds everything that is wrong in one go, and writes nothing."""

from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from helpers.command import QUICK, composed, files, run
from tests.experiment.test_configs import every
from var_exp.experiment import build
from var_exp.experiment.build import PERCEPTUAL, without_parts
from var_exp.experiment.config.checks import trained
from var_exp.experiment.preflight.images import balance_of, look
from var_exp.experiment.preflight.report import Findings
from var_exp.experiment.preflight.resources import estimate_memory, parameters_of, ready

FOLDER = ["data=image_folder", "data.image_size=32", "scales.patch_nums=[1,2,4]"]
GB = 10**9


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)  # torch.hub's, empty
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, of 30 and 2 pictures."""
    rng = np.random.default_rng(0)
    for name, number in (("cats", 30), ("dogs", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(number):
            picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def checked(tmp_path: Path, *overrides: str, check: str = "true"):
    """A check, which leaves everything as it was."""
    before = everything(tmp_path)
    done = run("train", f"check={check}", f"runs_dir={tmp_path}/runs", *QUICK, *overrides)
    assert everything(tmp_path) == before
    assert "Traceback" not in done.err
    return done


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def said(done, kind: str) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith(f"{kind}: ")]


def assert_one(lines: list[str], *named: str) -> None:
    """Exactly one of the lines has all of these."""
    found = [line for line in lines if all(name in line for name in named)]
    assert len(found) == 1, f"{named} in {lines}"


# -- a job that is well -------------------------------------------------------------------


def test_a_job_that_is_well_is_told_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = checked(tmp_path, "model.tokenizer.val_every=3")
    assert done.code == 0 and not said(done, "error") and not said(done, "warning")
    for what in (
        *("stage tokenizer", "stage var", "39,692 trained", "not trained", "averaged_transformer"),
        *("4, that is 0.0 epochs, 64 images seen", "16 = 1 devices x 1 machines x 16"),
        *("memory in training", "kept for backward", "gradients", "keys and values"),
        *("stage tokens", "1,437 to train on, 360 to validate", "30 of 2 bytes", "115.0 kB"),
        *("every 3 batches", "all checkpoints", "free disk", f"{tmp_path}/runs/digits/"),
        *("1,437 of 1,437 looked at, 0 of them", "139 (8) to 146 (3) images"),
        "check: 0 errors, 0 warnings",
    ):
        assert what in done.out, what


def test_a_run_folder_that_can_be_gone_on_with_is_left_as_it_is(copied, tmp_path):
    before = files(copied)
    done = checked(tmp_path, f"run_dir={copied}", "logger=default")
    assert done.code == 0, done.err
    done = checked(tmp_path, f"run_dir={copied}", "logger=default", "transformer.depth=2")
    assert done.code == 1
    assert_one(said(done, "error"), "resume", "networks.transformer.depth 1", "2")
    assert files(copied) == before


@pytest.mark.parametrize("kind", ["run folder", "published"])
def test_a_tokenizer_that_is_there_is_read(kind, trained, published, tmp_path):
    options = ["stages=[var]", f"tokenizer_ckpt={trained}", f"init_from={trained}"]
    if kind == "published":
        path = published / "vae_ch160v4096z32.pth"
        options = ["stages=[var]", f"tokenizer_ckpt={path}", "data=shapes", "data.image_size=64"]
        options += ["scales.patch_nums=[1,2,4]"]
    done = checked(tmp_path, *options)
    assert done.code == 0, done.err
    assert "stage var" in done.out and "stage tokenizer" not in done.out


# -- mistakes -----------------------------------------------------------------------------


def test_every_mistake_of_a_job_is_found_in_one_run(images, tmp_path, monkeypatch):
    for name in ("0.png", "7.png"):
        whole = (images / "cats" / name).read_bytes()
        (images / "cats" / name).write_bytes(whole[:200])
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(GB, GB, 1000))
    monkeypatch.setattr("os.access", lambda place, mode: False)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 3)
    monkeypatch.setattr("var_exp.experiment.preflight.stages.device_memory", lambda *_: 1000)
    done = checked(
        tmp_path,
        *FOLDER,
        f"data.root={images}",
        "trainer.precision=16-true",
        "objective=none/loss",
        "evaluation=inception",
        "evaluation.reference=nowhere.npz",
        "adversary=dino",
        "model.tokenizer.loss.lpips=1",
        "+model.tokenizer.loss.perceptual._target_=var_exp.tokenizer.lpips.LPIPS",
        "transformer.num_heads=3",
    )
    errors, warnings = said(done, "error"), said(done, "warning")
    assert done.code == 1
    for named in (
        ["trainer.precision", "'16-true'"],
        ["objective", "'none/loss'"],
        ["evaluation.reference", "nowhere.npz"],
        ["Inception", "weights-inception", "is missing", "evaluation.weights=PATH"],
        ["VGG", "vgg16", "is missing", "loss.perceptual.weights=PATH"],
        ["DINO", "is missing", "adversary.discriminator.weights=PATH"],
        ["transformer.num_heads", "3"],
        ["disk", "free at", str(tmp_path / "runs")],
        ["no permission", str(tmp_path), "runs/image_folder/"],
        ["train images cannot be used", "cannot read the image", f"{images}/cats/"],
        ["memory: a training step of stage tokenizer", "micro_batch_size", "1.0 kB"],
    ):
        assert_one(errors, *named)
    assert_one(warnings, "this machine has 3 GPUs", "CPU")
    assert_one(warnings, "classes are uneven", "(dogs)", "(cats)")
    assert f"{len(errors)} errors, {len(warnings)} warnings" in done.out


def test_values_out_of_range_are_all_named_before_anything_else_is_looked_at(tmp_path):
    done = run(
        *("train", "check=true", f"runs_dir={tmp_path}", "evaluation.num_samples=1"),
        *("sampling.top_p=2", "model.var.class_dropout_prob=2"),
    )
    (line,) = done.err.splitlines()
    for named in ("evaluation.num_samples: ", "sampling.top_p: ", "var.class_dropout_prob: "):
        assert named in line and done.code == 1


@pytest.mark.parametrize(
    "options, named",
    [
        (["stages=[tokeniser]"], ["stages", "tokeniser"]),
        (["stages=[var]"], ["tokenizer_ckpt=PATH"]),
        (["stages=[var]", "tokenizer_ckpt=none.pth"], ["tokenizer_ckpt=none.pth"]),
        (["init_from=none.pth"], ["init_from=none.pth"]),
        (["data.image_size=0"], ["image_size is 0"]),
        (["scales.patch_nums=[1,2,3]"], ["(3, 3)", "(16, 16) / 4", "scales.patch_nums"]),
        (["model.var.num_batches=0"], ["model.var", "num_batches", "0"]),
        (["model.var.batch_size=0"], ["model.var", "batch_size", "0"]),
        (["model.var.epochs=2"], ["model.var", "num_batches or epochs"]),
        (["trainer.devices=3"], ["model.var", "batch of 16", "3 processes", "15 or 18"]),
        (["trainer.devices=8", "trainer.num_nodes=4"], ["model.var", "32 processes", "to 32"]),
        (["trainer.devices=none"], ["trainer.devices", "'none'"]),
        (["data=mnist", "data.root=nowhere"], ["mnist", "nowhere/MNIST/raw"]),
        (FOLDER, ["image_folder", "data.root=DIR"]),
        (["+transformer.colour=red"], ["colour"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_named(options, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = checked(tmp_path, *options)
    assert done.code == 1
    assert_one(said(done, "error"), *named)


def test_what_cannot_be_built_does_not_hide_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["stages=[var]", "tokenizer_ckpt=none.pth", "data=imagenet"]
    done = checked(tmp_path, *options, "model.var.num_batches=null")
    assert_one(said(done, "error"), "tokenizer_ckpt=none.pth")
    assert_one(said(done, "error"), "datasets/imagenet", "is not a folder")
    assert "stage var" in done.out and "not known without the images" in done.out


def test_a_trainer_for_gpus_is_checked_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = checked(tmp_path, "trainer=ddp")
    assert done.code == 0, done.err
    assert_one(said(done, "warning"), "no GPU", "memory")
    assert_one(said(done, "warning"), "trainer.devices=8")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    done = checked(tmp_path, "trainer=ddp", "trainer.devices=4")
    assert_one(said(done, "error"), "at most the 2 GPUs", "got 4")


def test_an_unknown_kind_of_check_is_refused(tmp_path):
    done = run("train", "check=some", f"runs_dir={tmp_path}/runs", *QUICK)
    assert done.code == 1 and "expected true or false or 'all', got 'some'" in done.err
    assert not list(tmp_path.rglob("digits"))


# -- images -------------------------------------------------------------------------------


def test_images_that_are_skipped_are_a_warning(images, tmp_path):
    (images / "cats" / "3.png").write_text("no picture")
    options = [*FOLDER, f"data.root={images}", "data.on_bad_image=skip"]
    done = checked(tmp_path, *options, check="all")
    assert done.code == 0, done.err
    assert_one(said(done, "warning"), "1 images do not decode", f"{images}/cats/3.png")


def test_small_and_grey_images_are_told(images, tmp_path):
    for path in images.rglob("*.png"):
        Image.open(path).convert("L").resize((20, 20)).save(path)
    done = checked(tmp_path, *FOLDER, f"data.root={images}")
    assert done.code == 0, done.err
    assert_one(said(done, "warning"), "train images are smaller than (32, 32)")
    assert_one(said(done, "warning"), "all train images looked at are grey")


def test_a_look_is_the_same_for_the_same_seed_and_stops_in_time(digits, monkeypatch):
    monkeypatch.setattr("var_exp.experiment.preflight.images.NUM_LOOKED_AT", 24)
    looks = [look(digits, "val", seed=seed, num_workers=0) for seed in (0, 0, 1)]
    assert [len(found.looks) for found in looks] == [24] * 3 and looks[0].total == 360
    assert looks[0] == looks[1]
    assert len(look(digits, "val", seed=0, num_workers=0, everything=True).looks) == 360
    monkeypatch.setattr("var_exp.experiment.preflight.images.SECONDS", 0.0)
    assert 0 < len(look(digits, "train", seed=0, num_workers=0).looks) < 24


def test_an_image_of_another_size_than_the_source_says_is_found(digits, monkeypatch):
    monkeypatch.setattr(digits, "image_size", (8, 8))
    problems = look(digits, "val", seed=0, num_workers=0).problems
    assert len(problems) == 360 and "(1, 16, 16), expected (1, 8, 8)" in problems[0]


def test_classes_without_images_are_named(digits):
    balance = balance_of(digits.train, [*digits.class_names, "ten"])
    assert balance.empty == ["ten"] and balance.smallest == ("ten", 0)
    assert balance.largest == ("3", 146)
    assert balance_of(digits.train, ()) is None


# -- the networks of every experiment -----------------------------------------------------


@every("experiment")
def test_the_networks_of_every_experiment_are_built_without_memory(name):
    cfg = composed("train", f"experiment={name}")
    source = instantiate(cfg.data, _convert_="all")
    tokenizer = build.new_tokenizer(cfg, source, "meta")
    networks = {"tokenizer": tokenizer}
    networks["transformer"] = build.transformer(cfg, source, tokenizer, "meta")
    for stage in trained(cfg):
        chosen = networks if stage == "var" else {"tokenizer": tokenizer}
        alone = without_parts(cfg, [PERCEPTUAL, "adversary"])
        module = ready(build.module(alone.model[stage], chosen))
        assert all(tensor.device.type == "meta" for tensor in module.state_dict().values())
        assert parameters_of(module)[module.network_name].trained > 100_000


def test_the_step_of_a_small_experiment_is_measured_as_a_gpu_would_take_it():
    cfg = composed("train", "experiment=cifar10_d8")
    source = instantiate(cfg.data, _convert_="all")
    tokenizer = build.new_tokenizer(cfg, source, "meta")
    module = build.module(cfg.model.tokenizer, {"tokenizer": tokenizer})
    needs = estimate_memory(
        ready(module),
        image_shape=(3, 32, 32),
        share=128,
        num_batches=100,
        samples=1,
        precision="bf16-mixed",
        accelerator="gpu",
    )
    assert needs.kept < needs.step < 80 * GB


def test_findings_are_told_once_and_errors_decide_the_exit_code(capsys):
    found = Findings()
    assert found.attempt(int, "3") == 3 and found.tell() == 0
    found.warn("careful")
    assert found.tell() == 0
    for _ in range(2):
        assert found.attempt(int, "three") is None
    found.attempt(torch.zeros(2).__getitem__, 5)
    assert found.tell() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and "three" in errors[0] and "IndexError" in errors[1]
