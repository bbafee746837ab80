"""Pictures: every image in its place, large enough, with headings."""

import numpy as np
import pytest
import torch
from PIL import Image

from var_exp.evaluation import class_grid, coarse_to_fine, grid, reconstructions, save_png, to_uint8
from var_exp.visualization.images import GAP, MARGIN, PAPER


def flat_images(*levels, size=(16, 16), channels=1):
    """Images of one grey level (0..255) each."""
    return torch.stack([torch.full((channels, *size), level / 255) for level in levels])


def tiles(picture, side=64):
    """The grey levels that the sheet shows, row by row; None where it is empty paper."""
    paper = (picture == PAPER).all(axis=2)
    left = picture.shape[1] - MARGIN - side
    top = picture.shape[0] - MARGIN - side
    rows = []
    for y in range(top, -1, -side - GAP):
        row = []
        for x in range(left, -1, -side - GAP):
            tile = picture[y : y + side, x : x + side]
            if paper[y : y + side, x : x + side].all():
                row.append(None)
            elif (tile == tile[0, 0]).all():
                row.append(int(tile[0, 0, 0]))
        rows.append(row[::-1])
    return [row for row in rows[::-1] if any(level is not None for level in row)]


def test_to_uint8_rounds_and_clamps():
    levels = torch.tensor([-3.0, 0.49, 0.51, 254.4, 254.6, 300.0])
    assert to_uint8(levels / 255).tolist() == [0, 0, 1, 254, 255, 255]
    assert to_uint8(levels).dtype == torch.uint8
    every_level = torch.arange(256)
    assert torch.equal(to_uint8(every_level / 255).long(), every_level)


def test_a_grid_holds_every_image_in_order():
    picture = grid(flat_images(10, 20, 30, 40, 50), columns=3)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert tiles(picture) == [[10, 20, 30], [40, 50, None]]


@pytest.mark.parametrize("side, shown", [(8, 64), (16, 64), (28, 84), (64, 64), (100, 100)])
def test_small_images_are_enlarged_by_a_whole_factor(side, shown):
    image = torch.randint(0, 256, (1, 3, side, side)) / 255
    picture = grid(image, columns=1)
    assert picture.shape == (shown + 2 * MARGIN, shown + 2 * MARGIN, 3)
    inside = picture[MARGIN:-MARGIN, MARGIN:-MARGIN]
    factor = shown // side
    for y in range(factor):
        for x in range(factor):
            pixels = torch.from_numpy(inside[y::factor, x::factor].copy()).permute(2, 0, 1)
            assert torch.equal(pixels, to_uint8(image[0]))


def test_a_class_has_its_own_row_and_a_large_one_goes_on_below():
    images = flat_images(11, 21, 12, 22, 13, 31)
    picture = class_grid(images, torch.tensor([1, 0, 1, 0, 1, 2]), ["cat", "dog"], columns=2)
    levels = [row[-2:] for row in tiles(picture)]
    assert levels == [[21, 22], [11, 12], [13, None], [31, None]]


def test_class_names_are_written_beside_their_rows():
    images, labels = flat_images(1, 2), torch.tensor([0, 1])
    blank = class_grid(images, labels, [" ", " "])
    named = class_grid(images, labels, ["cat", " "])
    first_row = slice(MARGIN, MARGIN + 64)
    ink = (named < 128).all(axis=2)[:, : -MARGIN - 64]
    assert ink[first_row].sum() > 50
    assert ink.sum() == ink[first_row].sum()
    assert named.shape[1] > blank.shape[1]


def test_long_class_names_do_not_push_the_images_away():
    images, labels = flat_images(1), torch.tensor([0])
    assert class_grid(images, labels, ["tench" * 100]).shape[1] < 400


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"labels in 0\.\.2, got 2 in 0\.\.3"):
        class_grid(flat_images(1, 2), torch.tensor([0, 3]), ["cat", "dog"])
    with pytest.raises(ValueError, match="expected 2 labels"):
        class_grid(flat_images(1, 2), torch.tensor([0]), ["cat", "dog"])


def test_coarse_to_fine_has_a_row_per_sample_and_a_column_per_scale():
    per_scale = [flat_images(10, 20), flat_images(11, 21), flat_images(12, 22)]
    sizes = [(1, 1), (2, 2), (4, 4)]
    picture = coarse_to_fine(per_scale, sizes)
    assert tiles(picture) == [[10, 11, 12], [20, 21, 22]]
    headings = picture[: -2 * (64 + GAP) - MARGIN + GAP]
    for column in range(3):
        start = MARGIN + column * (64 + GAP)
        assert (headings[:, start : start + 64] != PAPER).any()
    named = coarse_to_fine(per_scale, sizes, row_names=["cat", "dog"])
    assert [row[-3:] for row in tiles(named)] == [[10, 11, 12], [20, 21, 22]]


def test_reconstructions_stand_below_their_originals():
    per_scale = [flat_images(10, 20), flat_images(11, 21)]
    picture = reconstructions(flat_images(9, 19), per_scale, [(1, 1), (2, 2)])
    assert [row[-2:] for row in tiles(picture)] == [[9, 19], [10, 20], [11, 21]]


def test_headings_must_match_what_they_name():
    with pytest.raises(ValueError, match="expected 2 headings for columns, got 1"):
        coarse_to_fine([flat_images(1), flat_images(2)], [(1, 1)])
    with pytest.raises(ValueError, match="expected 1 headings for rows, got 2"):
        coarse_to_fine([flat_images(1)], [(1, 1)], ["cat", "dog"])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (0, 3, 8, 8)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match="expected images"):
        grid(torch.zeros(shape), columns=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_exact_pixels_and_nothing_else_is_left(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    path = tmp_path / "deep" / "image.png"
    save_png(image, path)
    assert np.array_equal(np.asarray(Image.open(path)).reshape(image.shape), image)
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]
