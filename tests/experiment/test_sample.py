"""`python sample.py` writes what the README says, and sample i depends on the seed and i alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command import files, run
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.checkpoint.official import load_official
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.sampling.generate import generate
from var_exp.visualization.images import to_uint8

WHOLE = {"grid.png", "coarse_to_fine.png", "samples.npz", "plan.json"}
OF_RUN = {".hydra", "environment.json"}  # when and how it was run


def draw(ckpt: Path, out: Path, *overrides: str) -> dict[str, bytes]:
    """Run sample.py; the files that it leaves, but for those about the run."""
    done = run("sample", f"ckpt={ckpt}", f"out_dir={out}", *overrides)
    assert done.code == 0, done.err
    left = files(out)
    return {k: v for k, v in left.items() if k.split("/")[0] not in OF_RUN}


def pictures(left: dict[str, bytes]) -> dict[str, bytes]:
    return {k: v for k, v in left.items() if k not in WHOLE}


def arrays(out: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / "samples.npz") as saved:
        assert set(saved) == {"arr_0", "arr_1"}
        return saved["arr_0"], saved["arr_1"]


def test_a_user_gets_numbered_files_the_grid_the_strip_and_the_arrays(
    trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = [f"ckpt={trained.parent.parent}/latest", "classes=[3,7]", "num_samples=5"]
    done = run("sample", *options, "out_dir=out")
    assert done.code == 0, done.err
    assert "5 samples" in done.out and "out" in done.out.splitlines()[-1]
    out = tmp_path / "out"
    numbered = {f"{i:06d}.png" for i in range(5)}
    assert {p.name for p in out.iterdir()} - OF_RUN == numbered | WHOLE
    images, labels = arrays(out)
    assert images.shape == (5, 16, 16, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, 7, 3, 7, 3]
    assert len(np.unique(images)) > 16
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(out / f"{i:06d}.png")), image[:, :, 0])


def test_the_grid_has_a_row_for_each_class_and_the_strip_one_for_each_of_few(trained, tmp_path):
    def sizes(name: str, *overrides: str) -> list[tuple[int, int]]:
        draw(trained, tmp_path / name, *overrides)
        where = [tmp_path / name / picture for picture in ("grid.png", "coarse_to_fine.png")]
        return [Image.open(path).size for path in where]

    (grid_width, grid_height), (strip_width, strip_height) = sizes("two", "classes=[3,7]")
    assert 2 * 64 < grid_height < 3 * 64 and 8 * 64 < grid_width < 10 * 64  # 16 samples
    assert 8 * 64 < strip_height < 10 * 64 and 4 * 64 < strip_width < 6 * 64  # 4 scales
    _, (_, few_height) = sizes("few", "num_samples=3")
    assert 3 * 64 < few_height < 4 * 64


def test_samples_are_those_of_generate(trained, tmp_path):
    settings = {"cfg_scale": 2.0, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "seed": 5}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    draw(trained, tmp_path, "num_samples=8", "classes=[4]", *overrides)
    networks = load_networks(trained)
    images = generate(networks.transformer, networks.tokenizer, [4] * 8, **settings)
    expected = to_uint8(images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(arrays(tmp_path)[0], expected)


@pytest.mark.parametrize("setting", ["cfg_scale=99", "top_k=1", "top_p=0.01", "temperature=9"])
def test_every_setting_matters(setting, trained, tmp_path):
    usual = draw(trained, tmp_path / "usual", "classes=[4]")
    assert pictures(draw(trained, tmp_path / "other", "classes=[4]", setting)) != pictures(usual)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images(trained, tmp_path):
    first = draw(trained, tmp_path / "first", "seed=1")
    again = draw(trained, tmp_path / "again", "seed=1")
    other = draw(trained, tmp_path / "other", "seed=2")
    assert pictures(again) == pictures(first)
    assert all(again[name] == first[name] for name in ("grid.png", "coarse_to_fine.png"))
    for ours, theirs in zip(arrays(tmp_path / "first"), arrays(tmp_path / "again"), strict=True):
        assert np.array_equal(ours, theirs)
    assert all(other[name] != content for name, content in pictures(first).items())


def test_the_batch_size_changes_no_byte(trained, tmp_path):
    whole = draw(trained, tmp_path / "64", "num_samples=21")
    for batch_size in (1, 3, 16):
        left = draw(
            trained, tmp_path / str(batch_size), "num_samples=21", f"batch_size={batch_size}"
        )
        assert pictures(left) == pictures(whole)
        assert left["grid.png"] == whole["grid.png"]
        assert left["coarse_to_fine.png"] == whole["coarse_to_fine.png"]


def test_many_full_batches_make_one_strip(trained, tmp_path):
    draw(trained, tmp_path / "many", "num_samples=40", "batch_size=16")
    draw(trained, tmp_path / "few", "num_samples=8")
    many, few = (tmp_path / name / "coarse_to_fine.png" for name in ("many", "few"))
    assert many.read_bytes() == few.read_bytes()


def test_fewer_samples_are_the_first_of_more(trained, tmp_path):
    more = draw(trained, tmp_path / "8", "num_samples=8")
    fewer = draw(trained, tmp_path / "3", "num_samples=3")
    assert pictures(fewer) == {f"{i:06d}.png": more[f"{i:06d}.png"] for i in range(3)}


def test_a_sample_does_not_depend_on_the_classes_of_the_others(trained, tmp_path):
    alone = pictures(draw(trained, tmp_path / "alone", "classes=[3]", "num_samples=12"))
    mixed = pictures(draw(trained, tmp_path / "mixed", "classes=[3,7]", "num_samples=12"))
    same = [alone[name] == mixed[name] for name in sorted(alone)]
    assert all(same[::2]) and not all(same[1::2])


@pytest.mark.parametrize(
    "classes, labels",
    [
        ("[3,7]", [3, 7] * 6),
        ("all", [*range(10), 0, 1]),
        ("[0]", [0] * 12),
        ("null", [10] * 12),
    ],
)
def test_the_asked_classes_take_turns_and_null_is_no_class(classes, labels, trained, tmp_path):
    draw(trained, tmp_path, f"classes={classes}", "num_samples=12")
    assert arrays(tmp_path)[1].tolist() == labels


def test_a_checkpoint_is_found_in_a_run_folder_a_stage_folder_or_by_itself(trained, tmp_path):
    moved = tmp_path / "elsewhere" / "digits.ckpt"
    moved.parent.mkdir()
    shutil.copy(trained / "var" / "best.ckpt", moved)
    expected = draw(trained, tmp_path / "out", "num_samples=3")
    for i, ckpt in enumerate((trained / "var", trained / "var" / "best.ckpt", moved)):
        assert pictures(draw(ckpt, tmp_path / str(i), "num_samples=3")) == pictures(expected)


def test_raw_weights_are_not_the_averaged_ones(trained, tmp_path):
    averaged = draw(trained, tmp_path / "averaged", "weights=averaged", "temperature=0.1")
    raw = draw(trained, tmp_path / "raw", "weights=raw", "temperature=0.1")
    assert pictures(averaged) == pictures(draw(trained, tmp_path / "default", "temperature=0.1"))
    assert pictures(averaged) != pictures(raw)
    networks = load_networks(trained, "raw")
    images = generate(networks.transformer, networks.tokenizer, [0, 1], temperature=0.1)
    expected = to_uint8(images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(arrays(tmp_path / "raw")[0][:2], expected)


@pytest.mark.parametrize(
    "given, told", [("graphs", "CUDA graphs need a CUDA device, got cpu"), ("maybe", "got 'maybe'")]
)
def test_a_way_to_compile_that_there_is_not_is_refused_before_anything_is_written(
    trained, tmp_path, given, told
):
    out = tmp_path / "out"
    done = run("sample", f"ckpt={trained}", f"compile={given}", "device=cpu", f"out_dir={out}")
    assert done.code == 1 and told in done.err and not out.exists()


# -- other forms of networks, in and out --------------------------------------------------


def test_a_portable_folder_is_written_and_draws_the_same_to_the_byte(trained, tmp_path):
    exported = tmp_path / "exported"
    drawn = draw(trained, tmp_path / "out", f"export={exported}", "weights=raw")
    again = draw(exported, tmp_path / "again")
    assert again == drawn
    pipeline, raw = VARPipeline.from_pretrained(exported), load_networks(trained, "raw")
    assert pipeline.class_names == tuple(str(digit) for digit in range(10))
    assert torch.equal(pipeline.transformer.position, raw.transformer.position)


def test_nothing_is_drawn_where_only_an_export_is_asked_for(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sample", f"ckpt={trained}", "num_samples=0", "export=deep/exported")
    assert done.code == 0, done.err
    assert "deep/exported" in done.out and "sampling" not in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert VARPipeline.from_pretrained("deep/exported").transformer.num_classes == 10


def test_published_networks_go_out_as_published_files_and_as_a_folder(published, tmp_path):
    exports = [f"export={tmp_path}/folder", f"export_official={tmp_path}/files"]
    done = run("sample", "official=var_d16", f"official_dir={published}", "num_samples=0", *exports)
    assert done.code == 0, done.err
    assert set(files(tmp_path / "files")) == {"var_d2.pth", "vae_ch32v64z8.pth"}
    networks = load_official(
        tmp_path / "files" / "var_d2.pth", tmp_path / "files" / "vae_ch32v64z8.pth"
    )
    folder = VARPipeline.from_pretrained(tmp_path / "folder")
    assert torch.equal(folder([3]), generate(*networks, [3]))
    assert folder.class_names == tuple(str(label) for label in range(10))
