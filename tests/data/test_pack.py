"""Packing an image folder: whole shards or none, the same bytes again, bad images named."""

import os
import runpy
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers.command import ROOT, files
from helpers.exact_loading import pixels_and_labels, write_images
from var_exp.data import ImageFolder, Shards
from var_exp.data.pack import check_shards, main, pack
from var_exp.data.shards.index import scan_shard

SMALL = 12_000  # bytes: a few of these images


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def content(out: Path) -> dict[str, bytes]:
    """What was packed, without the note of what it was packed from."""
    return {name: data for name, data in files(out).items() if name != "packing.json"}


def loaded(root: Path, source=Shards):
    made = source(str(root), image_size=16)
    made.setup()
    return made


def test_the_command_packs_checks_and_says_what_is_there(images, tmp_path):
    out = tmp_path / "out"
    said = main([str(images), str(out), "--max-size", "12K", "--check"])
    count = len(list(out.glob("*.tar")))
    assert said.startswith(f"'{out}': 30 images (train 27, val 3) of 3 classes in {count} shards")
    assert main([str(out), "--check"]) == said
    assert all(path.stat().st_size <= 12_000 for path in out.glob("*.tar"))


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies_and_whoever_packs_it(tmp_path):
    for name in ("one", "two"):
        write_images(tmp_path / name)
        pack(tmp_path / name, tmp_path / f"{name}_out", SMALL, workers=0 if name == "one" else 2)
    assert content(tmp_path / "one_out") == content(tmp_path / "two_out")
    pack(tmp_path / "one", tmp_path / "other", SMALL, seed=1)
    assert content(tmp_path / "other") != content(tmp_path / "one_out")


def test_shards_are_samples_of_all_classes(images, tmp_path):
    pack(images, tmp_path / "out", 40_960)
    labels = scan_shard(tmp_path / "out" / "train-000000.tar").rows["label"]
    assert set(labels) == {0, 1, 2}


def test_train_and_val_folders_stay_the_split(tmp_path):
    write_images(tmp_path / "in" / "train")
    write_images(tmp_path / "in" / "val", classes=("bee",), count=2)
    pack(tmp_path / "in", tmp_path / "out", SMALL)
    source, folder = loaded(tmp_path / "out"), loaded(tmp_path / "in", ImageFolder)
    for part in ("train", "val"):
        assert pixels_and_labels(getattr(source, part)) == pixels_and_labels(getattr(folder, part))
    assert {source.val[i][1] for i in range(2)} == {1}


def test_a_folder_without_classes_makes_shards_without_labels(tmp_path):
    write_images(tmp_path / "in", classes=(".",))
    pack(tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert {os.path.splitext(name)[1] for name in tar.getnames()} == {".png"}
    assert loaded(tmp_path / "out").num_classes == 0


def test_names_that_tar_or_webdataset_would_trip_over_get_through(tmp_path):
    names = ["a.b.png", "a.c.png", "a_b.png", "x.PNG", "x.jpg", "ä ö.png", "n" * 150 + ".png"]
    (tmp_path / "in" / "a class.with dots").mkdir(parents=True)
    for shade, name in enumerate(names):
        image = Image.new("RGB", (8, 8), (shade, 0, 0))
        image.save(tmp_path / "in" / "a class.with dots" / name, "png")
    pack(tmp_path / "in", tmp_path / "out", max_bytes=10_240)
    source = loaded(tmp_path / "out")
    shades = [
        p[i][0].getpixel((0, 0))[0] for p in (source.train, source.val) for i in range(len(p))
    ]
    assert sorted(shades) == list(range(len(names)))
    packed = [tarfile.open(path).getnames() for path in sorted((tmp_path / "out").glob("*.tar"))]
    keys = [name.rpartition("/")[2].partition(".")[0] for name in sum(packed, [])]
    assert len(set(keys)) == len(names) and {"a_b", "a_b_2", "x", "x_2"} <= set(keys)
    assert all(path.stat().st_size == 10_240 for path in (tmp_path / "out").glob("*.tar"))
    assert check_shards(tmp_path / "out") == []


# Stopped and started again


def test_a_stopped_packing_goes_on_and_ends_the_same(images, tmp_path, monkeypatch):
    pack(images, tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    opened, read = Path.read_bytes, []

    def stop(path):
        if path.suffix == ".png":
            read.append(path)
            if len(read) == 17:
                raise KeyboardInterrupt
        return opened(path)

    monkeypatch.setattr(Path, "read_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(images, out, SMALL)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(kept) < len(list((tmp_path / "whole").glob("*.tar")))
    assert not (out / "index.npz").exists()
    (out / ".train-000003.123.tar").write_bytes(b"what a killed process has left")
    others = {".train-000003.123.tar.bak": b"of someone else", ".mine.123.tar": b"too"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    pack(images, out, SMALL)
    assert len(read) - 17 < 30, "whole shards are not written again"
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()
    assert content(out) == content(tmp_path / "whole") | others


def test_a_packing_that_is_killed_leaves_no_half_shard_under_a_final_name(images, tmp_path):
    pack(images, tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    slow = (
        "import sys, time\n"
        "from var_exp.data import pack\n"
        "from var_exp.data.shards import writer\n"
        "add = writer.add\n"
        "writer.add = lambda *a: (time.sleep(0.02), add(*a))\n"
        "pack.main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(images), str(out), "--max-size", "12K"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.DEVNULL,
    )
    while len(list(out.glob("[!.]*.tar"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0 and list(out.glob("[!.]*.tar")), "killed while it packed"
    assert not (out / "index.npz").exists()
    for path in out.glob("[!.]*.tar"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    pack(images, out, SMALL)
    assert content(out) == content(tmp_path / "whole"), "nor anything else"


def test_a_finished_packing_that_is_started_again_writes_no_shard(images, tmp_path):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(images, out, SMALL)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_a_shard_that_was_damaged_since_is_named_and_packed_again(images, tmp_path, capsys):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    whole = files(out)
    for workers in (0, 2):
        path, offset, size = first_image(out)
        overwrite(path, offset + size // 2, b"\x00\xff\x00\xff")
        pack(images, out, SMALL, workers)
        assert files(out) == whole
    assert f"'{path}' is damaged; it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["", "[]", "null", '{"parts": {"train-000000.tar": 3}}'])
def test_a_record_of_another_form_is_refused_in_one_line(damaged, images, tmp_path):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    (out / "packing.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"packing\.json' is (damaged|not a record)") as error:
        pack(images, out, SMALL)
    assert "\n" not in str(error.value)


def test_a_folder_with_other_shards_is_left_alone(images, tmp_path):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    before = files(out)
    with pytest.raises(ValueError, match="holds shards of other options than these"):
        pack(images, out, 2 * SMALL)
    (images / "ant" / "0.png").write_bytes((images / "bee" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="holds shards of other images than these"):
        pack(images, out, SMALL)
    with pytest.raises(ValueError, match=r"packing\.json' is missing, so it is not known whose"):
        (out / "packing.json").unlink()
        pack(images, out, SMALL)
    assert {name: data for name, data in before.items() if name != "packing.json"} == files(out)


# Bad images


@pytest.fixture
def spoilt(images):
    """Two of the 30 files do not decode."""
    whole = (images / "ant" / "3.png").read_bytes()
    (images / "ant" / "3.png").write_bytes(whole[: len(whole) // 2])
    (images / "cow" / "7.png").write_bytes(b"not an image")
    return images


def bad_paths(images) -> list[str]:
    return [str(images / "ant" / "3.png"), str(images / "cow" / "7.png")]


def test_bad_images_are_refused_and_all_of_them_named(spoilt, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"2 of 30 images do not decode.*--on-bad-image skip"):
        pack(spoilt, tmp_path / "out", SMALL)
    assert all(f"bad: {path} (" in capsys.readouterr().err for path in bad_paths(spoilt)[:1])
    assert not (tmp_path / "out" / "index.npz").exists()


def test_bad_images_are_left_out_if_so_wished_and_named_again_when_started_again(spoilt, tmp_path):
    for _ in range(2):
        bad = pack(spoilt, tmp_path / "out", SMALL, on_bad_image="skip")
        assert sorted(path for path, _ in bad) == bad_paths(spoilt)
    source = loaded(tmp_path / "out")
    assert len(source.train) + len(source.val) == 28
    assert check_shards(tmp_path / "out") == []


# The check


def first_image(out: Path) -> tuple[Path, int, int]:
    path = out / "train-000000.tar"
    rows = scan_shard(path).rows
    return path, int(rows["offset"][0]), int(rows["size"][0])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_the_check_finds_a_wrong_byte_and_what_does_not_decode(images, tmp_path):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    path, offset, size = first_image(out)
    overwrite(path, offset + size // 2, b"\x00\xff\x00\xff")
    found = check_shards(out)
    assert (str(path), "not as it was indexed: another checksum") in found
    assert f"{path}, byte {offset}" in dict(found)
    with pytest.raises(ValueError, match="2 things are wrong under"):
        main([str(out), "--check"])


def test_the_check_finds_damaged_headers_swapped_labels_and_strangers(images, tmp_path):
    out = tmp_path / "out"
    pack(images, out, SMALL)
    path, offset, size = first_image(out)
    label = offset + -(-size // 512) * 512 + 512
    overwrite(path, label, b"2" if path.read_bytes()[label : label + 1] != b"2" else b"1")
    assert check_shards(out) == [(str(path), "not as it was indexed: another label")]
    overwrite(path, label - 512, b"\xff" * 512)
    ((name, reason),) = check_shards(out)
    assert name == str(path) and "no tar header and no end at byte" in reason
    (out / "more.tar").write_bytes(b"")
    assert (str(out / "more.tar"), "not in the index") in check_shards(out)


def test_a_shard_that_is_cut_short_is_not_indexed(images, tmp_path):
    pack(images, tmp_path / "out", SMALL)
    path, offset, size = first_image(tmp_path / "out")
    whole = path.read_bytes()
    end = tarfile.open(path).getmembers()[-1]
    # Within an image, between two files, without its end, and not a tar file at all.
    for length in (offset + 10, offset - 512 + 0 * size, end.offset_data + 512, 100):
        path.write_bytes(whole[:length] if length != 100 else b"x" * 2000)
        with pytest.raises(ValueError, match=r"train-000000\.tar' is cut short, damaged") as error:
            main([str(tmp_path / "out"), "--index"])
        assert "\n" not in str(error.value)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere", "{tmp}/out"], "nowhere' is not a folder of images"),
        (["{tmp}/empty", "{tmp}/out"], "no images under"),
        (
            ["{tmp}/images", "{tmp}/out", "--max-size", "1X"],
            "--max-size is '1X', expected at least 10240 bytes",
        ),
        (["{tmp}/images", "{tmp}/out", "--max-size", "0"], "--max-size is '0'"),
        (["{tmp}/images", "{tmp}/out", "--workers", "-1"], "--workers is -1, expected 0 or more"),
        (["{tmp}/images"], "name OUT, or say --index or --check"),
        (["{tmp}/empty", "--index"], r"no \*\.tar under"),
        (["{tmp}/empty", "--check"], "index.npz' is missing"),
    ],
)
def test_a_mistake_says_what_was_expected(images, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert not (tmp_path / "out").exists()


def test_the_program_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path), "--index"])
    with pytest.raises(SystemExit, match=r"^error: no \*\.tar under .*$"):
        runpy.run_module("var_exp.data.pack", run_name="__main__", alter_sys=True)


def test_an_empty_tar_does_not_pass_for_a_set(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ValueError, match="hold no images"):
        main([str(tmp_path), "--index"])
