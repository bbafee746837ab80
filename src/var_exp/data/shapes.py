"""Endless coloured shapes whose class can be read off the pixels, so samples need no network.

A class is a colour and a shape: red, green, blue or yellow; circle, triangle or cross; on
light grey. Size, place, a small rotation and slight shades are random; edges are antialiased
by the pixel's distance to the outline. Image i of a split is a pure function of (seed, split,
i), at any resolution: the same picture, drawn finer.

The set is meant for tokenizers that blur. Shapes are large, stand clear of the border, and
differ in more than their corners (a square is a circle with corners: it is not among them).

Letters: B batch, (H, W) image size. Coordinates: x to the right and y down, in units of the
image's shorter side, origin in its middle; an outline is in units of the shape's radius.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from var_exp.configurable import Seed, checked
from var_exp.data.source import ImageSource, rng_for


class Shape(NamedTuple):
    """An outline around its centroid."""

    distance: Callable[[Tensor, Tensor], Tensor]  # (x, y) -> signed, negative inside
    reach: float  # from the centroid to the farthest point
    area: float
    rotates: bool  # whether a small rotation shows


def circle(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 1


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, pointing up; TRIANGLE is the radius of its inscribed circle."""
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - TRIANGLE


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Two bars, ARM from the centre to their ends, HALF_WIDTH to their sides."""
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - ARM, torch.minimum(x, y) - HALF_WIDTH)


TRIANGLE, ARM, HALF_WIDTH = 0.62, 1.05, 0.36
SHAPES = {
    "circle": Shape(circle, 1.0, math.pi, rotates=False),
    "triangle": Shape(triangle, 2 * TRIANGLE, 3 * math.sqrt(3) * TRIANGLE**2, rotates=True),
    "cross": Shape(
        cross, math.hypot(ARM, HALF_WIDTH), 4 * HALF_WIDTH * (2 * ARM - HALF_WIDTH), rotates=True
    ),
}
COLOURS = {
    "red": (0.85, 0.20, 0.20),
    "green": (0.20, 0.65, 0.30),
    "blue": (0.20, 0.35, 0.85),
    "yellow": (0.95, 0.80, 0.15),
}
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
BACKGROUND = 0.75
RADIUS = (0.27, 0.36)
MARGIN = 0.04  #         least distance from the border
MAX_ROTATION = 15.0  #   degrees
SHADE, TINT = 0.03, 0.01  # largest change of a colour's channels, of the background's
SPLITS = {"train": 0, "val": 1}


class Shapes(ImageSource):
    """RGB shapes, twelve classes, a new set of `num_train` images in every epoch.

    num_train, num_val: nominal lengths; any image number can be drawn
    seed:               another seed, other images
    """

    endless = True

    @checked
    def __init__(
        self,
        name: str = "shapes",
        image_size: int | Sequence[int] = 32,
        num_train: PositiveInt = 10_000,
        num_val: PositiveInt = 1_000,
        seed: Seed = 0,
    ):
        super().__init__(name, image_size, channels=3, class_names=[" ".join(c) for c in CLASSES])
        if min(num_train, num_val) < 1:
            raise ValueError(
                f"shapes: num_train and num_val must be at least 1, got {num_train} and {num_val} "
                f"(data.num_train, data.num_val)"
            )
        # Large shapes take as long to draw as photographs take to decode.
        self.costly = math.prod(self.image_size) > 64**2
        self.num_train = num_train
        self.num_val = num_val
        self.seed = seed

    def load(self) -> tuple["ShapeImages", "ShapeImages"]:
        return (
            ShapeImages(self.image_size, self.num_train, self.seed, SPLITS["train"]),
            ShapeImages(self.image_size, self.num_val, self.seed, SPLITS["val"]),
        )

    def classify(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> the class (B,) that each shows, -1 for none."""
        return judge_shapes(images)


class ShapeImages(Dataset):
    """One split: dataset[i] -> (uint8 (3, H, W), label), the classes taking turns."""

    def __init__(self, image_size: tuple[int, int], length: int, seed: int, split: int):
        self.image_size, self.length, self.seed, self.split = image_size, length, seed, split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Many at once, as a DataLoader asks for them: each is what it is alone, but sooner."""
        labels = [index % len(CLASSES) for index in indices]
        rngs = (rng_for(self.seed, self.split, index) for index in indices)
        draws = torch.tensor([rng.uniform(-1, 1, size=11).tolist() for rng in rngs])  # (N, 11)
        masks = self._masks(labels, draws[:, :4])  #                                    (N, H, W)

        palette = torch.tensor([COLOURS[CLASSES[label][0]] for label in labels])
        inside = palette + SHADE * draws[:, 4:7]  #                                     (N, 3)
        outside = BACKGROUND + SHADE * draws[:, 7:8] + TINT * draws[:, 8:11]
        images = outside[..., None, None] + (
            (inside - outside)[..., None, None] * masks[:, None]
        )  #                                                                            (N, 3, H, W)
        return list(zip(images.mul(255).round().to(torch.uint8), labels, strict=True))

    def _masks(self, labels: list[int], draws: Tensor) -> Tensor:
        """labels and draws (N, 4) of size, place, rotation -> coverage (N, H, W)."""
        size, *place, turn = draws[..., None, None].unbind(dim=1)  #                    (N, 1, 1)
        radius = sum(RADIUS) / 2 + size * (RADIUS[1] - RADIUS[0]) / 2
        angles = [math.radians(MAX_ROTATION * t) for t in turn.flatten().tolist()]
        turns = [torch.tensor([f(a) for a in angles]).view(-1, 1, 1) for f in (math.cos, math.sin)]
        width, height = (side / min(self.image_size) for side in reversed(self.image_size))

        masks = torch.empty(len(labels), *self.image_size)
        names = [CLASSES[label][1] for label in labels]
        for name in dict.fromkeys(names):
            shape, rows = SHAPES[name], [row for row, other in enumerate(names) if other == name]
            slack = shape.reach * radius[rows] + MARGIN
            x, y = place[0][rows] * (width / 2 - slack), place[1][rows] * (height / 2 - slack)
            cos_sin = (turns[0][rows], turns[1][rows])
            masks[rows] = coverage(shape, radius[rows], (x, y), cos_sin, self.image_size)
        return masks


@cache
def pixel_centres(image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """-> x (1, W), y (H, 1)"""
    height, width = image_size
    x = (torch.arange(width) + 0.5 - width / 2) / min(image_size)
    y = (torch.arange(height) + 0.5 - height / 2) / min(image_size)
    return x[None, :], y[:, None]


def coverage(
    shape: Shape,
    radius: Tensor,
    centre: tuple[Tensor, Tensor],
    cos_sin: tuple[float | Tensor, float | Tensor],
    image_size: tuple[int, int],
) -> Tensor:
    """The share (N, H, W) of each pixel inside a shape; radius, centre, cos_sin (N, 1, 1).

    Only operations that IEEE 754 rounds exactly: an image does not depend on its neighbours.
    """
    x, y = (axis.to(radius.device) for axis in pixel_centres(image_size))
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    if shape.rotates:
        cos, sin = cos_sin
        x, y = cos * x + sin * y, cos * y - sin * x  #                                  (N, H, W)
    return (0.5 - shape.distance(x, y) * radius * min(image_size)).clamp(0, 1)


# The classifier: what an image shows, from its pixels alone.

JUDGED_SIDE = 32  #    larger images are averaged down to about this
ANGLES = range(-20, 21, 5)
LEAST_OVERLAP = 0.7  # intersection over union with the best outline
FARTHEST_COLOUR = 0.25
LEAST_CONTRAST = 0.15


def judge_shapes(images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> the class (B,) that each shows, -1 for none.

    The border gives the background, the pixels farthest from it the shape's colour; between
    the two lies a soft mask. The shape is the one whose outline, drawn with the mask's
    centroid and area at a few rotations, overlaps the mask best.
    """
    pixels = images.float().add(1).div(2)
    pixels = F.avg_pool2d(pixels, max(1, min(pixels.shape[-2:]) // JUDGED_SIDE))
    inside, outside = shape_colour(pixels)  #                                   (B, 3) each
    mask = soft_mask(pixels, inside, outside)  #                                (B, H, W)
    overlaps = torch.stack([best_overlap(mask, shape) for shape in SHAPES.values()], dim=1)
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    distances = torch.cdist(inside, palette)  #                                 (B, colours)

    overlap, shape = overlaps.max(dim=1)
    distance, colour = distances.min(dim=1)
    shows = (
        (overlap >= LEAST_OVERLAP)
        & (distance <= FARTHEST_COLOUR)
        & ((inside - outside).norm(dim=1) >= LEAST_CONTRAST)
    )
    return torch.where(shows, colour * len(SHAPES) + shape, -1)


def shape_colour(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """pixels (B, 3, H, W) -> colour (B, 3) inside the shape, and (B, 3) of the background."""
    sides = [pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]]
    outside = torch.cat(sides, dim=-1).median(dim=-1).values  #                 (B, 3)
    flat = pixels.flatten(2)  #                                                 (B, 3, H * W)
    distance = (flat - outside[..., None]).norm(dim=1)  #                       (B, H * W)
    far = distance.kthvalue(int(0.95 * distance.shape[1]), dim=1, keepdim=True).values
    core = (distance >= 0.75 * far).float()
    inside = (flat * core[:, None]).sum(-1) / core.sum(-1, keepdim=True)  #      (B, 3)
    return inside, outside


def soft_mask(pixels: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """How far (B, H, W) each pixel is from `outside` to `inside`, 0 to 1, noise cut off."""
    way = inside - outside
    way = way / way.square().sum(dim=1, keepdim=True).clamp(min=1e-6)
    along = torch.einsum("bchw,bc->bhw", pixels - outside[..., None, None], way)
    return (2 * along - 0.5).clamp(0, 1)


def best_overlap(mask: Tensor, shape: Shape) -> Tensor:
    """mask (B, H, W) -> best intersection over union (B,) with a shape of its place and area."""
    size = mask.shape[-2], mask.shape[-1]
    x, y = (axis.to(mask.device) for axis in pixel_centres(size))
    area = mask.sum(dim=(1, 2), keepdim=True).clamp(min=1)  #                   (B, 1, 1)
    at_x, at_y = ((mask * axis).sum(dim=(1, 2), keepdim=True) / area for axis in (x, y))
    radius = (area / shape.area).sqrt() / min(size)
    overlaps = []
    for degrees in ANGLES if shape.rotates else [0]:
        angle = math.radians(degrees)
        ideal = coverage(shape, radius, (at_x, at_y), (math.cos(angle), math.sin(angle)), size)
        both = torch.minimum(mask, ideal).sum(dim=(1, 2))
        overlaps.append(both / torch.maximum(mask, ideal).sum(dim=(1, 2)).clamp(min=1))
    return torch.stack(overlaps).amax(dim=0)
