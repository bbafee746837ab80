"""The embedded digits: real, split for good, and shown as they are."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from var_exp.data import Digits
from var_exp.data.source import rng_for


@pytest.fixture(scope="module")
def digits() -> Digits:
    source = Digits()
    source.setup()
    return source


def test_there_are_1437_digits_to_train_on_and_360_others_to_validate(digits):
    assert (len(digits.train), len(digits.val)) == (1437, 360)
    whole = torch.cat([digits.train.images, digits.val.images])
    same = torch.from_numpy(load_digits().images).sum((1, 2)).mean() / (64 * 16)
    assert abs(whole.float().mean() / 255 - same) < 0.01, "enlarging must not change brightness"


def test_every_class_is_split_in_the_same_proportion(digits):
    train, val = (np.bincount(part.labels) for part in (digits.train, digits.val))
    assert len(train) == len(val) == digits.num_classes == 10
    assert np.abs(val / (train + val) - 360 / 1797).max() < 0.01


def test_an_image_is_one_channel_of_the_size_asked_for_and_uses_the_whole_range(digits):
    image, label = digits.val[0]
    assert image.shape == (1, 16, 16) and image.dtype == torch.uint8
    assert digits.class_names[label] == str(label)
    pixels = torch.stack([digits.val_transform(digits.val[i][0]) for i in range(20)])
    assert pixels.min() == -1 and pixels.max() > 0.9
    wide = Digits(image_size=[8, 24])
    wide.setup()
    assert wide.train[0][0].shape == (1, 8, 24)


def test_digits_are_not_augmented(digits):
    image, _ = digits.train[3]
    assert torch.equal(digits.train_transform(image, rng_for(1)), digits.val_transform(image))


def test_the_split_is_the_same_every_time(digits):
    again = Digits()
    again.setup()
    assert torch.equal(again.val.images, digits.val.images)
    assert again.val.labels == digits.val.labels
    first = again.train
    again.setup()
    assert again.train is first, "setting up twice must not build twice"
