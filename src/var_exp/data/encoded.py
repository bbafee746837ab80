"""Images that are stored encoded, whatever holds them: how they are decoded, cropped, skipped.

Files may be grey, palette, RGB, CMYK, with transparency (laid on white) or 16 bits deep
(scaled, not cut), of any size, turned as their EXIF says.

To train, the crop is the paper's: resize the shorter side to 1.125 x size with Lanczos, then a
random crop; no flip by default. To validate, figures depend on the crop (0.92 and 2.70 are
reported as reconstruction FID of one file), so it has a name that goes into their keys:

    var   the shorter side to 1.125 x size with Lanczos, then the centre (VAR, arXiv 2404.02905)
    adm   halve with a box filter while the image is twice as large as asked, then bicubic to
          the size, then the centre (ADM, Dhariwal and Nichol, arXiv 2105.05233)

An image that does not decode stops the run and is named. With on_bad_image="skip" the next one
that decodes takes its place, wherever and whenever the image is asked for, so that a resumed
run sees the same images.
"""

from collections.abc import Sequence
from typing import Annotated, BinaryIO

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from annotated_types import Gt, Lt
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from var_exp.configurable import Seed, checked
from var_exp.data.source import ImageSource, stratified_split, to_unit_range

RESIZE_RATIO = 1.125
ON_BAD_IMAGE = ("raise", "skip")
ValFraction = Annotated[float, Gt(0), Lt(1)]


class EncodedSource(ImageSource[Image.Image]):
    """A set of encoded images; classes are known after `setup`.

    val_fraction: share of each class to validate on, where no part is set aside
    flip:         whether training images are mirrored half of the time
    crop:         of validation images, "var" or "adm"
    expected_classes: how many classes there must be, where another number is a mistake
    on_bad_image: "raise", or "skip": go on with the next one and count it in `bad_images`
    seed:         of the split
    """

    costly = True
    crop: str
    train: "EncodedImages"
    val: "EncodedImages"
    #: The option that says where the images are; messages name it.
    place_option = "data.root=DIR"

    @checked
    def __init__(
        self,
        name: str,
        image_size: int | Sequence[int] = 64,
        channels: int = 3,
        val_fraction: ValFraction = 0.1,
        flip: bool = False,
        crop: str = "var",
        expected_classes: int | None = None,
        on_bad_image: str = "raise",
        seed: Seed = 0,
    ):
        super().__init__(name, image_size, channels)
        if crop not in CROPS:
            raise ValueError(
                f"{name}: crop is {crop!r}, expected one of {', '.join(CROPS)} (data.crop)"
            )
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(
                f"{name}: on_bad_image is {on_bad_image!r}, expected one of "
                f"{', '.join(ON_BAD_IMAGE)} (data.on_bad_image)"
            )
        self.val_fraction = val_fraction
        self.flip = flip
        self.crop = crop
        self.expected_classes = expected_classes
        self.on_bad_image = on_bad_image
        self.seed = seed

    @property
    def skips(self) -> bool:
        """Whether the next image takes the place of one that does not decode."""
        return self.on_bad_image == "skip"

    @property
    def bad_images(self) -> set[str]:
        """Images met so far that did not decode, in this process and in its data workers."""
        splits = [split for split in (self.train, self.val) if split is not None]
        return {path for split in splits for path in split.bad_images}

    def check_classes(self, place: str) -> None:
        """ValueError where another number of classes was found than expected."""
        if self.expected_classes not in (None, len(self.class_names)):
            raise ValueError(
                f"{self.name}: '{place}' has {len(self.class_names)} classes, expected "
                f"{self.expected_classes} ({self.place_option}, data.expected_classes)"
            )

    def set_aside(
        self, labels: Sequence[int] | np.ndarray, place: str
    ) -> tuple[list[int], list[int]]:
        """-> the numbers of the images (to train on, to validate on), where no one has split."""
        if len(labels) < 2:
            held = "one image" if len(labels) else "no image"
            raise ValueError(
                f"{self.name}: '{place}' holds {held}, expected at least 2, one to validate on "
                f"({self.place_option})"
            )
        num_val = max(1, round(self.val_fraction * len(labels)))
        return stratified_split(labels, num_val, self.seed)

    def train_transform(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        image = resize_to_cover(image, self.image_size)
        height, width = self.image_size
        top = int(rng.integers(image.height - height + 1))
        left = int(rng.integers(image.width - width + 1))
        image = image.crop((left, top, left + width, top + height))
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return to_unit_range(image)

    def val_transform(self, image: Image.Image) -> Tensor:
        return to_unit_range(CROPS[self.crop](image, self.image_size))


class EncodedImages(Dataset):
    """Images that are decoded when asked for: dataset[i] -> (PIL image, label).

    Subclasses say where number i lies by `read` and `name_of`.

    labels: (N,) whole numbers
    skip:   where one does not decode the next that does takes its place
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, channels: int, skip: bool):
        self.labels = labels
        self.mode = "RGB" if channels == 3 else "L"
        self.skip = skip
        self.is_bad = torch.zeros(len(labels), dtype=torch.bool).share_memory_()  # by workers too

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> Image.Image:
        """ValueError names an image that does not decode."""
        raise NotImplementedError

    def name_of(self, number: int) -> str:
        raise NotImplementedError

    @property
    def bad_images(self) -> set[str]:
        return {self.name_of(i) for i in self.is_bad.nonzero().flatten().tolist()}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return self.read(number), int(self.labels[number])
            except ValueError:
                if not self.skip:
                    raise
                self.is_bad[number] = True
        first = self.name_of(0)
        raise ValueError(f"none of the {len(self)} images decodes, the first is {first}")


def decode(file: str | BinaryIO, name: str, mode: str) -> Image.Image:
    """Decodes an image of any mode to 8-bit "RGB" or "L"; ValueError names one that does not.

    file: a path, or an open file that holds it
    name: what messages call it
    """
    # Decoders raise whatever their format's parser happens to raise.
    try:
        with Image.open(file) as image:
            image.load()
            return to_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:
        raise ValueError(
            f"cannot read the image '{name}' ({error}): remove it, or go on without such files "
            "by data.on_bad_image=skip"
        ) from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any PIL image -> 8-bit `mode`: deep grey scaled, transparency laid on white."""
    if image.mode == "F":
        raise ValueError("32-bit floats, expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"levels up to {levels.max()}, expected 8 or 16 bits a channel")
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Lanczos resize, aspect kept, so that both sides are at least 1.125 x (height, width)."""
    height, width = (round(RESIZE_RATIO * side) for side in size)
    if width * image.height <= height * image.width:
        width = height * image.width // image.height
    else:
        height = width * image.height // image.width
    return image.resize((width, height), Image.Resampling.LANCZOS)


def var_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The paper's: resize to 1.125 x, then the centre."""
    return F.center_crop(resize_to_cover(image, size), list(size))


def adm_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's: box halving, bicubic to the size, then the centre, rounded down."""
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    sides = round(image.width * scale), round(image.height * scale)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


CROPS = {"var": var_crop, "adm": adm_crop}
