"""Pictures embedded in the page: as data URIs, small enough, with alternative text.

K scales, N samples
"""

import base64
import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_BYTES = 700_000  # of a picture; larger ones are shrunk, at some loss
MAX_WIDTH = 1600
CELL = 96  # pixels of an image in the animation, at least
MAX_CELL = 160
CRISP = 64  # smaller images are kept exactly
GRAY = (136, 136, 140, 255)  # legible on light and on dark
GAP = 8
STEP_MS, LAST_MS = 700, 2200


class Picture(NamedTuple):
    """src, still: data URIs; still: for readers who prefer no motion, None without animation."""

    src: str
    width: int
    height: int
    alt: str
    still: str | None = None


def embed(path: Path, alt: str) -> Picture | None:
    """Embed a PNG file; None where it is missing or damaged."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size, kind = image.size, "png"
            if len(data) > MAX_BYTES:
                data, kind = _smaller(image), "webp"
    except (OSError, ValueError, SyntaxError):  # PIL raises any of these for a damaged file
        return None
    return Picture(_uri(data, kind), *size, alt)


def animate(path: Path, scales: Sequence[str]) -> Picture | None:
    """Animate samples scale after scale; None where there are none.

    Args:
        path: an .npz with `arr_0`, uint8 (K, N, H, W, C), and `names`, those of N classes.
        scales: K names of the scales, in characters of PIL's own font.
    """
    content = _read(path)
    if content is None:
        return None
    steps, names = content
    count, num = steps.shape[:2]
    titles = list(scales) if len(scales) == count else [str(k + 1) for k in range(count)]
    frames = [_frame(steps[k], names, titles[k], k, count) for k in range(count)]
    lossless = max(steps.shape[2:4]) <= CRISP
    subject = ", ".join(names) if names else f"{num} samples"
    alt = f"{subject}: the image after each of {count} scales, coarse to fine"
    return Picture(
        _uri(_webp(frames, lossless), "webp"),
        *frames[0].size,
        alt,
        _uri(_webp(frames[-1:], lossless), "webp"),
    )


def _read(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """Read the array and the names of its N samples, [] where they are not N."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            steps = archive["arr_0"]
            names = archive["names"].tolist() if "names" in archive else []
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    is_valid = steps.dtype == np.uint8 and steps.ndim == 5 and steps.shape[-1] in (1, 3)
    if not is_valid or not steps.size:
        return None
    return steps, [str(name) for name in names] if len(names) == steps.shape[1] else []


def _frame(images: np.ndarray, names: list[str], title: str, k: int, count: int) -> Image.Image:
    """Lay out images (N, H, W, C) after scale k, transparent for light and dark pages."""
    side = max(images.shape[1:3])
    factor = max(1, -(-CELL // side))
    shrink = min(1.0, MAX_CELL / (side * factor))
    height, width = (round(n * factor * shrink) for n in images.shape[1:3])
    columns = min(len(images), 5)
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(size=15)
    below = 22 if names else 0
    size = (
        columns * (width + GAP) - GAP,
        26 + rows * (height + below + GAP),
    )
    frame = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(frame)
    draw.text((0, 9), f"{title}   scale {k + 1} of {count}", GRAY, font, anchor="lm")
    left = size[0] - count * 12
    for i in range(count):
        fill = GRAY if i <= k else (*GRAY[:3], 70)
        draw.rectangle((left + 12 * i + 3, 6, left + 12 * i + 11, 12), fill=fill)
    for i, pixels in enumerate(images):
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        cell = Image.fromarray(pixels).resize(
            (width, height), Image.Resampling.NEAREST if shrink == 1 else Image.Resampling.LANCZOS
        )
        x = i % columns * (width + GAP)
        y = 26 + i // columns * (height + below + GAP)
        frame.paste(cell, (x, y))
        if names:
            draw.text(
                (x + width // 2, y + height + 11), _fit(names[i], width, font), GRAY, font, "mm"
            )
    return frame


def _fit(name: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a name to the width of the image above it."""
    name = name[:40]
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}\u2026") > width:
        name = name[:-1]
    return f"{name}\u2026"


def _smaller(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    if image.width > MAX_WIDTH:
        height = max(1, round(image.height * MAX_WIDTH / image.width))
        image = image.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=2)
    return out.getvalue()


def _webp(frames: list[Image.Image], lossless: bool) -> bytes:
    out = io.BytesIO()
    times = [STEP_MS] * (len(frames) - 1) + [LAST_MS]
    options = {"lossless": lossless, "quality": 60 if lossless else 80, "method": 1}
    frames[0].save(
        out, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, **options
    )
    return out.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
