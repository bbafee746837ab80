"""Stage two trains from codes that were encoded once, as it would train from the images."""

import functools
import os
import random
import shutil
import signal
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from helpers.command import files
from helpers.damage import DAMAGES, spoil
from helpers.stages import PATCH_NUMS, assert_equal, make_module, run, weights
from helpers.tiny import tiny_quantizer, tiny_tokenizer
from helpers.together import together
from var_exp.data import CodeBatch, ImageDataModule, ImageSource, Shapes, TokenCache
from var_exp.data.source import TensorImages
from var_exp.data.tokens.cache import delete_codes
from var_exp.distributed.signals import Interrupted, SignalHandler
from var_exp.training.encode import cache_key, encode, encode_stage

CPU = torch.device("cpu")
EPOCHS = 3  # that stages.run begins on the images below: 8 batches of 6


class Shifted(ImageSource):
    """Twenty images of noise and nine to validate; augmentation shifts them."""

    def __init__(self):
        super().__init__("shifted", 16, channels=1, class_names=[str(i) for i in range(10)])

    def load(self):
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 256, (29, 1, 16, 16), dtype=np.uint8))
        labels = torch.arange(29) % 10
        return TensorImages(images[:20], labels[:20]), TensorImages(images[20:], labels[20:])

    def train_transform(self, image, rng):
        return self.val_transform(image.roll(int(rng.integers(16)), -1))


@pytest.fixture(scope="module")
def source():
    made = Shifted()
    made.setup()
    return made


@pytest.fixture
def tokenizer():
    """That of `stages.make_module`."""
    return make_module("var").tokenizer.eval()


def make_cache(folder, source, tokenizer, views=EPOCHS, seed=0, rows=6, known=True, **data):
    fingerprint = tokenizer.fingerprint() if known else None
    key = cache_key(source, {"name": source.name} | data, seed, tokenizer, fingerprint, rows)
    return TokenCache(folder, key, views)


def encoded(cache, source, tokenizer, on_batch=lambda: None, seed=0, batch_size=4):
    encode(tokenizer, ImageDataModule(source, seed), cache, batch_size, CPU, on_batch)
    return cache


def served(cache, source, part, plan=(4, 20), rank=0, world_size=1, seed=0):
    """Batches of images, and the batches of codes in their places."""
    both = []
    for codes in (None, cache):
        data = ImageDataModule(source, seed, val_batch_size=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        data.plan(*plan)
        data.codes = codes
        both.append(list(getattr(data, f"{part}_dataloader")()))
    return zip(*both, strict=True)


# -- the same training ------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2}], ids=["whole", "micro-batches"])
def test_training_from_codes_is_training_from_images(changes, source, tokenizer, tmp_path):
    cache = encoded(make_cache(tmp_path / "codes", source, tokenizer), source, tokenizer)
    _, from_images = run("var", source, tmp_path / "images", **changes)
    _, from_codes = run("var", source, tmp_path / "tokens", codes=cache, **changes)
    assert from_codes == from_images
    assert_equal(weights(tmp_path / "tokens", "var"), weights(tmp_path / "images", "var"))


@pytest.mark.parametrize("kind", ["augmented", "endless"])
def test_a_batch_has_the_codes_of_its_images_in_every_epoch(kind, source, tokenizer, tmp_path):
    if kind == "endless":
        source, tokenizer = Shapes(image_size=16, num_train=20, num_val=9), None
        source.setup()
        tokenizer = tiny_tokenizer(tiny_quantizer(PATCH_NUMS))
    cache = encoded(make_cache(tmp_path, source, tokenizer, views=4), source, tokenizer)
    for rank in range(2):
        for part in ("train", "val"):
            for images, codes in served(cache, source, part, rank=rank, world_size=2):
                assert isinstance(codes, CodeBatch) and codes.codes.dtype == torch.int64
                assert torch.equal(codes.codes, torch.cat(tokenizer.encode(images.images), 1))
                assert torch.equal(codes.labels, images.labels)
                assert torch.equal(codes.indices, images.indices)


def test_epochs_take_turns_with_the_views(source, tokenizer, tmp_path):
    cache = encoded(make_cache(tmp_path, source, tokenizer, views=2), source, tokenizer)
    assert not np.array_equal(*(cache.read(v, np.arange(20))["codes"] for v in range(2)))
    first, again = {}, {}
    for number, (_, batch) in enumerate(served(cache, source, "train")):
        seen = again if number >= 10 else first  # five batches are an epoch, two epochs all views
        for codes, index in zip(batch.codes, batch.indices, strict=True):
            seen.setdefault(int(index), []).append(codes.tolist())
    assert first.keys() == again.keys() == set(range(20)) and first == again


def test_parts_stay_open_for_two_views_at_most(source, tokenizer, tmp_path):
    cache = encoded(make_cache(tmp_path, source, tokenizer, views=4), source, tokenizer)
    list(served(cache, source, "train"))
    list(served(cache, source, "val"))
    assert list(cache._open) == [2, 3, None]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_codes_are_as_wide_as_the_vocabulary_needs(vocab_size, dtype, source, tokenizer, tmp_path):
    key = make_cache(tmp_path, source, tokenizer).key | {"vocab_size": vocab_size}
    cache = TokenCache(tmp_path, key, views=1)
    assert cache.dtype["codes"].base == dtype
    (part, *_) = cache.parts()
    codes = np.full((part.rows, cache.length), vocab_size - 1)
    cache.begin()
    cache.write(part, codes, np.arange(part.rows))
    kept = cache._map(part.name)
    assert (kept["codes"] == codes).all() and kept["label"].tolist() == list(range(part.rows))


# -- stopped and gone on with -----------------------------------------------------------------


class Killed(Exception):
    pass


class Kill:
    """Raise after so many batches."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of a cache that nobody stopped."""
    folder, tokenizer = tmp_path_factory.mktemp("whole"), make_module("var").tokenizer.eval()
    encoded(make_cache(folder, source, tokenizer), source, tokenizer)
    return files(folder)


NUM_BATCHES = 3 * 7 + 3  # parts of 6, 6, 6, 2 images, and 6, 3 to validate; batches of 4


@pytest.mark.parametrize("after", [1, 4, 6, 11, 20, NUM_BATCHES])
def test_killed_after_any_batch_it_goes_on_with_the_parts_that_are_missing(
    after, whole, source, tokenizer, tmp_path
):
    cache = make_cache(tmp_path, source, tokenizer)
    with pytest.raises(Killed):
        encoded(cache, source, tokenizer, Kill(after))
    (tmp_path / ".val-00000.123456.npy").touch()  # what a kill within a write leaves
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[tv]*.npy")}
    assert len(cache.missing()) == len(cache.parts()) - len(kept) and not cache.is_complete()
    again = encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert files(tmp_path) == whole and again.is_complete()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_cache_that_is_there_is_not_encoded_again_and_more_views_add_to_it(
    whole, source, tokenizer, tmp_path
):
    two = encoded(make_cache(tmp_path, source, tokenizer, views=2), source, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    three = encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert files(tmp_path) == whole and three.is_complete() and two.is_complete()
    encoded(make_cache(tmp_path, source, tokenizer, views=1), source, tokenizer)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def work(folder, source, kill_after=None):
    torch.distributed.init_process_group("gloo")
    tokenizer = make_module("var").tokenizer.eval()
    cache = make_cache(folder, source, tokenizer)
    encoded(cache, source, tokenizer, Kill(kill_after) if kill_after else lambda: None)


def test_two_processes_write_what_one_writes_and_one_goes_on_with_it(
    whole, source, tokenizer, tmp_path
):
    together(2, tmp_path / "results", work, tmp_path / "two", source)
    assert files(tmp_path / "two") == whole
    # The one that is killed, or the other, whose peer is gone: whichever is asked first.
    with pytest.raises(AssertionError, match="Killed|closed by peer"):
        together(2, tmp_path / "results", work, tmp_path / "one", source, 5)
    encoded(make_cache(tmp_path / "one", source, tokenizer), source, tokenizer)
    assert files(tmp_path / "one") == whole


@pytest.mark.parametrize("damage", [*DAMAGES, "empty", "doubled"])
def test_a_damaged_part_is_named_and_encoded_again(
    damage, whole, source, tokenizer, tmp_path, capsys
):
    encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    path = tmp_path / "train-0001-00002.npy"
    spoil(path, random.Random(0), (damage,))
    encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert f"{str(path)!r} is damaged; it is made again" in capsys.readouterr().err
    assert files(tmp_path) == whole


def test_parts_that_were_damaged_before_all_were_there_are_encoded_again(
    whole, source, tokenizer, tmp_path
):
    with pytest.raises(Killed):
        encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer, Kill(20))
    os.truncate(tmp_path / "train-0000-00001.npy", 150)
    spoil(tmp_path / "train-0002-00000.npy", random.Random(0), ("one bit",))
    (tmp_path / "train-0000-00002.npy").unlink()
    encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert files(tmp_path) == whole


def test_a_signal_stops_it_after_a_batch_and_the_same_command_goes_on(
    whole, source, tokenizer, tmp_path, monkeypatch
):
    signal_handler, data = SignalHandler(), ImageDataModule(source)
    trainer = functools.partial(L.Trainer, accelerator="cpu", devices=1)
    arguments = (tokenizer, data, trainer, make_cache(tmp_path, source, tokenizer), 4)

    def asked(images, encode=tokenizer.encode):
        signal_handler.received = signal.SIGTERM
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode", asked)
    with pytest.raises(Interrupted, match="SIGTERM"):
        encode_stage(*arguments, signal_handler)
    assert data.codes is None and [p.name for p in tmp_path.iterdir()] == ["tokens.json"]
    encode_stage(*arguments)
    assert files(tmp_path) == whole and data.codes.is_complete()


# -- refused ----------------------------------------------------------------------------------


def test_codes_of_something_else_are_refused_by_name(source, tokenizer, tmp_path):
    encoded(make_cache(tmp_path, source, tokenizer, flip=True), source, tokenizer)
    before, here = files(tmp_path), make_cache(tmp_path, source, tokenizer, flip=True)
    other, longer = tiny_tokenizer(channels=1), Shifted()
    longer.setup()
    longer.train = TensorImages(longer.train.images[:19], torch.arange(19))
    make_cache(tmp_path, source, tokenizer, flip=True, known=False).check()
    for cache, said in [
        (make_cache(tmp_path, source, other, flip=True), ["tokenizer", other.fingerprint()]),
        (make_cache(tmp_path, source, tokenizer, flip=True, seed=1), ["seed 0, this run has 1"]),
        (make_cache(tmp_path, source, tokenizer, flip=False), ["data.flip True", "False"]),
        (make_cache(tmp_path, longer, tokenizer, flip=True), ["num_train 20, this run has 19"]),
    ]:
        for attempt in (cache.check, cache.begin, cache.is_complete):
            with pytest.raises(ValueError) as refused:
                attempt()
            assert all(words in str(refused.value) for words in [str(tmp_path), *said])
            assert "(tokens.dir=...), or delete it" in str(refused.value)
            assert "\n" not in str(refused.value)
    assert files(tmp_path) == before and here.is_complete()


def test_the_seed_matters_only_where_images_are_augmented(digits, tokenizer, tmp_path):
    keys = [make_cache(tmp_path, digits, tokenizer, seed=seed).key for seed in (0, 1)]
    assert keys[0] == keys[1]


def test_a_record_that_says_nothing_is_refused_by_name(source, tokenizer, tmp_path):
    cache = encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    path = tmp_path / "tokens.json"
    content = path.read_text()
    for wrong in ("", "[]", "{}", '{"parts": 3}', content[:50], content.replace("train", "fit")):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=rf"tokens: '.*{tmp_path.name}"):
            cache.is_complete()
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens\.json' is missing"):
        cache.check()


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(
    source, tokenizer, tmp_path, monkeypatch
):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("var_exp.training.encode.shutil.disk_usage", lambda _: usage)
    cache = make_cache(tmp_path, source, tokenizer)
    with pytest.raises(ValueError, match=r"69 images take 9\.8 kB, 1\.0 kB are free at .*views"):
        encoded(cache, source, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


def test_a_disk_that_fills_up_keeps_the_parts_and_the_same_command_goes_on(
    whole, source, tokenizer, tmp_path, monkeypatch
):
    save, saved = np.save, []

    def fill(path, rows):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save(path, rows)

    monkeypatch.setattr(np, "save", fill)
    with pytest.raises(ValueError, match=r"train-0000-00002.npy' cannot be written \(No space"):
        encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    encoded(make_cache(tmp_path, source, tokenizer), source, tokenizer)
    assert files(tmp_path) == whole


def test_forgetting_codes_leaves_what_is_of_others(source, tokenizer, tmp_path):
    encoded(make_cache(tmp_path / "a", source, tokenizer), source, tokenizer)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "val-00000.npy").touch()  # without a record it may be anyone's
    for name in "abcd":  # there is no c
        delete_codes(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "b",
        "d",
        "notes.txt",
        "val-00000.npy",
    ]
