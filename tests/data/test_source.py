"""What every source has in common: sizes, the range of pixels, random streams, the split."""

import numpy as np
import pytest
import torch
from PIL import Image

from var_exp.data import ImageSource
from var_exp.data.source import as_size, rng_for, stratified_split, to_unit_range


def test_black_becomes_minus_one_and_white_one_from_tensors_and_from_pil():
    pixels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert to_unit_range(pixels).tolist() == [[[-1.0, 1.0]]]
    assert to_unit_range(Image.fromarray(pixels[0].numpy())).tolist() == [[[-1.0, 1.0]]]
    assert pixels.tolist() == [[[0, 255]]], "the stored image must stay as it is"


@pytest.mark.parametrize(("given", "size"), [(16, (16, 16)), ([32, 64], (32, 64))])
def test_a_size_is_a_side_or_a_height_and_a_width(given, size):
    assert as_size(given) == size


@pytest.mark.parametrize("given", [0, [8], [8, 8, 8], [8, -1], [8, 2.5]])
def test_a_size_that_is_none_names_itself_and_its_key(given):
    with pytest.raises(ValueError, match=r"image_size is .*data\.image_size"):
        as_size(given)


def test_a_source_of_two_channels_is_refused():
    with pytest.raises(ValueError, match="channels is 2, expected 1 or 3"):
        ImageSource("any", 8, channels=2)


def test_each_path_of_numbers_has_a_random_stream_of_its_own():
    paths = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (0, 0, 0)]
    draws = {rng_for(seed, *path).random() for seed in (0, 1) for path in paths}
    assert len(draws) == 2 * len(paths)
    assert rng_for(3, 1, 4).random() == rng_for(3, 1, 4).random()


def test_a_split_has_the_size_asked_for_and_the_classes_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 33, 17])
    train, val = stratified_split(labels, 10, seed=0)
    assert sorted(train + val) == list(range(100))
    assert np.bincount(labels[val]).tolist() == [5, 3, 2]


def test_every_class_of_two_images_or_more_is_validated_and_all_are_trained_on():
    labels = np.repeat([0, 1, 2], [40, 2, 1])
    train, val = stratified_split(labels, 4, seed=0)
    assert set(labels[train]) == {0, 1, 2}
    assert set(labels[val]) == {0, 1}


def test_another_seed_is_another_split_and_the_same_seed_the_same():
    labels = [0] * 50
    assert stratified_split(labels, 10, seed=0) == stratified_split(labels, 10, seed=0)
    assert stratified_split(labels, 10, seed=0) != stratified_split(labels, 10, seed=1)
