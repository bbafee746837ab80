"""What every set of images provides, and the batch that the whole program passes on.

An `ImageSource` is two map-style datasets of raw images, two transforms to [-1, 1], and
the facts that the networks are sized by: image size, channels, classes. It knows nothing
of batches, ranks or epochs; `datamodule.py` adds those. A new set is one file with one
subclass and one YAML.

Nothing here is random without being told how: whoever augments gets a generator that is a
pure function of (seed, epoch, index), so an interrupted run sees the images it would have
seen.

Letters: B batch, C channels, (H, W) image size, N images.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """One step's images, the classes they show, and which images of the set they are."""

    images: Tensor  #  (B, C, H, W) float32 in [-1, 1]
    labels: Tensor  #  (B,) int64, 0 where the set has no classes
    indices: Tensor  # (B,) int64


class CodeBatch(NamedTuple):
    """The same, seen through a tokenizer: codes in the place of images."""

    codes: Tensor  #   (B, L) int64
    labels: Tensor  #  (B,) int64
    indices: Tensor  # (B,) int64


RawImage = Tensor | Image.Image  # uint8 (C, h, w), or PIL
Raw = TypeVar("Raw", bound=RawImage)


class Images(Protocol):
    """What `load` returns two of: dataset[i] -> (raw image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[RawImage, int]: ...


class ImageSource(Generic[Raw]):
    """A set of images with a training and a validation part.

    Subclasses implement `load`; they override `prepare` where something must be fetched
    first, `train_transform` to augment, and `classify` where pixels alone tell the class.

    name:        how the set is called in folders and reports
    image_size:  the side, or (height, width), of what the transforms return
    channels:    1 or 3
    class_names: one name per class; none for a set without classes, whose labels are all 0
    """

    #: Sets that never repeat: image `epoch * len(train) + index` is a new one every epoch.
    endless: bool = False
    #: Whether making an image ready takes about a millisecond or more, as decoding does, so that
    #: processes which load ahead pay. Sets that lie in memory need none.
    costly: bool = False
    #: (B, C, H, W) in [-1, 1] -> (B,) class shown, -1 for none; or None: pixels cannot tell.
    classify: Callable[[Tensor], Tensor] | None = None
    #: How validation images are cut out of larger ones, where they are; figures carry its name.
    crop: str | None = None
    #: None before `setup`.
    train: Images
    val: Images

    def __init__(
        self,
        name: str,
        image_size: int | Sequence[int],
        channels: int,
        class_names: Sequence[str] = (),
    ):
        if channels not in (1, 3):
            raise ValueError(f"{name}: channels is {channels}, expected 1 or 3 (data.channels)")
        self.name = name
        self.image_size = as_size(image_size)
        self.channels = channels
        self.class_names = tuple(class_names)
        self.train = self.val = None  # type: ignore[assignment]  # until `setup`

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 means unconditional."""
        return len(self.class_names)

    @property
    def augments(self) -> bool:
        """Whether a training image may look otherwise in another epoch."""
        return type(self).train_transform is not ImageSource.train_transform

    @property
    def varies(self) -> bool:
        """Whether an epoch may show something else than another one."""
        return self.endless or self.augments

    @property
    def bad_images(self) -> set[str]:
        """Files that did not decode and were skipped; only sets of files can have some."""
        return set()

    def prepare(self) -> None:
        """Fetches what `load` reads; called by one process before any calls `setup`."""

    def setup(self) -> None:
        """Makes `train` and `val`, once; every process calls it, any number of times."""
        if self.train is None:
            self.train, self.val = self.load()

    def load(self) -> tuple[Images, Images]:
        """-> (train, val)."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order (N,) in which an epoch goes through `train`, each image once.

        Sets that are quicker to read in another order than one at random override it.
        """
        return epoch_order(len(self.train), seed, epoch)

    def train_transform(self, image: Raw, rng: np.random.Generator) -> Tensor:
        """raw image -> (C, H, W) in [-1, 1]; whatever is random about it comes from `rng`."""
        return self.val_transform(image)

    def val_transform(self, image: Raw) -> Tensor:
        """raw image -> (C, H, W) in [-1, 1], always the same."""
        return to_unit_range(image)


class TensorImages(Dataset):
    """Images that fit in memory: uint8 (N, C, H, W) with labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor):
        assert len(images) == len(labels) and images.dtype == torch.uint8
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """A side, or (height, width) -> (height, width)."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(
            f"image_size is {image_size}, expected one positive side or [height, width] "
            "(data.image_size)"
        )
    return size


def to_unit_range(image: RawImage) -> Tensor:
    """uint8 image -> float32 (C, H, W), 0 -> -1 and 255 -> 1."""
    pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
    return pixels.float().div_(127.5).sub_(1.0)


def rng_for(seed: int, *path: int) -> np.random.Generator:
    """An independent stream of random numbers for each (seed, path), in any process."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=path))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """An order (num_samples,) at random, another one in each epoch."""
    return rng_for(seed, epoch).permutation(num_samples)


def stratified_split(
    labels: Sequence[int] | np.ndarray, num_val: int, seed: int
) -> tuple[list, list]:
    """Splits image numbers so that both parts have the classes in the same proportion.

    Each class gives its share of `num_val`, remainders going to the classes that lose most
    by rounding; then a class of at least two images gives at least one, so rare classes can
    lift the total above `num_val`.

    -> (train, val), each sorted
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    quotas = counts * (num_val / len(labels))
    shares = np.floor(quotas).astype(int)
    short = num_val - shares.sum()
    shares[np.argsort(shares - quotas, kind="stable")[:short]] += 1
    shares = np.clip(shares, np.minimum(1, counts - 1), np.maximum(counts - 1, 0))

    val: list[int] = []
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(labels == label)
        val += rng_for(seed, int(label)).permutation(members)[:share].tolist()
    train = np.setdiff1d(np.arange(len(labels)), val)
    return train.tolist(), sorted(val)
