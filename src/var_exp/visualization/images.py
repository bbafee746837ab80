"""Pictures from tensors: images on a light sheet with headings, drawn with torch and PIL.

Small images are enlarged by whole factors, so that a pixel stays a square. Every function returns
a uint8 (H, W, 3) array, the form that every logger and `save_png` take.

    N images, K scales, (C, H, W) an image with values in [0, 1]; C is 1 or 3
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from var_exp.io.files import atomic_write

MIN_SIDE = 64  # smaller images are enlarged to at least this many pixels
GAP = 4  #       between neighboring images
MARGIN = 16  #   around the sheet, and between headings and images
PAPER = (240, 240, 242)
INK = (48, 48, 52)
MAX_HEADING = 24  # characters
CAPTION = 14  #  font size below an image


def to_uint8(images: Tensor) -> Tensor:
    """Convert [0, 1] to 0..255 by rounding and clamping, the one rule for all images written."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write a uint8 (H, W, 3) or (H, W, 1) array atomically."""
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    with atomic_write(path) as unfinished:
        Image.fromarray(pixels).save(unfinished, format="PNG")


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Draw images (N, C, H, W), `columns` in a row."""
    pixels = _enlarge(images)
    return _sheet([pixels[i : i + columns] for i in range(0, len(pixels), columns)])


def class_grid(
    images: Tensor, labels: Tensor, class_names: Sequence[str], columns: int = 10
) -> np.ndarray:
    """Draw images (N, C, H, W), a row per class with its name; long rows continue below.

    Args:
        labels: (N,) classes; `len(class_names)` stands for "no class".
    """
    names = [*class_names, "no class"]
    if len(labels) != len(images) or not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(
            f"pictures: expected {len(images)} labels in 0..{len(class_names)}, got {len(labels)} "
            f"in {int(labels.min())}..{int(labels.max())}"
        )
    pixels, classes = _enlarge(images), labels.cpu().numpy()
    rows, headings = [], []
    for label in np.unique(classes):
        members = pixels[classes == label]
        for start in range(0, len(members), columns):
            rows.append(members[start : start + columns])
            headings.append("" if start else names[label])
    return _sheet(rows, row_names=headings)


def coarse_to_fine(
    per_scale: Sequence[Tensor], sizes: Sequence[tuple[int, int]], row_names: Sequence[str] = ()
) -> np.ndarray:
    """Draw samples after each scale: a row per sample, a column per scale.

    Args:
        per_scale: K tensors (N, C, H, W), as `tokenizer.decode(indices, per_scale=True)` gives
            them, brought to [0, 1].
        sizes: K sides of the token maps, as in `schedule.sizes`.
        row_names: N headings of the samples, their classes for instance.
    """
    by_scale = [_enlarge(images) for images in per_scale]
    rows = [list(row) for row in zip(*by_scale, strict=True)]
    return _sheet(rows, row_names=row_names, column_names=_scale_names(sizes))


def reconstructions(
    originals: Tensor, per_scale: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Draw a column per image: the original, then its reconstruction after each scale.

    Args:
        originals: (N, C, H, W).
        per_scale, sizes: as in `coarse_to_fine`.
    """
    rows = [_enlarge(images) for images in (originals, *per_scale)]
    return _sheet(rows, row_names=["original", *_scale_names(sizes)])


def captioned(
    rows: Tensor, captions: Sequence[Sequence[str]], column_names: Sequence[str] = ()
) -> np.ndarray:
    """Draw images (N, columns, C, H, W), each with its caption below; "" for none.

    Args:
        captions: N rows of as many as there are columns; a few characters each.
    """
    font = ImageFont.load_default(size=CAPTION)
    cells: list[list[np.ndarray]] = []
    for images, words in zip(rows, captions, strict=True):
        pixels = _enlarge(images)
        paper = np.broadcast_to(
            np.array(PAPER, np.uint8), (len(pixels), CAPTION + GAP, pixels.shape[2], 3)
        )
        cells.append([])
        for image, text in zip(np.concatenate([pixels, paper], axis=1), words, strict=True):
            cell = Image.fromarray(image)
            place = cell.width // 2, cell.height - GAP // 2
            ImageDraw.Draw(cell).text(place, text, INK, font, anchor="mb")
            cells[-1].append(np.asarray(cell))
    return _sheet(cells, column_names=column_names)


def _scale_names(sizes: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{h}x{w}" for h, w in sizes]


def _enlarge(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] -> uint8 (N, h, w, 3), sides a whole multiple of the images'."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) < 1:
        raise ValueError(
            f"pictures: expected images (N, C, H, W), N >= 1, C = 1 or 3, got {tuple(images.shape)}"
        )
    factor = max(1, -(-MIN_SIDE // min(images.shape[2:])))
    pixels = to_uint8(images.detach().cpu()).expand(-1, 3, -1, -1)  # (N, 3, H, W)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return pixels.permute(0, 2, 3, 1).numpy()  #                      (N, h, w, 3)


def _sheet(
    rows: Sequence[Sequence[np.ndarray] | np.ndarray],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> np.ndarray:
    """Draw rows of images of one size, with headings at the left and on top.

    Rows may differ in length.
    """
    height, width = rows[0][0].shape[:2]
    num_columns = max(len(row) for row in rows)
    _check_headings(row_names, len(rows), "rows")
    _check_headings(column_names, num_columns, "columns")
    font_size = min(28, max(15, height // 5))
    font = ImageFont.load_default(font_size)
    row_names = [_shorten(name) for name in row_names]
    left = MARGIN + max((round(font.getlength(name)) + MARGIN for name in row_names), default=0)
    top = MARGIN + (font_size + MARGIN // 2 if column_names else 0)
    size = (
        left + num_columns * (width + GAP) - GAP + MARGIN,
        top + len(rows) * (height + GAP) - GAP + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            place = left + j * (width + GAP), top + i * (height + GAP)
            sheet.paste(Image.fromarray(image), place)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(row_names):
        middle = top + i * (height + GAP) + height // 2
        draw.text((left - MARGIN, middle), name, INK, font, anchor="rm")
    for j, name in enumerate(column_names):
        centre = left + j * (width + GAP) + width // 2
        draw.text((centre, top - MARGIN // 2), name, INK, font, anchor="mb")
    return np.asarray(sheet)


def _check_headings(names: Sequence[str], count: int, what: str) -> None:
    if names and len(names) != count:
        raise ValueError(f"pictures: expected {count} headings for {what}, got {len(names)}")


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_HEADING else f"{name[: MAX_HEADING - 1].rstrip()}\u2026"
