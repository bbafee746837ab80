"""Batch b is a pure function of the seed: whatever the ranks, wherever the run starts."""

from collections import Counter

import pytest

from var_exp.data import GlobalBatchSampler


def sampler(**changes) -> GlobalBatchSampler:
    return GlobalBatchSampler(**{"num_samples": 10, "batch_size": 4, "num_batches": 12} | changes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_see_the_batches_of_one_process(world_size):
    alone = list(sampler(seed=5))
    ranks = [list(sampler(seed=5, rank=r, world_size=world_size)) for r in range(world_size)]
    for batch, shares in zip(alone, zip(*ranks, strict=True), strict=True):
        assert [len(share) for share in shares] == [4 // world_size] * world_size
        assert [item for items in zip(*shares, strict=True) for item in items] == batch


@pytest.mark.parametrize("batch_size", [4, 25])
def test_each_epoch_shows_each_image_once_and_no_batch_is_short(batch_size):
    batches = list(sampler(batch_size=batch_size, num_batches=10))
    assert all(len(batch) == batch_size for batch in batches)
    seen = Counter(item for batch in batches for item in batch)
    num_epochs = 10 * batch_size // 10
    assert seen == Counter((epoch, index) for epoch in range(num_epochs) for index in range(10))


def test_epochs_are_ordered_differently_and_so_are_seeds():
    items = [item for batch in sampler(num_batches=5) for item in batch]
    first, second = [[i for epoch, i in items if epoch == e] for e in (0, 1)]
    assert sorted(first) == sorted(second) and first != second
    assert list(sampler(seed=0)) != list(sampler(seed=1))


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_a_resumed_run_sees_the_tail_of_the_uninterrupted_one(start):
    assert list(sampler(start_batch=start)) == list(sampler())[start:]


def test_the_length_is_that_of_the_whole_run_wherever_it_starts():
    assert len(sampler()) == len(sampler(start_batch=5)) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 6, "world_size": 4}, "batch of 6 images does not divide by 4 processes"),
        ({"batch_size": 0}, "batch of 0 images"),
        ({"num_samples": 0}, "0 images, expected at least 1"),
        ({"start_batch": 13}, "start at batch 13 of 12"),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(changes, words):
    with pytest.raises(ValueError, match=words):
        sampler(**changes)
