"""Hugging Face sets, stored and streamed: exact continuation, labels, mistakes in one line."""

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.exact_loading import (
    batches,
    check_epochs,
    check_ranks,
    check_restarts,
    check_workers,
    loaders,
    pixels_and_labels,
)
from helpers.parquet_files import FEATURES, table, write_parquet
from var_exp.data import parquet_images
from var_exp.data.hugging_face import HuggingFace
from var_exp.data.parquet_images import ParquetImages, read_row_groups


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory, monkeypatch):
    """Nothing is asked of the hub, and what `datasets` stores lies in a folder of the tests."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.getbasetemp() / "hf_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """27 images to train on in three files and eight row groups, and 5 to validate on."""
    return write_parquet(tmp_path_factory.mktemp("parquet"), {"train": 27, "validation": 5})


def source(root, streamed=False, **changes) -> HuggingFace:
    options = {
        "image_size": 16,
        "val_split": "validation",
        "shuffle_buffer": 8,
        "num_streams": 2,
    } | changes
    return HuggingFace(str(root), streamed=streamed, **options)


def opened(root, streamed=False, **changes) -> HuggingFace:
    made = source(root, streamed, **changes)
    made.prepare()
    made.setup()
    return made


both = pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])


# Exact continuation


@both
def test_a_run_goes_on_at_any_batch_as_if_nothing_had_happened(parquet, streamed):
    check_restarts(lambda: source(parquet, streamed, flip=True))


@both
def test_the_ranks_together_see_what_one_process_sees(parquet, streamed):
    check_ranks(lambda: source(parquet, streamed))


@both
def test_data_workers_change_nothing(parquet, streamed):
    check_workers(lambda: source(parquet, streamed))


@both
def test_each_epoch_shows_each_image_once(parquet, streamed):
    check_epochs(source(parquet, streamed))


@both
def test_the_images_are_those_that_were_stored(parquet, streamed):
    made = opened(parquet, streamed)
    assert made.class_names == ("ant", "bee", "cow")
    for part, first, count in ((made.train, 0, 27), (made.val, 27, 5)):
        expected = [
            np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            for number in range(first, first + count)
        ]
        found = [part[i] for i in range(len(part))]
        assert [label for _, label in found] == [i % 3 for i in range(first, first + count)]
        assert all(np.array_equal(a, b) for (a, _), b in zip(found, expected, strict=True))


# Streaming


def test_streaming_reads_each_row_group_about_once_an_epoch(parquet, monkeypatch):
    read = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, *a, **k: read.append(a) or read_row_group(self, *a, **k),
    )
    made = opened(parquet, streamed=True, shuffle_buffer=4)
    for index in made.order(seed=0, epoch=0):
        made.train[int(index)]
    assert 8 <= len(read) <= 8 + 1, "one of the eight lies across the border of two num_streams"
    assert len(made.train.kept) <= made.train.max_kept == 2 * 2 + 4 // 3


def test_a_streamed_run_that_goes_on_reads_only_what_it_needs(parquet, monkeypatch):
    made, read = opened(parquet, streamed=True), []
    decode = ParquetImages.read
    monkeypatch.setattr(ParquetImages, "read", lambda self, n: read.append(n) or decode(self, n))
    served = batches(made, start=9)
    assert read == [index for batch in served for _, _, index in batch]


def test_files_are_read_from_wherever_fsspec_can(parquet):
    memory = fsspec.filesystem("memory")
    for path in sorted(parquet.glob("train-*.parquet")):
        memory.pipe(f"/images/{path.name}", path.read_bytes())
    names = [f"memory://images/train-{i:05d}.parquet" for i in range(3)]
    groups = read_row_groups(names, "label")
    images = ParquetImages(groups, "image", np.arange(27), max_kept=2, channels=3, skip=False)
    assert pixels_and_labels(images) == pixels_and_labels(opened(parquet).train)
    assert images.name_of(15) == "memory://images/train-00001.parquet, row 5"


# Forms


@pytest.mark.parametrize("form", ["set", "splits"])
def test_what_save_to_disk_wrote_is_read_where_it_is(parquet, tmp_path, form):
    found = datasets.load_dataset(str(parquet))
    (found if form == "splits" else found["train"]).save_to_disk(tmp_path / "saved")
    changes = {} if form == "splits" else {"val_split": None}
    made = opened(tmp_path / "saved", **changes)
    assert len(made.train) == (27 if form == "splits" else 24)
    check_restarts(lambda: source(tmp_path / "saved", **changes), starts=(4,))
    with pytest.raises(ValueError, match="written by save_to_disk.*data.streamed=false"):
        opened(tmp_path / "saved", streamed=True)


def test_an_image_folder_that_datasets_knows_is_read_from_its_files(tmp_path):
    for name, colour in (("ant", "red"), ("bee", "blue")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (20, 20), colour).save(tmp_path / "in" / name / f"{number}.png")
    made = opened(tmp_path / "in", val_split=None)
    assert made.class_names == ("ant", "bee") and (len(made.train), len(made.val)) == (18, 2)
    for image, label in (made.train[i] for i in range(18)):
        assert image.getpixel((0, 0)) == [(255, 0, 0), (0, 0, 255)][label]
    with pytest.raises(ValueError, match="expected parquet files to stream"):
        opened(tmp_path / "in", streamed=True, val_split=None)


@both
def test_a_share_of_each_class_is_set_aside_where_no_part_is_named(parquet, streamed):
    made = opened(parquet, streamed, val_split=None)
    assert sorted(label for _, label in map(made.val.__getitem__, range(3))) == [0, 1, 2]
    seen = pixels_and_labels(made.train) + pixels_and_labels(made.val)
    assert seen == pixels_and_labels(opened(parquet).train)
    check_restarts(lambda: source(parquet, streamed, val_split=None), starts=(3,))


@both
def test_whole_numbers_are_classes_too_and_no_column_means_no_classes(tmp_path, streamed):
    root = write_parquet(
        tmp_path / "in",
        {"train": 27, "validation": 5},
        change=lambda d: d.cast_column("label", datasets.Value("int64")),
    )
    assert opened(root, streamed).class_names == ("0", "1", "2")
    without = opened(root, streamed, label_column=None)
    assert without.num_classes == 0 and {without.train[i][1] for i in range(27)} == {0}


# What is wrong is one clear line


def refused(root, words, streamed=False, **changes) -> None:
    with pytest.raises(ValueError, match=words) as error:
        opened(root, streamed, **changes)
    assert "\n" not in str(error.value)


@both
def test_wrong_columns_are_told_with_those_there_are(parquet, streamed):
    refused(
        parquet,
        r"no column of images called 'img', its columns are image, label \(data.image_column\)",
        streamed,
        image_column="img",
    )
    refused(parquet, "no column of images called 'label'", streamed, image_column="label")
    refused(
        parquet,
        r"no column of classes or whole numbers called 'class', its columns are image, label .*"
        "data.label_column",
        streamed,
        label_column="class",
    )


@both
def test_a_wrong_split_or_folder_is_told(parquet, tmp_path, streamed):
    refused(parquet, "cannot open the split 'test' of .*data.split", streamed, split="test")
    refused(parquet, "cannot open the split 'test'", streamed, val_split="test")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot open the split 'train'", streamed)
    refused(tmp_path / "nowhere", "nowhere' is not a folder", streamed)
    with pytest.raises(ValueError, match="no path, expected a name on the Hugging Face hub"):
        HuggingFace(None, streamed=streamed).prepare()


def test_a_name_that_cannot_be_fetched_is_told():
    with pytest.raises(ValueError, match="cannot open the split 'train' of 'nobody/nothing'"):
        HuggingFace("nobody/nothing").prepare()


@both
def test_labels_that_are_none_are_refused(tmp_path, streamed):
    root = write_parquet(
        tmp_path / "in",
        {"train": 12},
        change=lambda d: d.remove_columns("label").add_column("label", [-1] * len(d)),
    )
    refused(root, "has the label -1, expected 0 or more", streamed, val_split=None)


@both
def test_parts_with_other_classes_are_refused(tmp_path, streamed):
    root = write_parquet(
        tmp_path / "in",
        {"train": 12, "validation": 5},
        change=lambda d: d.cast_column("label", datasets.Value("int64")),
    )
    more = table(0, 5).remove_columns("label").add_column("label", [0, 1, 2, 3, 4])
    pq.write_table(more.data.table, root / "validation-00000.parquet")
    refused(root, "are not those of 'train'", streamed)


@both
def test_a_file_that_is_cut_short_is_named(tmp_path, streamed):
    root = write_parquet(tmp_path / "in", {"train": 20})
    path = root / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    refused(root, r"train-00001\.parquet|cannot open the split", streamed, val_split=None)


def test_row_groups_that_are_too_large_to_read_one_at_a_time_are_refused(parquet, monkeypatch):
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 1000)
    refused(parquet, "expected at most .*data.streamed=false", streamed=True)


@both
def test_bad_images_stop_the_run_or_are_skipped_and_counted(tmp_path, streamed):
    def spoil(rows):
        images = [
            image | {"bytes": image["bytes"][:50]} for image in rows.data.column(0).to_pylist()[:1]
        ]
        images += rows.data.column(0).to_pylist()[1:]
        return datasets.Dataset.from_dict({"image": images, "label": rows["label"]}, FEATURES)

    root = write_parquet(tmp_path / "in", {"train": 20, "validation": 5}, change=spoil)
    with pytest.raises(ValueError, match="cannot read the image .*row 0"):
        opened(root, streamed).train[0]
    skipping = source(root, streamed, on_bad_image="skip")
    list(loaders(skipping, num_workers=2).train_dataloader())
    assert len(skipping.bad_images) == 2
    check_restarts(lambda: source(root, streamed, on_bad_image="skip"), starts=(5,))
