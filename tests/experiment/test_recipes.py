"""Whole runs of the larger recipes, in small: images twice as wide as high, the tokenizer's recipe
with perceptual and adversarial losses, and what refuses to start before anything is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from helpers.command import QUICK, run
from var_exp.checkpoint.checkpoint import load_networks


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def places(folder: Path) -> list[str]:
    return [f"run_dir={folder}/run", f"runs_dir={folder}"]


WIDE = [
    *("data=shapes", "data.image_size=[16,32]", "scales.patch_nums=[[1,2],[2,4],[4,8]]"),
    *("data.num_train=64", "data.num_val=16"),
]


@pytest.mark.parametrize(
    "block", ["adaln", *(pytest.param(b, marks=pytest.mark.slow) for b in ("shared_adaln", "gpt2"))]
)
def test_images_twice_as_wide_as_high_go_all_the_way(block, tmp_path):
    done = run("train", *WIDE, f"transformer.block={block}", *QUICK, *places(tmp_path))
    assert done.code == 0, done.err
    networks = load_networks(tmp_path / "run")
    assert networks.transformer.schedule.sizes == ((1, 2), (2, 4), (4, 8))
    found = figures(tmp_path / "run")
    assert {f"var/loss_scale_{name}" for name in ("1x2", "2x4", "4x8")} < set(found)
    out = tmp_path / "out"
    done = run("sample", f"ckpt={tmp_path}/run", f"out_dir={out}", "num_samples=3")
    assert done.code == 0, done.err
    with np.load(out / "samples.npz") as saved:
        assert saved["arr_0"].shape == (3, 16, 32, 3)


def write_images(root: Path, classes: int = 2, count: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(classes):
            folder = root / split / f"n{c:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def vgg(tmp_path):
    """VGG-16's file, as torchvision stores it, with weights that were never trained."""
    with torch.device("meta"):
        features = vgg16(weights=None).features
    state = {
        f"features.{name}": 0.03 * torch.randn(tensor.shape)
        for name, tensor in features.state_dict().items()
    }
    torch.save(state, tmp_path / "vgg16.pth")
    return tmp_path / "vgg16.pth"


# The experiment at full size differs in these values and in nothing else.
SMALL = [
    *("trainer=cpu", "trainer.log_every_n_steps=1"),
    *("data.image_size=32", "data.expected_classes=null", "scales.patch_nums=[1,2]"),
    *("tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1,1,1,1]"),
    *("tokenizer.encoder.num_res_blocks=1", "tokenizer.quantizer.codebook.vocab_size=16"),
    *("adversary.discriminator.width=8", "adversary.discriminator.num_layers=2"),
    *("adversary.start=2", "adversary.ramp=1", "datamodule.num_workers=0", "logger=csv"),
    *("model.tokenizer.batch_size=4", "model.tokenizer.epochs=1", "model.tokenizer.val_every=3"),
    "model.tokenizer.micro_batch_size=2",
]


def test_the_tokenizers_recipe_trains_small_on_a_cpu(tmp_path, vgg):
    options = [f"data.root={write_images(tmp_path / 'images')}", *SMALL, *places(tmp_path)]
    options.append(f"model.tokenizer.loss.perceptual.weights={vgg}")
    done = run("train", "stages=[tokenizer]", "experiment=imagenet256_tokenizer", *options)
    assert done.code == 0, done.err
    found = figures(tmp_path / "run")
    expected = {
        "psnr",
        "ssim",
        "lpips",
        "rfid_classifier_var",
        "usage_scale_1",
        "perplexity_scale_2",
    }
    assert {f"tokenizer/{name}" for name in expected} < set(found)
    rows = (tmp_path / "run" / "csv" / "tokenizer" / "metrics.csv").read_text()
    for term in ("l1", "l2", "lpips", "codebook", "adversarial", "discriminator_loss"):
        assert f"train/{term}" in rows
    # Whoever looks for the weights of others in our checkpoint finds none.
    names = torch.load(tmp_path / "run/tokenizer/last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in names} == {
        "tokenizer",
        "averaged_tokenizer",
        "adversary",
    }
    folder = tmp_path / "run" / "tokenizer"
    assert (folder / "curves.png").exists() and list((folder / "pictures").iterdir())


def test_the_adm_crop_is_named_in_the_reconstruction_fid(tmp_path):
    options = [f"data.root={write_images(tmp_path / 'images')}", *SMALL, *places(tmp_path)]
    options += ["model.tokenizer.loss.lpips=0", "data.crop=adm"]
    options += ["model.tokenizer.loss.perceptual=null"]
    done = run("train", "experiment=imagenet256_tokenizer", *options)
    assert done.code == 0, done.err
    assert "tokenizer/rfid_classifier_adm" in figures(tmp_path / "run")


REFUSED = {
    "vgg": (
        ["model.tokenizer.loss.perceptual.weights=nowhere/vgg16.pth"],
        "nowhere/vgg16.pth is missing",
    ),
    "dino": (
        [
            *("~adversary.discriminator.width", "~adversary.discriminator.num_layers"),
            "adversary.discriminator._target_=var_exp.tokenizer.discriminator.DinoDiscriminator",
            "+adversary.discriminator.weights=nowhere/dino.pth",
            "model.tokenizer.loss.lpips=0",
            "model.tokenizer.loss.perceptual=null",
        ],
        "nowhere/dino.pth is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_missing_weights_of_others_are_told_before_training_and_nothing_is_written(name, tmp_path):
    overrides, message = REFUSED[name]
    options = [f"data.root={write_images(tmp_path / 'images')}", *SMALL, *places(tmp_path)]
    options = [o for o in options if not (name == "dino" and o.startswith("adversary.discr"))]
    done = run("train", "experiment=imagenet256_tokenizer", *options, *overrides)
    assert done.code == 1
    (line,) = done.errors
    assert message in line and "put " in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "latest").exists()


def test_a_precision_that_harms_is_refused_and_nothing_is_written(tmp_path):
    done = run("train", "trainer.precision=16-mixed", *QUICK, *places(tmp_path))
    assert done.code == 1 and "trainer.precision" in done.errors[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "latest").exists()


def test_a_handful_of_images_is_enough(tmp_path):
    """One is left to validate on, and of one there is no FID."""
    folder = write_images(tmp_path / "images", classes=1, count=6) / "train" / "n00000000"
    options = ["data=image_folder", f"data.root={folder}", "data.image_size=32", "name=few"]
    options += ["scales.patch_nums=[1,2,4]", "tokenizer.quantizer.codebook.vocab_size=16"]
    done = run("train", *options, *QUICK, "datamodule.num_workers=0", *places(tmp_path))
    assert done.code == 0, done.err
    found = figures(tmp_path / "run")
    assert "tokenizer/psnr" in found and not [name for name in found if "rfid" in name]


def test_a_progressive_plan_that_never_reaches_the_last_scale_is_refused(tmp_path):
    plan = "model.var.progressive={_target_:var_exp.training.progressive.ProgressiveScales,"
    done = run("train", plan + "first:1,until:0.99}", *QUICK, *places(tmp_path))
    assert done.code == 1
    (line,) = done.errors
    assert "the last scale would never be trained" in line
    assert not (tmp_path / "run").exists()


def test_every_option_of_the_transformers_training_is_one_override(tmp_path):
    options = [
        "model.var.progressive="
        "{_target_:var_exp.training.progressive.ProgressiveScales,first:1,until:0.5}",
        *("model.var.label_smoothing=0.1", "model.var.scale_weights=[4,3,2,1]"),
        *("stages=[tokenizer,var]", "model.var.self_correction_prob=0.2"),  # which takes images
        *("model.var.micro_batch_size=8", "model.var.activation_checkpointing=0.5"),
        *("model.var.attention=per_scale", "model.var.optimizer.fused=false"),
        *("model.var.final_weight_decay=0.08", "transformer.rope=true"),
        *("transformer.mlp=swiglu", "transformer.norm=rms", "model.var.weights=raw"),
        *("model.var.scaling_law=true", "+expected={var/loss:[4.0,5.0]}"),
    ]
    done = run("train", *options, *QUICK, *places(tmp_path))
    assert done.code == 0, done.err
    found = figures(tmp_path / "run")
    assert found["var/reducible_loss"] == pytest.approx(found["var/loss"] - 5, abs=1e-5)
    assert "(expected 4 to 5)" in done.out
