"""MNIST and CIFAR-10 read torchvision's files; a missing or broken one is one clear line.

The files here are tiny, but in the real formats. CIFAR's are checked against their checksums
like the real ones: the tests put the tiny files' own checksums where torchvision keeps those of
the real files.
"""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

from var_exp.data import CIFAR10, MNIST
from var_exp.data.source import rng_for


@pytest.fixture
def mnist_root(tmp_path):
    """Six training images and four test images, in idx files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("t10k", 4)):
        images = rng.integers(1, 256, size=(number, 28, 28), dtype=np.uint8)
        header = struct.pack(">4i", 0x803, number, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(range(3, 3 + number))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, number) + labels
        )
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Two images in each of the five training batches, three to test, in pickles."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(number: int) -> dict:
        data = rng.integers(0, 256, size=(number, 3072), dtype=np.uint8)
        return {"data": data, "labels": list(range(number))}

    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch(2))] for i in range(1, 6)]
    meta = {"filename": "batches.meta", "key": "label_names"}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(
        datasets.CIFAR10, "test_list", [["test_batch", write("test_batch", batch(3))]]
    )
    meta["md5"] = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def test_mnist_digits_keep_their_pixels_in_a_black_frame(mnist_root):
    source = MNIST(root=str(mnist_root))
    source.prepare()
    source.setup()
    assert (len(source.train), len(source.val), source.num_classes) == (6, 4, 10)
    image, label = source.val[2]
    stored = datasets.MNIST(mnist_root, train=False)
    assert image.shape == (1, 32, 32) and label == stored.targets[2] == 5
    assert torch.equal(image[0, 2:30, 2:30], stored.data[2])
    assert image.sum() == stored.data[2].sum()


def test_mnist_digits_come_in_other_sizes(mnist_root):
    source = MNIST(root=str(mnist_root), image_size=16)
    source.setup()
    assert source.val_transform(source.train[0][0]).shape == (1, 16, 16)


def test_cifar_images_come_as_stored_and_are_mirrored_half_of_the_time(cifar_root):
    source = CIFAR10(root=str(cifar_root))
    source.prepare()
    source.setup()
    assert (len(source.train), len(source.val), source.num_classes) == (10, 3, 10)
    image, label = source.val[1]
    stored, stored_label = datasets.CIFAR10(cifar_root, train=False)[1]
    assert torch.equal(image, torch.from_numpy(np.array(stored)).permute(2, 0, 1))
    assert label == stored_label and source.class_names[label] == "automobile"

    as_is = source.val_transform(image)
    seen = [source.train_transform(image, rng_for(i)) for i in range(200)]
    mirrored = [torch.equal(one, as_is.flip(-1)) for one in seen]
    assert 60 < sum(mirrored) < 140
    assert all(m or torch.equal(one, as_is) for m, one in zip(mirrored, seen, strict=True))
    unflipped = CIFAR10(root=str(cifar_root), flip=False)
    assert all(torch.equal(unflipped.train_transform(image, rng_for(i)), as_is) for i in range(9))


def test_the_class_names_are_those_in_the_files(cifar_root):
    assert CIFAR10().class_names == tuple(datasets.CIFAR10(cifar_root).classes)


@pytest.mark.parametrize("source", [MNIST, CIFAR10])
def test_missing_files_are_one_line_that_says_where_and_what_to_do(source, tmp_path):
    one = source(root=str(tmp_path / "nowhere"), download=False)
    one.prepare()
    with pytest.raises(ValueError) as error:
        one.setup()
    message = str(error.value)
    assert str(tmp_path / "nowhere" / one.folder) in message
    assert "data.download" in message and "data.root=DIR" in message and "\n" not in message


@pytest.mark.parametrize("source", [MNIST, CIFAR10])
def test_a_download_without_a_network_is_one_line_too(source, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ValueError, match="fetching them failed") as error:
        source(root=str(tmp_path)).prepare()
    assert str(tmp_path / source.folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 500])
def test_a_broken_mnist_file_is_named(mnist_root, keep):
    path = mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="no usable files under .*MNIST/raw"):
        MNIST(root=str(mnist_root)).setup()


def test_a_cifar_file_with_another_checksum_is_refused_unopened(cifar_root):
    path = cifar_root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="no usable files under .*cifar-10-batches-py"):
        CIFAR10(root=str(cifar_root)).setup()
