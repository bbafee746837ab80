"""The feature network for offline work: a small convolutional classifier.

It is trained in seconds on the very images it will compare. Its seed is fixed, so the same images
give the same network and figures of different runs compare. Where images have no classes, k-means
on their coarse pixels makes ten, and these pseudo-labels take the place of classes (DeepCluster,
Caron et al., arXiv 1807.05520, without its iterations): the features still see shapes and
strokes, and an Inception Score then says how evenly samples cover the clusters.

    B batch, N images, (C, H, W) an image, F features
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, cross_entropy

from var_exp.evaluation.networks.base import FeatureNetwork, Features
from var_exp.io.files import atomic_write, read_tensors
from var_exp.visualization.images import to_uint8

WIDTH = 8
MAX_SIDE = 64  #      pixels a side that the classifier looks at
NUM_FEATURES = 64  #  few, so that a few hundred images fill their covariance
NUM_CLUSTERS = 10  #  pseudo-classes of images without classes
NUM_STEPS = 400
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
MAX_TRAIN = 4096  #   images that are read to train on
MAX_VAL = 1024  #     images that are read to measure the accuracy on


class LabelledImages(NamedTuple):
    """pixels: uint8 (N, C, h, w), as large as the classifier looks at them; labels: (N,)."""

    pixels: Tensor
    labels: Tensor


class ClassifierFeatures(FeatureNetwork):
    """A small convolutional classifier; its features have mean 0 and variance 1 on real images.

    It looks at no more than 64 pixels a side, larger images are averaged down, and its first
    convolution brings them to about 16: what is finer than that it does not see.

    task:     what it was trained to tell, "classes" or "clusters"
    accuracy: share of held-out images it gets right
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: tuple[int, int], channels: int, num_classes: int):
        factor = _shrink_factor(image_size)
        about = {
            "layer": f"{NUM_FEATURES} before the head, standardised on training images",
            "resize": "none" if factor == 1 else f"means of {factor} x {factor} pixels",
        }
        super().__init__("classifier", NUM_FEATURES, about)
        self.image_size, self.channels = (image_size[0], image_size[1]), channels
        self.learned("classes", 0.0)
        stride = max(1, min(image_size) // factor // 16)
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, WIDTH, stride + 2, stride, padding=1),
            nn.SiLU(),
            _conv_block(WIDTH, 2 * WIDTH, stride=2),
            _conv_block(2 * WIDTH, 2 * WIDTH, stride=1),
            _conv_block(2 * WIDTH, 4 * WIDTH, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * WIDTH * 4 * 4, NUM_FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, num_classes))
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("std", torch.ones(NUM_FEATURES))

    def learned(self, task: str, accuracy: float) -> None:
        """Note what it was trained to tell, and how well it does."""
        self.task, self.accuracy = task, accuracy
        self.about |= {"trained_to_tell": task, "accuracy": accuracy}

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the class that each shows, (B,) int64, on the CPU."""
        return self((images + 1) / 2).logits.argmax(dim=1).cpu()

    def extract(self, pixels: Tensor) -> Features:
        """What is seen of uint8 pixels (B, C, H, W).

        Raises:
            ValueError: images of another size than those it was trained on.
        """
        if tuple(pixels.shape[1:]) != (self.channels, *self.image_size):
            raise ValueError(
                f"evaluation: the classifier was trained on images of (C, H, W) = "
                f"{(self.channels, *self.image_size)}, got {tuple(pixels.shape[1:])}"
            )
        return self.see(avg_pool2d(_to_float(pixels), _shrink_factor(self.image_size)))

    def see(self, shrunk: Tensor) -> Features:
        """What `extract` says of images in [0, 1] that are averaged down already."""
        hidden = self.trunk(2 * shrunk - 1)  #           (B, F)
        features = (hidden - self.mean) / self.std
        return Features(features, self.head(hidden))  #  (B, F), (B, num_classes)

    def logits(self, shrunk: Tensor) -> Tensor:
        """Those of `see`, (B, num_classes)."""
        return self.head(self.trunk(2 * shrunk - 1))


def _conv_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.SiLU(),
    )


def _shrink_factor(image_size: tuple[int, int]) -> int:
    return -(-max(image_size) // MAX_SIDE)


def train_or_load(path: str | Path, source, seed: int = 0) -> ClassifierFeatures:
    """The classifier of a source of images: read from `path`, or trained and written there.

    The file holds plain containers and loads with `weights_only=True`; it is written beside its
    place and moved, so that processes which train at the same time leave one whole file.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up; None where it is not known.

    Raises:
        ValueError: no source; the file is not such a classifier, or one of other images.
    """
    if source is None:
        raise ValueError(
            "evaluation: the classifier is trained on the images of a run, which are not known "
            "here; choose another network (evaluation=inception, dinov2 or clip)"
        )
    path = Path(path)
    if path.exists():
        return _load(path, source, seed)
    network = train_classifier(source, seed)
    about = _describe(source, seed) | {"task": network.task, "accuracy": network.accuracy}
    with atomic_write(path) as unfinished:
        torch.save({"about": about, "state_dict": network.state_dict()}, unfinished)
    return network


@torch.inference_mode(False)
def _load(path: Path, source, seed: int) -> ClassifierFeatures:
    try:
        saved = read_tensors(path)
        about, weights = saved["about"], saved["state_dict"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"evaluation: {path} is not a classifier of var-exp; delete it and it is trained again"
        ) from error
    for key, expected in _describe(source, seed).items():
        if about.get(key) != expected:
            raise ValueError(
                f"evaluation: {path} was trained with {key} = {about.get(key)}, expected "
                f"{expected}; delete it or choose another path"
            )
    num_classes = len(weights["head.1.bias"])
    network = ClassifierFeatures(source.image_size, source.channels, num_classes)
    network.load_state_dict(weights)
    network.learned(about["task"], about["accuracy"])
    return network.eval().requires_grad_(False)


def _describe(source, seed: int) -> dict:
    """Which images a classifier was trained on, as plain data."""
    return {
        "source": source.name,
        "image_size": list(source.image_size),
        "channels": source.channels,
        "class_names": list(source.class_names),
        "num_train": len(source.train),
        "seed": seed,
    }


@torch.inference_mode(False)
def train_classifier(source, seed: int = 0) -> ClassifierFeatures:
    """Train on a source's training images, on the CPU; measure on its validation images.

    A pure function of the images and the seed: the caller's random numbers neither matter nor
    move, and the mode it is called in does not matter.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        train = _read(source, source.train, MAX_TRAIN)
        val = _read(source, source.val, MAX_VAL)
        if source.num_classes == 0:
            train, val = _cluster(train, val, seed)
        num_classes = source.num_classes or NUM_CLUSTERS
        network = ClassifierFeatures(source.image_size, source.channels, num_classes)
        _fit(network, train)
    network.requires_grad_(False).eval()
    _standardise(network, train.pixels)
    predicted = torch.cat([network.logits(x).argmax(dim=1) for x in _batches(val.pixels)])
    accuracy = (predicted == val.labels).double().mean().item()
    network.learned("classes" if source.num_classes else "clusters", accuracy)
    return network


def _read(source, dataset: Any, limit: int) -> LabelledImages:
    """At most `limit` images, drawn evenly."""
    chosen = torch.randperm(len(dataset))[:limit].sort().values.tolist()
    factor = _shrink_factor(source.image_size)
    pixels, labels = [], []
    for image, label in map(dataset.__getitem__, chosen):
        shrunk = avg_pool2d(source.val_transform(image), factor)  # (C, h, w)
        pixels.append(to_uint8((shrunk + 1) / 2))
        labels.append(label)
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))


def _cluster(
    train: LabelledImages, val: LabelledImages, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """The same images with pseudo-labels: k-means on 8 x 8 pixels of each."""
    coarse, val_coarse = (
        adaptive_avg_pool2d(_to_float(part.pixels), 8).flatten(1).numpy() for part in (train, val)
    )  # each (N, C * 64)
    num_clusters = min(NUM_CLUSTERS, len(coarse))
    kmeans = KMeans(num_clusters, n_init=4, random_state=seed).fit(coarse)
    labels = torch.from_numpy(kmeans.labels_).long()
    val_labels = torch.from_numpy(kmeans.predict(val_coarse)).long()
    return train._replace(labels=labels), val._replace(labels=val_labels)


def _fit(network: ClassifierFeatures, train: LabelledImages) -> None:
    """Cross-entropy on batches that are moved by up to a pixel, one-cycle learning rate."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS)
    for _ in range(NUM_STEPS):
        chosen = torch.randint(len(train.labels), (BATCH_SIZE,))
        move = torch.randint(-1, 2, (2,)).tolist()
        moved = _to_float(train.pixels[chosen].roll(move, dims=(2, 3)))
        loss = cross_entropy(network.logits(moved), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _standardise(network: ClassifierFeatures, pixels: Tensor) -> None:
    """Give every feature mean 0 and variance 1 on the training images."""
    features = torch.cat([network.see(x).features for x in _batches(pixels)])
    network.std.copy_(features.std(dim=0).clamp_min(1e-6))
    network.mean.copy_(features.mean(dim=0))


def _batches(pixels: Tensor) -> Iterator[Tensor]:
    return map(_to_float, pixels.split(256))


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255
