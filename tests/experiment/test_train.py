"""`python train.py` leaves the run folder that the README promises, does what each option says,
and does it again to the bit."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from helpers.command import QUICK, composed_with_hydra, files, run
from helpers.programs import run_forked
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.training import VARModule

SAMPLES = {"grid.png", "coarse_to_fine.png", "steps.npz", "neighbours.png"}
PARTS = {"train-0000-00000.npy", "val-00000.npy"}
PICTURES = SAMPLES | {"reconstructions.png"}
SCORES = ("fid", "inception_score", "kid", "precision", "recall")
TOKENIZER_FIGURES = {
    *("l1", "l2", "psnr", "ssim", "seconds"),
    *(f"r{score}_classifier" for score in SCORES),
    *("class_accuracy_real_classifier", "class_accuracy_classifier"),
}
VAR_FIGURES = {
    *("loss", "acc", "loss_last_scale", "acc_last_scale", "seconds"),
    *(f"{score}_classifier" for score in SCORES),
    *("class_accuracy_classifier", "neighbour_ratio_classifier"),
}


def figures(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in content.items() if key != "protocol"}


def timeless(folder: Path) -> dict[str, float]:
    """All figures but how long it took."""
    return {k: v for k, v in figures(folder).items() if not k.endswith("/seconds")}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_classifier(folder: Path, trained: Path) -> Path:
    """A run folder that holds nothing but the digits' classifier, which takes long to train."""
    (folder / "evaluation").mkdir(parents=True)
    shutil.copy(trained / "evaluation" / "classifier.pt", folder / "evaluation")
    return folder


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier that is trained for moments: the scores mean nothing, but are there."""
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 3)


# -- the run folder -----------------------------------------------------------------------


def test_a_run_leaves_the_documented_folders_and_nothing_else(trained):
    expected = {".hydra", "tokenizer", "var", "samples", "evaluation", "csv", "wandb", "tokens"}
    assert names(trained) == expected | {"metrics.json", "environment.json", "report.html"}
    assert names(trained / ".hydra") == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    kept = {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert names(trained / "tokens") == {"tokens.json", *PARTS}
    stage = kept | {"curves.png", "pictures", "wandb_id"}
    assert names(trained / "var") == stage
    assert names(trained / "tokenizer") == stage | {"codebook.png"}
    assert names(trained / "samples") == PICTURES
    assert names(trained / "evaluation") == {"classifier.pt"}
    for path, content in files(trained).items():
        assert content or path.startswith("wandb/"), f"{path} is empty"


def test_the_run_folder_is_named_by_the_images_and_the_time_and_latest_points_to_it(finished):
    place, _ = finished
    assert names(place) == {"runs"}
    assert names(place / "runs") == {"digits", "latest", "references"}
    (folder,) = (place / "runs" / "digits").iterdir()
    assert (place / "runs" / "latest").is_symlink()
    assert not (place / "runs" / "latest").readlink().is_absolute()
    assert (place / "runs" / "latest").resolve() == folder.resolve()


@pytest.mark.parametrize("name", sorted(PICTURES - {"steps.npz"}))
def test_every_picture_shows_something(name, trained):
    pixels = np.asarray(Image.open(trained / "samples" / name))
    assert pixels.shape[2] == 3 and min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels)) > 16


def test_the_grid_has_a_row_for_each_class_and_the_strip_a_column_for_each_scale(trained):
    grid = Image.open(trained / "samples" / "grid.png")
    strip = Image.open(trained / "samples" / "coarse_to_fine.png")
    reconstructed = Image.open(trained / "samples" / "reconstructions.png")
    assert grid.height > 10 * 64 and grid.width > 10 * 64
    assert strip.height > 10 * 64 and 4 * 64 < strip.width < 7 * 64
    assert 5 * 64 < reconstructed.height < 7 * 64 and reconstructed.width > 12 * 64


def test_metrics_are_flat_finite_and_name_their_stage(trained):
    found = figures(trained)
    assert all(type(value) in (int, float) and np.isfinite(value) for value in found.values())
    assert all(key.count("/") == 1 for key in found)
    scales = "1234"
    tokenizer = TOKENIZER_FIGURES | {
        f"{what}_scale_{p}" for what in ("usage", "perplexity") for p in scales
    }
    var = VAR_FIGURES | {
        f"{what}_scale_{p}" for what in ("loss", "acc", "fid_classifier") for p in scales
    }
    expected = {f"tokenizer/{name}" for name in tokenizer} | {f"var/{name}" for name in var}
    assert set(found) == expected
    assert found["tokenizer/seconds"] > 0 and found["var/seconds"] > 0
    assert 0 < found["tokenizer/psnr"] < 60
    assert found["tokenizer/class_accuracy_real_classifier"] > 0.95


def test_the_csv_of_each_stage_holds_its_curve(trained):
    for stage, name in (("tokenizer", "val/psnr"), ("var", "val/loss")):
        with open(trained / "csv" / stage / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        curve = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        losses = [row["train/loss"] for row in rows if row["train/loss"]]
        assert len(curve) == 2 and len(losses) == 4
        best = max(curve.values()) if stage == "tokenizer" else min(curve.values())
        assert figures(trained)[f"{stage}/{name.removeprefix('val/')}"] == pytest.approx(best)


def test_wandb_keeps_a_run_of_each_stage_offline(trained):
    runs = [path for path in (trained / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(any(path.suffix == ".wandb" for path in run.iterdir()) for run in runs)


def test_a_run_ends_with_a_table_of_what_it_reached_and_where(finished, trained):
    _, done = finished
    begun, _, _, *rows = done.out.splitlines()
    assert begun.startswith("digits: tokenizer (4 batches of") and trained.name in begun
    shown = dict(line.rsplit(maxsplit=1) for line in rows)
    for name in ("tokenizer/psnr", "var/loss", "var/class_accuracy_classifier", "var/seconds"):
        assert float(shown[name]) == pytest.approx(figures(trained)[name], rel=1e-3)
    assert any(str(trained.name) in line for line in done.out.splitlines()[-3:])
    assert "batch 4/4" in done.err and "s left" in done.err


def test_the_checkpoints_are_generators_with_the_names_of_the_classes(trained):
    networks = load_networks(trained)
    assert networks.info["stage"] == "var" and networks.info["patch_nums"] == [1, 2, 3, 4]
    assert networks.info["class_names"] == [str(digit) for digit in range(10)]
    tokenizer = load_networks(trained / "tokenizer").tokenizer
    assert networks.info["tokenizer_fingerprint"] == tokenizer.fingerprint()


# -- the same again -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_figures_and_pictures_to_the_bit(trained, tmp_path):
    folder = with_classifier(tmp_path / "run", trained)
    done = run("train", f"run_dir={folder}", f"runs_dir={tmp_path}", "seed=0", *QUICK)
    assert done.code == 0, done.err
    assert timeless(folder) == timeless(trained)
    assert files(folder / "samples") == files(trained / "samples")


def test_a_finished_run_that_is_started_again_only_looks_at_itself_again(copied, trained, tmp_path):
    done = run("train", f"run_dir={copied}", f"runs_dir={tmp_path}", *QUICK)
    assert done.code == 0 and "batch" not in done.err
    assert timeless(copied) == timeless(trained)
    assert files(copied / "samples") == files(trained / "samples")
    for stage in ("tokenizer", "var"):
        for name in ("best.ckpt", "last.ckpt"):
            path = Path(stage) / name
            assert (copied / path).read_bytes() == (trained / path).read_bytes()


def test_resume_never_trains_anew(copied, tmp_path):
    options = ["resume=never", "stages=[tokenizer]", f"runs_dir={tmp_path}"]
    done = run("train", f"run_dir={copied}", *options, *QUICK)
    assert done.code == 0, done.err
    assert "tokenizer: batch 1/4" in done.err and "tokenizer: batch 4/4" in done.err


def test_an_interrupted_run_that_is_started_again_is_the_whole_run(trained, tmp_path, monkeypatch):
    folder = with_classifier(tmp_path / "run", trained)
    command = ["train", f"run_dir={folder}", f"runs_dir={tmp_path}", *QUICK]
    whole, seen = VARModule.training_step, []

    def cut_off(module, batch, number):
        seen.append(number)
        if len(seen) == 4:
            raise RuntimeError("the power fails")
        return whole(module, batch, number)

    monkeypatch.setattr(VARModule, "training_step", cut_off)
    assert run(*command).code == 1
    assert (folder / "var" / "last.ckpt").exists() and not (folder / "samples/grid.png").exists()
    monkeypatch.undo()
    done = run(*command)
    assert done.code == 0 and "tokenizer: batch" not in done.err and "var: batch 4/4" in done.err
    assert timeless(folder) == timeless(trained)
    assert files(folder / "samples") == files(trained / "samples")


# -- one stage alone ----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run folder", "file", "own folder"])
def test_one_stage_after_the_other_is_both_at_once(given, trained, tmp_path):
    first = with_classifier(tmp_path / "first", trained)
    common = [f"runs_dir={tmp_path}", *QUICK]
    shutil.copytree(trained / "tokenizer", first / "tokenizer")
    second = first if given == "own folder" else with_classifier(tmp_path / "second", trained)
    ckpt = {
        "run folder": [f"tokenizer_ckpt={first}"],
        "file": [f"tokenizer_ckpt={first}/tokenizer/best.ckpt"],
        "own folder": [],
    }[given]
    done = run("train", f"run_dir={second}", "stages=[var]", *ckpt, *common)
    assert done.code == 0, done.err
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert names(second / "samples") == SAMPLES
    whole = timeless(trained)
    assert timeless(second) == {k: v for k, v in whole.items() if k.startswith("var/")}


def test_a_run_goes_on_under_the_name_latest(trained, tmp_path):
    folder = tmp_path / "digits" / "x"
    shutil.copytree(trained, folder)
    (tmp_path / "latest").symlink_to(folder)
    done = run("train", f"run_dir={tmp_path}/latest", f"runs_dir={tmp_path}", *QUICK)
    assert done.code == 0, done.err
    assert (tmp_path / "latest").resolve() == folder.resolve()
    assert timeless(folder) == timeless(trained)


def test_the_tokenizer_alone_leaves_no_other_stage(trained, tmp_path):
    folder = with_classifier(tmp_path / "run", trained)
    done = run("train", f"run_dir={folder}", f"runs_dir={tmp_path}", "stages=[tokenizer]", *QUICK)
    assert done.code == 0, done.err
    assert names(folder / "samples") == {"reconstructions.png"}
    assert not (folder / "var").exists()
    whole = timeless(trained)
    assert timeless(folder) == {k: v for k, v in whole.items() if k.startswith("tokenizer/")}


# -- other images -------------------------------------------------------------------------


def write_images(folder: Path, count: int, side: int = 40) -> None:
    """PNG files of different modes and sizes, none like another."""
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    for i, mode in zip(range(count), "RGB L RGBA P".split() * count, strict=False):
        pixels = rng.integers(0, 256, (side + i, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


FOLDER = [
    *("data=image_folder", "data.image_size=32", "scales.patch_nums=[1,2,4]"),
    *("datamodule.num_workers=0", "tokenizer.quantizer.codebook.vocab_size=16"),
]


def test_image_folder_with_a_folder_for_each_class(tmp_path, hasty):
    for name in ("apples", "pears", "plums"):
        write_images(tmp_path / "images" / name, 8)
    run_dir = tmp_path / "run"
    options = [f"data.root={tmp_path}/images", f"run_dir={run_dir}", f"runs_dir={tmp_path}"]
    done = run("train", *FOLDER, *options, *QUICK)
    assert done.code == 0, done.err
    assert names(run_dir / "samples") == PICTURES
    assert "var/class_accuracy_classifier" in figures(run_dir)
    networks = load_networks(run_dir)
    assert networks.info["class_names"] == ["apples", "pears", "plums"]
    assert networks.transformer.num_classes == 3
    assert networks.tokenizer.encoder.config["in_channels"] == 3


def test_image_folder_without_classes_trains_and_samples_without_classes(tmp_path, hasty):
    write_images(tmp_path / "images", 24)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    options = [f"data.root={tmp_path}/images", f"run_dir={run_dir}", f"runs_dir={tmp_path}"]
    done = run("train", *FOLDER, *options, *QUICK)
    assert done.code == 0, done.err
    assert names(run_dir / "samples") == PICTURES
    found = figures(run_dir)
    assert not [key for key in found if "class_accuracy" in key]
    assert {"var/fid_classifier", "var/inception_score_classifier"} <= set(found)
    assert load_networks(run_dir).transformer.num_classes == 0
    done = run("sample", f"ckpt={run_dir}", f"out_dir={out}", "num_samples=3")
    assert done.code == 0, done.err
    with np.load(out / "samples.npz") as saved:
        assert saved["arr_0"].shape == (3, 32, 32, 3) and saved["arr_1"].tolist() == [0, 0, 0]


def test_shapes_are_judged_from_pixels_without_a_network(tmp_path, hasty):
    run_dir = tmp_path / "run"
    small = ["data.num_train=96", "data.num_val=24", "evaluation.num_samples=12"]
    options = ["data=shapes", f"run_dir={run_dir}", f"runs_dir={tmp_path}"]
    done = run("train", *options, *QUICK, *small)
    assert done.code == 0, done.err
    # The classifier was hardly trained: only the judge of the pixels can be right every time.
    assert figures(run_dir)["tokenizer/class_accuracy_real_pixels"] >= 0.95
    assert len(load_networks(run_dir).info["class_names"]) == 12
    assert (tmp_path / "latest").resolve() == run_dir.resolve()


# -- Hydra's habits -----------------------------------------------------------------------


def test_a_sweep_runs_every_point_into_a_folder_of_its_own(trained, tmp_path):
    for point in "01":
        with_classifier(tmp_path / "sweep" / point, trained)
    options = ["stages=[tokenizer]", "hydra.sweep.dir=sweep", *QUICK]
    done = run_forked("train", "--multirun", "seed=0,1", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    results = [timeless(tmp_path / "sweep" / point) for point in "01"]
    assert results[0].keys() == results[1].keys() and results[0] != results[1]
    assert results[0]["tokenizer/psnr"] == timeless(trained)["tokenizer/psnr"]
    assert (tmp_path / "runs" / "latest").resolve() == (tmp_path / "sweep" / "1").resolve()


def test_cfg_job_shows_the_configuration_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--cfg", "job", "transformer.depth=7")
    assert done.code == 0
    assert "depth: 7" in done.out and "name: ${data.name}" in done.out
    assert not names(tmp_path)


def test_the_objective_is_what_a_search_gets(copied, trained, tmp_path):
    overrides = [f"runs_dir={tmp_path}", "objective=var/fid_classifier", *QUICK]
    with composed_with_hydra("train", copied, *overrides) as cfg:
        assert train.main(cfg) == figures(trained)["var/fid_classifier"]
