"""Tar shards: exact continuation, an order that follows the shards, webdataset's own files."""

import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import webdataset

from helpers.command import QUICK, run
from helpers.exact_loading import (
    batches,
    check_epochs,
    check_ranks,
    check_restarts,
    check_workers,
    loaders,
    pixels_and_labels,
    write_images,
)
from var_exp.data import ImageFolder, Shards
from var_exp.data.pack import index_shards, pack
from var_exp.data.shards.index import ROW, ShardIndex, part_of, read_index, write_index
from var_exp.data.shuffle import block_order
from var_exp.training.tokenizer_module import TokenizerModule


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    """30 images, 27 to train on in eight shards; to be read, not written."""
    out = tmp_path_factory.mktemp("packed")
    pack(images, out, max_bytes=12_000)
    assert len(list(out.glob("train-*.tar"))) > 5
    return out


@pytest.fixture
def copy(packed, tmp_path):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def shards(root, **changes) -> Shards:
    return Shards(str(root), **{"image_size": 16, "shuffle_buffer": 8, "num_streams": 4} | changes)


def opened(root, **changes) -> Shards:
    source = shards(root, **changes)
    source.prepare()
    source.setup()
    return source


# Exact continuation


def test_a_run_goes_on_at_any_batch_as_if_nothing_had_happened(packed):
    check_restarts(lambda: shards(packed, flip=True))


def test_the_ranks_together_see_what_one_process_sees(packed):
    check_ranks(lambda: shards(packed))


def test_data_workers_change_nothing(packed):
    check_workers(lambda: shards(packed))


def test_each_epoch_shows_each_image_once(packed):
    check_epochs(shards(packed))


def test_batches_come_in_the_order_that_follows_the_shards(packed):
    source = opened(packed)
    served = [index for batch in batches(source) for _, _, index in batch]
    expected = block_order(source.train.shard, 8, 4, seed=3, epoch=0)
    assert served[:27] == expected.tolist()


def test_a_run_that_goes_on_reads_no_image_of_the_batches_before(packed, monkeypatch):
    source, read = opened(packed), []
    decode = type(source.train).read
    monkeypatch.setattr(
        type(source.train), "read", lambda self, n: read.append(n) or decode(self, n)
    )
    served = batches(source, start=9)
    assert read == [index for batch in served for _, _, index in batch]


def test_the_images_are_those_of_the_folder(images, packed):
    folder = ImageFolder(str(images), image_size=16)
    folder.setup()
    source = opened(packed)
    assert source.class_names == folder.class_names == ("ant", "bee", "cow")
    for part in ("train", "val"):
        assert pixels_and_labels(getattr(source, part)) == pixels_and_labels(getattr(folder, part))


def test_a_source_can_be_sent_to_another_process(packed):
    source = opened(packed)
    image, label = source.train[3]
    again, same = pickle.loads(pickle.dumps(source.train))[3]
    assert np.array_equal(image, again) and label == same


# The order


def positions_of(order: np.ndarray) -> np.ndarray:
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions


BLOCKS = np.repeat(np.arange(50), 20)  # 1,000 images


def test_an_order_is_a_permutation_that_follows_from_seed_and_epoch():
    orders = [block_order(BLOCKS, 64, 8, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    assert len({order.tobytes() for order in orders}) == 3


@pytest.mark.parametrize("count", [5, 63, 1000, 1003])
def test_every_number_of_images_is_dealt_out(count):
    order = block_order(np.arange(count) // 7, 4, 8, seed=0, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_a_block_is_done_with_soon_after_it_was_begun():
    spans = {}
    for num_streams, buffer in ((1, 50), (1, 200), (8, 200)):
        places = positions_of(block_order(BLOCKS, buffer, num_streams, seed=0, epoch=0))
        spans[num_streams, buffer] = np.ptp(places.reshape(50, 20), axis=1)
    assert spans[1, 50].max() <= 20 + 50 and spans[1, 200].max() <= 20 + 200
    # A block may be cut in two by a border of num_streams, and then is read in two places.
    assert np.median(spans[8, 200]) <= 8 * 20 + 200


def test_the_buffer_mixes_blocks():
    order = block_order(BLOCKS, 200, 1, seed=0, epoch=0)
    mixed = [len(set(BLOCKS[order[i : i + 20]])) for i in range(0, 1000, 20)]
    assert np.mean(mixed) > 5


def test_a_set_within_the_buffer_is_shuffled_as_a_whole():
    places = positions_of(block_order(BLOCKS, 1000, 8, seed=0, epoch=0)).reshape(50, 20)
    assert np.ptp(places, axis=1).min() > 500


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_reads_blocks_of_its_own(world_size):
    order = block_order(BLOCKS, 64, 8, seed=0, epoch=0)
    read = [set(BLOCKS[order[rank::world_size]]) for rank in range(world_size)]
    assert sum(map(len, read)) <= 50 + 7, "but for those that lie across one of 7 borders"


@pytest.mark.parametrize("changes", [{"shuffle_buffer": 0}, {"num_streams": 0}])
def test_a_buffer_or_lanes_of_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="_(buffer|streams): expected a number > 0, got 0"):
        shards("any", **changes)


def test_the_index_of_imagenet_is_small_and_its_order_too(tmp_path):
    count, per_shard = 1_281_167, 9_000
    rows = {name: np.zeros(count, dtype) for name, dtype in ROW.items()}
    rows["shard"] = (np.arange(count) // per_shard).astype(np.int32)
    names = tuple(f"train-{i:06d}.tar" for i in range(int(rows["shard"][-1]) + 1))
    for name in names:
        (tmp_path / name).touch()
    write_index(tmp_path, ShardIndex(names, (0,) * len(names), ("a",), rows))
    assert (tmp_path / "index.npz").stat().st_size < 32e6
    tracemalloc.start()
    index = read_index(tmp_path)
    order = block_order(index.rows["shard"], 65536, 64, seed=0, epoch=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order) == count and peak < 150e6


# webdataset


def test_webdataset_reads_what_we_pack(packed, images):
    urls = sorted(str(path) for path in packed.glob("train-*.tar"))
    found = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    folder = ImageFolder(str(images), image_size=16)
    folder.setup()
    seen = [(np.asarray(image.convert("RGB")).tobytes(), label) for image, label in found]
    assert sorted(seen) == sorted(pixels_and_labels(folder.train).elements())


def write_with_webdataset(root, label_of, count=30) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    root.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(root / "set-%04d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"{number:04d}", "png": pixels[number], **label_of(number)})


@pytest.mark.parametrize(
    "label_of",
    [
        lambda n: {"cls": n % 3},
        lambda n: {"json": {"label": n % 3, "text": "a photograph"}},
        lambda n: {"json": {"cls": n % 3}, "txt": "a photograph"},
    ],
)
def test_we_read_what_webdataset_writes(tmp_path, label_of):
    write_with_webdataset(tmp_path / "set", label_of)
    index_shards(tmp_path / "set")
    source = opened(tmp_path / "set")
    assert source.class_names == ("0", "1", "2")
    assert (len(source.train), len(source.val)) == (27, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    expected = {(image.tobytes(), number % 3) for number, image in enumerate(pixels)}
    assert set(pixels_and_labels(source.train)) | set(pixels_and_labels(source.val)) == expected
    check_restarts(lambda: shards(tmp_path / "set"), starts=(4,))


def test_shards_without_labels_train_without_classes(tmp_path):
    write_with_webdataset(tmp_path / "set", lambda n: {"txt": "a photograph"})
    index_shards(tmp_path / "set")
    source = opened(tmp_path / "set")
    assert source.num_classes == 0 and {source.train[i][1] for i in range(27)} == {0}


def test_names_of_classes_are_read_where_there_are_some(tmp_path):
    write_with_webdataset(tmp_path, lambda n: {"cls": n % 3})
    (tmp_path / "classes.json").write_text('["x", "y", "z", "never seen"]')
    index_shards(tmp_path)
    assert opened(tmp_path).class_names == ("x", "y", "z", "never seen")


def test_the_words_in_a_name_say_which_part_a_shard_is_of():
    names = ("imagenet-train-000001.tar", "val/00.tar", "x_validation_1.tar", "testing.tar")
    assert [part_of(name) for name in names] == ["train", "val", "val", ""]
    assert part_of("set-test-01.tar") == "test"


# What is wrong is one clear line


def refused(root, words, **changes) -> None:
    with pytest.raises(ValueError, match=words) as error:
        opened(root, **changes)
    assert "\n" not in str(error.value)


def test_folders_that_hold_nothing_say_what_they_should(tmp_path):
    refused(tmp_path / "nowhere", "is not a folder.*set data.root=DIR")
    refused(tmp_path, r"no \*\.tar under.*var_exp\.data\.pack FOLDER")


def test_a_missing_or_damaged_index_names_the_command_that_writes_it(copy):
    index = copy / "index.npz"
    whole = index.read_bytes()
    for content in (b"", b"no index", whole[:200], whole[:-50]):
        index.write_bytes(content)
        refused(copy, f"index.npz' is damaged .*python -m var_exp.data.pack {copy} --index")
    np.savez(index, about=np.frombuffer(b"[]", dtype=np.uint8))
    refused(copy, "index.npz' is damaged")
    index.unlink()
    refused(copy, f"index.npz' is missing: python -m var_exp.data.pack {copy} --index")


def test_a_missing_or_cut_shard_is_named(copy):
    shard = copy / "train-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-700])
    refused(copy, r"train-000002\.tar' has [\d,]+ bytes, expected [\d,]+: copy it again")
    shard.unlink()
    refused(copy, r"train-000002\.tar' is missing")


def damage(copy) -> str:
    """Flips a byte in the middle of the first image of a shard; the image's name."""
    source = opened(copy)
    offset, size = int(source.train.offset[0]), int(source.train.size[0])
    path = copy / "train-000000.tar"
    with open(path, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(offset + size // 2)
        file.write(bytes([byte[0] ^ 1]))
    return source.train.name_of(0)


def test_a_single_wrong_bit_in_a_shard_is_noticed_and_the_image_named(copy):
    name = damage(copy)
    with pytest.raises(ValueError, match=f"the image '{name}' is not the one that was indexed"):
        opened(copy).train[0]


def test_damaged_images_are_skipped_and_counted_if_so_wished(copy):
    name = damage(copy)
    source = shards(copy, on_bad_image="skip")
    check_restarts(lambda: shards(copy, on_bad_image="skip"), starts=(7,))
    list(loaders(source, num_workers=2).train_dataloader())
    assert source.bad_images == {name}


@pytest.mark.parametrize(
    ("label_of", "words"),
    [
        (lambda n: {"cls": n} if n else {}, "1 of 30 images .* have no label"),
        (lambda n: {"json": {"label": "cat"}}, "the sample '0000' has the label 'cat', expected"),
        (lambda n: {"json": {"label": -2}}, "the sample '0000' has the label -2, expected"),
        (lambda n: {"jpg": np.zeros((4, 4, 3), np.uint8)}, "has 2 images among .*, expected one"),
    ],
)
def test_samples_that_are_none_of_ours_are_named(tmp_path, label_of, words):
    write_with_webdataset(tmp_path, label_of)
    with pytest.raises(ValueError, match=words):
        index_shards(tmp_path)


@pytest.mark.parametrize("names", ['["a", "b"]', '{"a": 0}', '["a'])
def test_names_that_do_not_fit_the_labels_are_refused(tmp_path, names):
    write_with_webdataset(tmp_path, lambda n: {"cls": n % 3})
    (tmp_path / "classes.json").write_text(names)
    with pytest.raises(ValueError, match=r"classes\.json"):
        index_shards(tmp_path)


def test_a_mixture_of_named_and_unnamed_parts_is_refused(tmp_path):
    write_with_webdataset(tmp_path, lambda n: {})
    os.rename(tmp_path / "set-0000.tar", tmp_path / "val.tar")
    index_shards(tmp_path)
    refused(tmp_path, r"some have neither \(set-0001\.tar\), expected all or none")


def test_another_number_of_classes_than_expected_is_refused(packed):
    refused(packed, "has 3 classes, expected 1000", expected_classes=1000)


# The program


def test_a_training_on_shards_that_was_cut_off_goes_on_exactly(packed, tmp_path, monkeypatch):
    options = [
        *(
            "data=shards",
            f"data.root={packed}",
            "data.image_size=16",
            "data.shuffle_buffer=8",
        ),
        *(
            "tokenizer=tiny",
            "scales=linear_4",
            "stages=[tokenizer]",
            "datamodule.num_workers=0",
            *QUICK,
        ),
    ]
    whole, seen = TokenizerModule.training_step, []

    def cut_off(module, batch, number):
        seen.append(batch.indices.tolist())
        if len(seen) == 4 + 3:
            raise RuntimeError("the power fails")
        return whole(module, batch, number)

    monkeypatch.setattr(TokenizerModule, "training_step", cut_off)
    codes = [
        run("train", *options, f"run_dir={tmp_path}/{name}", f"runs_dir={tmp_path}").code
        for name in ("whole", "cut", "cut")
    ]
    assert codes == [0, 1, 0]
    assert seen[4:6] == seen[:2] and seen[-2:] == seen[2:4], "two batches, then the other two"
    first, second = (
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "cut")
    )
    assert first["tokenizer/psnr"] == second["tokenizer/psnr"]


def test_a_mistake_is_one_line_of_the_program(tmp_path):
    done = run("train", "data=shards", f"data.root={tmp_path}", f"runs_dir={tmp_path}/runs", *QUICK)
    assert done.code == 1
    (line,) = done.errors
    assert "no *.tar under" in line
