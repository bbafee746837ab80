"""Nearest training images: as a slow search finds them, and what tells copies from new images."""

import math

import numpy as np
import pytest
import torch

from var_exp.evaluation import neighbours
from var_exp.evaluation.neighbours import nearest, neighbour_ratio, neighbours_picture
from var_exp.visualization.images import CAPTION, GAP, MARGIN, PAPER


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    monkeypatch.setattr(neighbours, "COLUMNS", 5)


@pytest.mark.parametrize("k", [1, 3, 8, 33])
def test_the_nearest_are_those_of_a_slow_search(k, small_parts):
    features, reference = torch.randn(20, 6), torch.randn(33, 6)
    distances, rows = nearest(features, reference, k)
    assert distances.shape == rows.shape == (20, k) and rows.dtype == torch.int64
    for i, feature in enumerate(features.double()):
        slow = [(feature - other).norm().item() for other in reference.double()]
        expected = sorted(range(33), key=slow.__getitem__)[:k]
        assert rows[i].tolist() == expected
        assert distances[i].tolist() == pytest.approx([slow[j] for j in expected])


def test_no_more_than_a_part_of_all_distances_is_held_at_once(monkeypatch, small_parts):
    sizes = []

    def cdist(a, b):
        sizes.append(len(a) * len(b))
        return (a[:, None] - b).norm(dim=2)

    monkeypatch.setattr(torch, "cdist", cdist)
    nearest(torch.randn(20, 6), torch.randn(33, 6), 2)
    assert max(sizes) == 7 * 5 and sum(sizes) == 20 * 33


def test_a_copy_is_at_distance_0_however_long_its_features_are():
    reference = 1e4 + torch.randn(300, 50)
    distances, rows = nearest(reference[[7, 205]], reference, 2)
    assert rows[:, 0].tolist() == [7, 205]
    assert distances[:, 0].tolist() == [0, 0] and distances[:, 1].min() > 1


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_images_are_refused(k):
    with pytest.raises(ValueError, match=f"expected 1 to 5 neighbours, .* got {k}"):
        nearest(torch.randn(3, 4), torch.randn(5, 4), k)


def test_features_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(5, 6\)"):
        nearest(torch.randn(3, 4), torch.randn(5, 6), 1)


def test_the_ratio_tells_copies_from_unseen_and_strange_images():
    training, held_out, unseen = (torch.randn(400, 8) for _ in range(3))
    assert neighbour_ratio(training[:100], training, held_out) == 0
    nearly = training[:100] + 0.01 * torch.randn(100, 8)
    assert 0 < neighbour_ratio(nearly, training, held_out) < 0.1
    assert neighbour_ratio(unseen, training, held_out) == pytest.approx(1, abs=0.1)
    assert neighbour_ratio(5 * unseen, training, held_out) > 3


def test_there_is_no_ratio_to_images_that_are_training_images():
    training = torch.randn(50, 8)
    assert math.isnan(neighbour_ratio(torch.randn(20, 8), training, training[:10]))


def test_the_picture_shows_each_sample_its_neighbours_and_their_distances():
    levels = torch.tensor([[10, 20, 30], [40, 50, 60]]) / 255
    shown = levels[:, :, None, None, None].expand(-1, -1, 1, 16, 16)  # (2, 3, C, H, W)
    distances = torch.tensor([[0.0, 1.5], [12.25, 300.0]], dtype=torch.float64)
    picture = neighbours_picture(shown[:, 0], shown[:, 1:], distances)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    cell = 64 + CAPTION + GAP
    top = picture.shape[0] - MARGIN - 2 * cell - GAP
    for i in range(2):
        for j in range(3):
            y, x = top + i * (cell + GAP), MARGIN + j * (64 + GAP)
            tile, caption = np.split(picture[y : y + cell, x : x + 64], [64])
            assert (tile == round(levels[i, j].item() * 255)).all()
            assert (caption == PAPER).all() == (j == 0)
    assert (picture[:top] != PAPER).any()  # the headings


def test_a_picture_of_other_neighbours_than_distances_is_refused():
    samples, shown = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 1, 8, 8)
    for distances in (torch.zeros(2, 2), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="of 2 samples, got"):
            neighbours_picture(samples, shown, distances)
    with pytest.raises(ValueError, match="of 1 samples"):
        neighbours_picture(samples[:1], shown, torch.zeros(2, 3))
