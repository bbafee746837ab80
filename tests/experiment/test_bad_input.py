"""A mistake gets one line that names the value and where to change it, exit code 1, and leaves
nothing behind."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command import QUICK, Finished, files, run, run_for_real
from var_exp.checkpoint.checkpoint import KEY, read_checkpoint, write_checkpoint


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 3)


def assert_refused(done: Finished, *named: str) -> None:
    """One line on standard error; each of `named` is in it."""
    assert done.code == 1
    assert "Traceback" not in done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and len(line) < 1000
    for what in named:
        assert what in line


def refused_run(tmp_path: Path, overrides: list[str], *named: str) -> None:
    """`train.py` with these overrides says why not, and no run folder is left."""
    runs = tmp_path / "runs"
    done = run("train", f"runs_dir={runs}", *QUICK, *overrides)
    assert_refused(done, *named)
    assert not files(runs) and not (runs / "latest").is_symlink()


# -- training: sizes and lengths ----------------------------------------------------------


@pytest.mark.parametrize(
    "override, named",
    [
        ("scales.patch_nums=[1,2,2,4]", ["(2, 2) after (2, 2)", "scales.patch_nums"]),
        ("scales.patch_nums=[1,3,2,4]", ["(2, 2) after (3, 3)", "scales.patch_nums"]),
        ("scales.patch_nums=[]", ["at least one", "scales.patch_nums"]),
        ("scales.patch_nums=[0,4]", ["got 0", "scales.patch_nums"]),
        ("scales.patch_nums=[1,2,3]", ["(3, 3)", "(16, 16) / 4", "scales.patch_nums"]),
        ("data.image_size=24", ["(4, 4)", "(24, 24) / 4", "data.image_size"]),
        ("data.image_size=0", ["image_size is 0", "data.image_size"]),
        ("tokenizer.quantizer.codebook.vocab_size=1", ["got 1", "codebook.vocab_size"]),
        ("transformer.num_heads=3", ["32", "3", "transformer.num_heads"]),
        ("transformer.block=gtp2", ["'gtp2'", "transformer.block"]),
        ("+transformer.colour=red", ["colour", "transformer"]),
        ("model.tokenizer.num_batches=0", ["model.tokenizer", "num_batches", "got 0"]),
        ("model.var.num_batches=0", ["model.var", "num_batches", "got 0"]),
        ("model.var.batch_size=-1", ["model.var", "batch_size", "got -1"]),
        ("resume=sometimes", ["'sometimes'", "resume"]),
        ("stages=[tokeniser]", ["tokeniser", "stages"]),
        ("stages=[]", ["[]", "stages"]),
        ("stages=[var]", ["tokenizer_ckpt=PATH"]),
        ("sampling.top_p=1.5", ["top_p", "<= 1", "1.5"]),
        ("sampling.temperature=0", ["temperature", ">= 1e-06", "got 0"]),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_trained(override, named, tmp_path):
    refused_run(tmp_path, [override], *named)


def test_an_objective_that_is_no_metric_is_named_with_those_that_are(copied, tmp_path):
    done = run("train", f"run_dir={copied}", f"runs_dir={tmp_path}", "objective=var/fid", *QUICK)
    assert_refused(done, "'var/fid'", "var/fid_classifier", "objective")
    assert (copied / "metrics.json").exists()  # what was trained is kept


# -- training: checkpoints ----------------------------------------------------------------


def test_a_tokenizer_that_is_not_there_or_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    refused_run(tmp_path, ["stages=[var]", f"tokenizer_ckpt={tmp_path}/none"], f"{tmp_path}/none")
    refused_run(tmp_path, ["stages=[var]", f"tokenizer_ckpt={tmp_path}/notes.txt"], "notes.txt")


def test_a_tokenizer_of_another_schedule_is_refused(trained, tmp_path):
    options = ["stages=[var]", f"tokenizer_ckpt={trained}", "scales.patch_nums=[1,2,4]"]
    refused_run(tmp_path, options, "[1, 2, 3, 4]", "[1, 2, 4]", "scales.patch_nums")


def test_a_tokenizer_of_images_with_other_channels_is_refused(trained, tmp_path):
    options = ["stages=[var]", f"tokenizer_ckpt={trained}"]
    other = ["data=shapes", "data.image_size=16", "scales.patch_nums=[1,2,3,4]"]
    refused_run(tmp_path, options + other, "1", "3", "channels", "tokenizer_ckpt")


@pytest.mark.parametrize(
    "other, named",
    [
        (["scales.patch_nums=[1,2,4]"], "[1, 2, 4]"),
        (["tokenizer.encoder.width=8"], "tokenizer"),
        (["transformer.depth=2"], "transformer"),
    ],
    ids=["schedule", "tokenizer", "transformer"],
)
def test_a_run_folder_of_other_networks_is_not_continued(other, named, copied, tmp_path):
    before = files(copied)
    options = [f"run_dir={copied}", f"runs_dir={tmp_path}", *QUICK, *other]
    done = run("train", *options)
    assert_refused(done, named, "run folder")
    assert files(copied) == before


def test_a_tokenizer_that_changed_under_the_transformer_is_refused(copied, tmp_path):
    content = read_checkpoint(copied / "var" / "last.ckpt")
    content[KEY]["tokenizer_fingerprint"] = "0" * 16
    write_checkpoint(content, copied / "var" / "last.ckpt")
    done = run("train", f"run_dir={copied}", f"runs_dir={tmp_path}", *QUICK)
    assert_refused(done, "tokenizer_fingerprint", "0" * 16)


def content_of(kind: str, trained: Path, published: Path) -> bytes:
    """A file that is no checkpoint that can be used."""
    if kind == "cut short":
        return (published / "var_d16.pth").read_bytes()[:20000]
    if kind == "our own, cut short":
        return (trained / "var" / "best.ckpt").read_bytes()[:20000]
    content = {"foreign": {"conv1.weight": torch.zeros(2)}, "code": Path("harmless")}[kind]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["cut short", "our own, cut short", "foreign", "code"])
def test_a_file_that_cannot_be_read_is_refused_under_every_key(kind, trained, published, tmp_path):
    (tmp_path / "official").mkdir()
    bad = tmp_path / "official" / "var_d16.pth"
    bad.write_bytes(content_of(kind, trained, published))
    shutil.copy(published / "vae_ch160v4096z32.pth", bad.parent)
    named = [str(bad), "checkpoint" if kind == "foreign" else "damaged, holds code"]
    for stages in ("[tokenizer]", "[var]"):
        refused_run(tmp_path, [f"stages={stages}", f"init_from={bad}"], "(init_from=", *named)
    refused_run(tmp_path, ["stages=[var]", f"tokenizer_ckpt={bad}"], "(tokenizer_ckpt=", *named)
    out = tmp_path / "out"
    done = run("sample", f"ckpt={bad}", f"out_dir={out}", f"export={tmp_path}/export")
    assert_refused(done, "(ckpt=", *named)
    done = run("sample", "official=var_d16", f"official_dir={bad.parent}", f"out_dir={out}")
    assert_refused(done, "official", str(bad))
    assert not out.exists() and not (tmp_path / "export").exists()


def test_a_start_from_networks_that_do_not_fit_is_refused_by_name(trained, published, tmp_path):
    transformer, tokenizer = published / "var_d16.pth", published / "vae_ch160v4096z32.pth"
    var = ["stages=[var]", f"tokenizer_ckpt={trained}", f"init_from={transformer}"]
    refused_run(tmp_path, var, str(transformer), "width 128 instead of 32 (transformer.width)")
    only = ["stages=[tokenizer]", f"init_from={transformer}"]
    refused_run(tmp_path, only, "expected a tokenizer", "with a transformer only")
    only = ["stages=[tokenizer]", f"init_from={tokenizer}"]
    refused_run(tmp_path, only, "in_channels 3 instead of 1 (data)", "tokenizer.encoder.width")
    options = [f"init_from={trained}", "tokenizer.quantizer.codebook.cosine=true"]
    refused_run(tmp_path, options, "(tokenizer.quantizer.codebook.cosine)", "init_from")
    options = ["stages=[var]", f"tokenizer_ckpt={transformer}"]
    refused_run(tmp_path, options, "holds a transformer only", "tokenizer_ckpt=PATH")
    options = ["stages=[var]", f"tokenizer_ckpt={tokenizer}", "scales.patch_nums=[1,2,3,4]"]
    refused_run(tmp_path, options, "3 channels", "have 1", "tokenizer_ckpt")


def test_positions_that_do_not_fit_the_files_own_schedule_are_refused(published, tmp_path):
    state = torch.load(published / "var_d16.pth", weights_only=True)
    state["pos_1LC"] = state["pos_1LC"][:, :30]
    torch.save(state, tmp_path / "var_d16.pth")
    shutil.copy(published / "vae_ch160v4096z32.pth", tmp_path)
    done = run("sample", "official=var_d16", f"official_dir={tmp_path}", f"out_dir={tmp_path}/out")
    assert_refused(done, "pos_1LC has the shape (1, 30, 128)", "var_d16.pth")
    assert not (tmp_path / "out").exists()
    options = ["stages=[var]", f"tokenizer_ckpt={published}/vae_ch160v4096z32.pth"]
    options += ["data=shapes", "data.image_size=64", "scales.patch_nums=[1,2,4]"]
    refused_run(tmp_path, [*options, f"init_from={tmp_path}/var_d16.pth"], "pos_1LC", "init_from")


# -- training: images ---------------------------------------------------------------------

FOLDER = [
    *("data=image_folder", "data.image_size=32", "scales.patch_nums=[1,2,4]"),
    *("datamodule.num_workers=0", "tokenizer.quantizer.codebook.vocab_size=16"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of eight pictures, one of them cut short."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    broken = tmp_path / "images" / "dogs" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return tmp_path / "images"


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused_run(tmp_path, FOLDER, "data.root=DIR")
    refused_run(tmp_path, [*FOLDER, f"data.root={tmp_path}/none"], f"{tmp_path}/none", "data.root")
    refused_run(tmp_path, [*FOLDER, f"data.root={tmp_path}/empty"], f"{tmp_path}/empty", ".png")


def test_an_unknown_way_with_bad_images_is_refused(images, tmp_path):
    options = [f"data.root={images}", "data.on_bad_image=drop"]
    refused_run(tmp_path, FOLDER + options, "'drop'", "data.on_bad_image", "skip")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_by_name(workers, images, tmp_path):
    options = [f"data.root={images}", f"datamodule.num_workers={workers}"]
    refused_run(tmp_path, FOLDER + options, f"{images}/dogs/3.png", "data.on_bad_image=skip")


def test_a_broken_image_that_only_a_worker_meets_is_named_in_one_line(
    images, tmp_path, monkeypatch
):
    # The classifier looks at some of many images; the broken one is found later.
    (images / "dogs" / "3.png").rename(tmp_path / "broken.png")
    network = "var_exp.evaluation.networks.classifier.train_classifier"
    original = import_from(network)

    def train_then_break(source, seed):
        trained = original(source, seed)
        for split in (source.train, source.val):
            for path in split.paths:
                shutil.copy(tmp_path / "broken.png", path)
        return trained

    monkeypatch.setattr(network, train_then_break)
    options = [f"data.root={images}", "datamodule.num_workers=2", f"run_dir={tmp_path}/run"]
    done = run("train", f"runs_dir={tmp_path}/runs", *QUICK, *FOLDER, *options)
    assert_refused(done, f"{images}/", "data.on_bad_image=skip")


def import_from(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(__import__(module, fromlist=[attribute]), attribute)


def test_broken_images_can_be_skipped_and_are_counted(images, tmp_path):
    options = [f"data.root={images}", "data.on_bad_image=skip", f"run_dir={tmp_path}/run"]
    done = run("train", f"runs_dir={tmp_path}", *QUICK, *FOLDER, *options)
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if "skipped" in line]
    assert "1 image" in line and f"{images}/dogs/3.png" in line


# -- sampling -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, named",
    [
        ("num_samples=0", ["num_samples", "got 0"]),
        ("num_samples=-2", ["num_samples", "got -2"]),
        ("num_samples=many", ["num_samples", "many"]),
        ("classes=[3,10]", ["classes", "0..9", "[3, 10]"]),
        ("classes=[-1]", ["classes", "0..9", "[-1]"]),
        ("classes=[three]", ["classes", "0..9", "three"]),
        ("classes=3", ["classes", "list", "got 3"]),
        ("classes=[]", ["classes", "[]"]),
        ("top_p=1.5", ["top_p", "<= 1", "1.5"]),
        ("top_p=-0.1", ["top_p", "0 or ", "-0.1"]),
        ("top_k=-1", ["top_k", "-1"]),
        ("temperature=0", ["temperature", ">= 1e-06"]),
        ("cfg_scale=-1", ["cfg_scale", "-1"]),
        ("batch_size=0", ["batch_size", "got 0"]),
        ("weights=best", ["weights", "'best'"]),
        ("device=abacus", ["device", "'abacus'"]),
    ],
)
def test_sampling_refuses_a_wrong_value_before_it_writes(override, named, trained, tmp_path):
    out = tmp_path / "place" / "samples"
    done = run("sample", f"ckpt={trained}", f"out_dir={out}", override)
    assert_refused(done, *named)
    assert not out.exists()


def test_sampling_refuses_what_is_no_complete_checkpoint(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    half = (trained / "var" / "best.ckpt").read_bytes()[:5000]
    (tmp_path / "half.ckpt").write_bytes(half)
    out = tmp_path / "samples"
    for ckpt, why in (
        (tmp_path / "none", "no checkpoint"),
        (tmp_path / "notes.txt", "not a checkpoint"),
        (tmp_path / "other.ckpt", "not a checkpoint of var-exp"),
        (tmp_path / "half.ckpt", "damaged"),
        (trained / "tokenizer" / "best.ckpt", "tokenizer only"),
        (trained / "tokenizer", "tokenizer only"),
    ):
        done = run("sample", f"ckpt={ckpt}", f"out_dir={out}")
        assert_refused(done, str(ckpt), why)
        assert not out.exists()


def test_sampling_asks_for_one_checkpoint(published, tmp_path):
    for asked in ([], ["ckpt=x", "official=var_d16"]):
        done = run("sample", f"out_dir={tmp_path}/out", *asked)
        assert_refused(done, "ckpt=PATH", "official=NAME", "var_d16, var_d20")
    done = run("sample", "official=var_d9", f"out_dir={tmp_path}/out")
    assert_refused(done, "'var_d9'", "var_d16, var_d20")
    done = run("sample", f"ckpt={published}/var_d16.pth", f"out_dir={tmp_path}/out")
    assert_refused(done, "var_d16.pth", "transformer only", "official=NAME")
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_written_is_refused_before_anything_is(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = [f"ckpt={trained}", f"out_dir={tmp_path}/out", f"export={tmp_path}/export"]
    # Each scale has its own codebook, which a published file cannot say.
    done = run("sample", *options, f"export_official={tmp_path}/official")
    assert_refused(done, "codebook for each scale", "tokenizer.quantizer.per_scale")
    done = run("sample", *options, f"export_official={tmp_path}/notes.txt")
    assert_refused(done, "export_official", "notes.txt' is a file")
    assert_refused(run("sample", *options, "temperature=0"), "temperature")
    assert set(files(tmp_path)) == {"notes.txt"}


def test_a_refusal_leaves_the_users_own_files_alone(trained, tmp_path):
    (tmp_path / "notes.log").write_text("mine")
    assert run("sample", f"ckpt={trained}", f"out_dir={tmp_path}", "top_p=2").code == 1
    assert (tmp_path / "notes.log").read_text() == "mine"


# -- misspelled overrides, and the real thing ---------------------------------------------


@pytest.mark.parametrize(
    "program, arguments, wrong, nearest",
    [
        ("train", ["sede=1"], "sede", "seed"),
        ("train", ["model.var.num_batch=3"], "num_batch", "model.var.num_batches"),
        ("train", ["transformer.dept=3"], "dept", "transformer.depth"),
        (
            "train",
            ["data=image_folder", "data.root=x", "data.image_sise=8"],
            "sise",
            "data.image_size",
        ),
        ("sample", ["ckpt=x", "num_sample=3"], "num_sample", "num_samples"),
    ],
)
def test_a_misspelled_override_gets_hydras_message_and_the_nearest_key(
    program, arguments, wrong, nearest, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run(program, *arguments)
    assert done.code == 1 and "Traceback" not in done.err
    assert "Could not override" in done.err and wrong in done.err
    hints = [line for line in done.err.splitlines() if "nearest" in line]
    assert len(hints) == 1 and hints[0].endswith(f"the nearest is {nearest!r}")
    assert wrong in hints[0]
    assert not files(tmp_path)


def test_a_misspelled_choice_gets_the_list_of_those_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "data=digit")
    assert done.code == 1 and "Traceback" not in done.err
    assert "Could not find 'data/digit'" in done.err and "digits" in done.err
    assert not files(tmp_path)


def test_a_shell_sees_one_line_and_exit_code_1_and_its_folder_as_it_was(tmp_path):
    done = run_for_real("sample", "ckpt=nowhere", "out_dir=out", cwd=tmp_path)
    assert_refused(done, "'nowhere'")
    assert tmp_path.is_dir() and not files(tmp_path)


def test_a_refused_draw_leaves_the_record_of_the_draw_before_it(trained, tmp_path):
    options = [f"ckpt={trained}", f"out_dir={tmp_path}/out", "num_samples=2"]
    assert run("sample", *options).code == 0
    before = files(tmp_path / "out")
    assert any(name.startswith(".hydra/") for name in before)
    assert_refused(run("sample", *options, "temperature=0"), "temperature", "0")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("program", ["train", "sample"])
def test_several_processes_within_a_sweep_are_refused(program, trained, tmp_path):
    options = {
        "train": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *QUICK],
        "sample": [f"ckpt={trained}", "devices=2"],
    }[program]
    place = [f"hydra.sweep.dir={tmp_path}/sweep", f"runs_dir={tmp_path}"]
    done = run(program, "-m", "seed=0,1", *options, *place)
    assert done.code == 1
    assert "expected 1 with --multirun" in done.err and "hydra/launcher=slurm" in done.err
