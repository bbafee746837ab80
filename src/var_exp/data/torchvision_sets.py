"""MNIST and CIFAR-10, as torchvision stores them, held in memory at the size that is asked for.

The published splits: 60,000 and 50,000 images to train on, the 10,000 test images to
validate. `prepare` downloads them once; without a network, put torchvision's files under
`root` (`MNIST/raw/*-ubyte`, `cifar-10-batches-py/*`) and nothing is fetched.

Letters: N images, (H, W) image size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision import datasets

from var_exp.data.source import ImageSource, TensorImages, to_unit_range


class TorchvisionSource(ImageSource[Tensor]):
    """A set of torchvision's with `train=`; subclasses name it and stack its images.

    root:     the folder that holds the files, made if need be
    download: whether `prepare` may fetch missing files
    """

    dataset: type[datasets.VisionDataset]
    folder: str  # under root, where torchvision looks

    def __init__(
        self,
        name: str,
        image_size: int | Sequence[int],
        channels: int,
        class_names: Sequence[str],
        root: str,
        download: bool,
    ):
        super().__init__(name, image_size, channels, class_names)
        self.root = root
        self.download = download

    def prepare(self) -> None:
        if self.download:
            self._open(train=True, download=True)

    def load(self) -> tuple[TensorImages, TensorImages]:
        return self._split(train=True), self._split(train=False)

    def stack(self, data: Any) -> Tensor:
        """The set's own array -> uint8 (N, C, h, w)."""
        raise NotImplementedError

    def _split(self, train: bool) -> TensorImages:
        split = self._open(train, download=False)
        images = self.stack(split.data)
        if images.shape[-2:] != self.image_size:
            images = F.resize(images, list(self.image_size), antialias=True)
        return TensorImages(images.contiguous(), torch.as_tensor(split.targets))

    def _open(self, train: bool, download: bool) -> datasets.VisionDataset:
        # torchvision raises a different error for each way in which files can be missing, cut
        # short or out of reach.
        try:
            return self.dataset(self.root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
            tried = "fetching them failed" if download else "data.download fetches them"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self.name}: no usable files under '{self.root}/{self.folder}' ({tried}: "
                f"{reason}); put torchvision's files there, or point data.root=DIR at them"
            ) from error


class MNIST(TorchvisionSource):
    """Handwritten digits, grey, 28x28 framed in black to 32x32; not augmented."""

    dataset = datasets.MNIST
    folder = "MNIST/raw"

    def __init__(
        self,
        name: str = "mnist",
        image_size: int | Sequence[int] = 32,
        root: str = "datasets",
        download: bool = True,
    ):
        class_names = [str(digit) for digit in range(10)]
        super().__init__(name, image_size, 1, class_names, root, download)

    def stack(self, data: Tensor) -> Tensor:
        return F.pad(data[:, None], [2, 2, 2, 2])  # (N, 1, 32, 32)


class CIFAR10(TorchvisionSource):
    """Photographs of animals and vehicles, RGB, 32x32.

    flip: whether training images are mirrored half of the time
    """

    dataset = datasets.CIFAR10
    folder = datasets.CIFAR10.base_folder

    def __init__(
        self,
        name: str = "cifar10",
        image_size: int | Sequence[int] = 32,
        root: str = "datasets",
        download: bool = True,
        flip: bool = True,
    ):
        class_names = "airplane automobile bird cat deer dog frog horse ship truck".split()
        super().__init__(name, image_size, 3, class_names, root, download)
        self.flip = flip

    def stack(self, data: np.ndarray) -> Tensor:
        return torch.from_numpy(data).permute(0, 3, 1, 2)  # (N, 3, 32, 32)

    def train_transform(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return to_unit_range(image)
