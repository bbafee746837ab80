"""Your own images: a folder, with a folder per class or without.

    root/CLASS/**/*.png                 classes; a share of each is set aside to validate
    root/train/CLASS/... root/val/...   classes; the split is yours
    root/*.png, or root/train + val     no classes: unconditional

How files are decoded and cropped, and what becomes of those that do not decode: `encoded.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from var_exp.data.encoded import EncodedImages, EncodedSource, decode

EXTENSIONS = set(".bmp .gif .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split())
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class ImageFolder(EncodedSource):
    """Images of a folder.

    root:    the folder
    options: those of `EncodedSource`
    """

    root: str

    def __init__(self, root: str | None, name: str = "image_folder", **options):
        super().__init__(name, **options)
        self.root = root  # type: ignore[assignment]  # `prepare` refuses None

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
        self.check_classes(str(train_root))
        if val_root is not None:
            val_names, val_paths, val_labels = scan(val_root)
            val_labels = self._match(val_root, val_names, val_labels)
        else:
            train, val = self.set_aside(labels, self.root)
            val_paths, val_labels = [paths[i] for i in val], [labels[i] for i in val]
            paths, labels = [paths[i] for i in train], [labels[i] for i in train]
        return (
            ImageFiles(paths, labels, self.channels, self.skips),
            ImageFiles(val_paths, val_labels, self.channels, self.skips),
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


class ImageFiles(EncodedImages):
    """Image files with labels."""

    def __init__(self, paths: list[str], labels: list[int], channels: int, skip: bool):
        super().__init__(labels, channels, skip)
        self.paths = paths

    def read(self, number: int) -> Image.Image:
        return read_image(self.paths[number], self.mode)

    def name_of(self, number: int) -> str:
        return self.paths[number]


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
    return decode(path, path, mode)
