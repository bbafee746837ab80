"""Your own images: a folder, with a folder per class or without.

    root/CLASS/**/*.png                 classes; a share of each is set aside to validate
    root/train/CLASS/... root/val/...   classes; the split is yours
    root/*.png, or root/train + val     no classes: unconditional

Files may be grey, palette, RGB, CMYK, with transparency (laid on white) or 16 bits deep
(scaled, not cut), of any size, turned as their EXIF says.

To train, the crop is the paper's: resize the shorter side to 1.125 x size with Lanczos, then a
random crop; no flip by default. To validate, figures depend on the crop (0.92 and 2.70 are
reported as reconstruction FID of one file), so it has a name that goes into their keys:

    var   the shorter side to 1.125 x size with Lanczos, then the centre (VAR, arXiv 2404.02905)
    adm   halve with a box filter while the image is twice as large as asked, then bicubic to
          the size, then the centre (ADM, Dhariwal and Nichol, arXiv 2105.05233)

A file that does not decode stops the run and is named. With on_bad_image="skip" the next file
that decodes takes its place, wherever and whenever the image is asked for, so that a resumed
run sees the same images.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from var_exp.data.source import ImageSource, RawImage, stratified_split, to_unit_range

EXTENSIONS = set(".bmp .gif .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split())
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
RESIZE_RATIO = 1.125
ON_BAD_IMAGE = ("raise", "skip")


class ImageFolder(ImageSource):
    """Images of a folder; classes are known after `setup`.

    val_fraction: share of each class to validate on, where there is no root/val
    flip:         whether training images are mirrored half of the time
    crop:         of validation images, "var" or "adm"
    expected_classes: how many classes there must be, where another number is a mistake
    on_bad_image: "raise", or "skip": go on with the next file and count it in `bad_images`
    seed:         of the split
    """

    def __init__(
        self,
        root: str | None,
        name: str = "image_folder",
        image_size: int | Sequence[int] = 64,
        channels: int = 3,
        val_fraction: float = 0.1,
        flip: bool = False,
        crop: str = "var",
        expected_classes: int | None = None,
        on_bad_image: str = "raise",
        seed: int = 0,
    ):
        super().__init__(name, image_size, channels)
        if crop not in CROPS:
            raise ValueError(
                f"{name}: crop is {crop!r}, expected one of {', '.join(CROPS)} (data.crop)"
            )
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"{name}: val_fraction is {val_fraction}, expected more than 0 and less than 1 "
                "(data.val_fraction)"
            )
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(
                f"{name}: on_bad_image is {on_bad_image!r}, expected one of "
                f"{', '.join(ON_BAD_IMAGE)} (data.on_bad_image)"
            )
        self.root = root
        self.val_fraction = val_fraction
        self.flip = flip
        self.crop = crop
        self.expected_classes = expected_classes
        self.on_bad_image = on_bad_image
        self.seed = seed

    @property
    def bad_images(self) -> set[str]:
        """Files met so far that did not decode, in this process and in its data workers."""
        splits = [split for split in (self.train, self.val) if split is not None]
        return {path for split in splits for path in split.bad_images}

    def prepare(self) -> None:
        if self.root is None or not Path(self.root).is_dir():
            raise ValueError(
                f"{self.name}: {self.root!r} is not a folder, expected one that holds a folder of "
                "images per class, or images: set data.root=DIR"
            )

    def load(self) -> tuple["ImageFiles", "ImageFiles"]:
        self.prepare()
        train_root, val_root = find_splits(Path(self.root))
        self.class_names, paths, labels = scan(train_root)
        if self.expected_classes not in (None, len(self.class_names)):
            raise ValueError(
                f"{self.name}: '{train_root}' has {len(self.class_names)} classes, expected "
                f"{self.expected_classes} (data.root=DIR, data.expected_classes)"
            )
        if val_root is not None:
            val_names, val_paths, val_labels = scan(val_root)
            val_labels = self._match(val_root, val_names, val_labels)
        else:
            if len(paths) < 2:
                raise ValueError(
                    f"{self.name}: '{self.root}' holds one image, expected at least 2, one to "
                    "validate on (data.root=DIR)"
                )
            num_val = max(1, round(self.val_fraction * len(paths)))
            train, val = stratified_split(labels, num_val, self.seed)
            val_paths, val_labels = [paths[i] for i in val], [labels[i] for i in val]
            paths, labels = [paths[i] for i in train], [labels[i] for i in train]
        skip = self.on_bad_image == "skip"
        return (
            ImageFiles(paths, labels, self.channels, skip),
            ImageFiles(val_paths, val_labels, self.channels, skip),
        )

    def _match(self, val_root: Path, names: Sequence[str], labels: list[int]) -> list[int]:
        """Labels of root/val in the numbering of root/train."""
        unknown = set(names) - set(self.class_names)
        if unknown or bool(names) != bool(self.class_names):
            raise ValueError(
                f"{self.name}: '{val_root}' has the classes {list(names)}, expected some of "
                f"those to train on, {list(self.class_names)} (data.root=DIR)"
            )
        return [self.class_names.index(names[label]) if names else 0 for label in labels]

    def train_transform(self, image: RawImage, rng: np.random.Generator) -> Tensor:
        image = resize_to_cover(image, self.image_size)
        height, width = self.image_size
        top = int(rng.integers(image.height - height + 1))
        left = int(rng.integers(image.width - width + 1))
        image = image.crop((left, top, left + width, top + height))
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return to_unit_range(image)

    def val_transform(self, image: RawImage) -> Tensor:
        return to_unit_range(CROPS[self.crop](image, self.image_size))


class ImageFiles(Dataset):
    """Image files with labels: dataset[i] -> (PIL image, label)."""

    def __init__(self, paths: list[str], labels: list[int], channels: int, skip: bool):
        self.paths, self.labels = paths, labels
        self.mode = "RGB" if channels == 3 else "L"
        self.skip = skip
        self.is_bad = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # by workers too

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def bad_images(self) -> set[str]:
        return {self.paths[i] for i in self.is_bad.nonzero().flatten().tolist()}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return read_image(self.paths[number], self.mode), self.labels[number]
            except ValueError:
                if not self.skip:
                    raise
                self.is_bad[number] = True
        raise ValueError(f"none of the {len(self)} images decodes, the first is {self.paths[0]}")


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """root -> (folder to train on, folder to validate on or None for a share of the first)."""
    folders = set(visible_folders(root))
    if {"train", "val"} <= folders:
        return root / "train", root / "val"
    if folders == {"train"}:
        return root / "train", None
    if "train" in folders and folders <= SPLIT_NAMES:
        raise ValueError(
            f"'{root}' has the folders {sorted(folders)}, expected 'train' and 'val', or one "
            "folder per class (data.root=DIR)"
        )
    return root, None


def scan(root: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """root -> (class names, paths, labels); folders without images are no classes."""
    by_class = {name: images_below(root / name) for name in visible_folders(root)}
    by_class = {name: paths for name, paths in by_class.items() if paths}
    loose = images_below(root, deep=False)
    if loose and by_class:
        raise ValueError(
            f"'{root}' has images beside class folders ({loose[0]}; {next(iter(by_class))}/), "
            "expected one or the other (data.root=DIR)"
        )
    if loose:
        return (), loose, [0] * len(loose)
    if not by_class:
        raise ValueError(
            f"no images under '{root}', expected files that end in one of "
            f"{' '.join(sorted(EXTENSIONS))} (data.root=DIR)"
        )
    paths = [path for paths in by_class.values() for path in paths]
    labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
    return tuple(by_class), paths, labels


def visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def images_below(folder: Path, deep: bool = True) -> list[str]:
    """Image files in a folder, and below it, sorted; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        found += [
            os.path.join(place, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return sorted(found)


def read_image(path: str, mode: str) -> Image.Image:
    """Decodes a file of any mode to 8-bit "RGB" or "L"; ValueError names one that does not."""
    # Decoders raise whatever their format's parser happens to raise.
    try:
        with Image.open(path) as image:
            image.load()
            return to_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:
        raise ValueError(
            f"cannot read the image '{path}' ({error}): remove it, or go on without such files "
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
