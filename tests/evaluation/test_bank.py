"""The bank of features: numbered images from all processes, in the order of their numbers."""

import datetime

import pytest
import torch

from var_exp.evaluation import Features
from var_exp.evaluation.networks.base import FeatureBank

NUM_IMAGES = 41


def numbered(with_logits=True):
    """Features (41, 7) and logits (41, 3)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_IMAGES, 7, generator=generator)
    return Features(features, features[:, :3] * 2 if with_logits else None)


def put(bank, seen, ids, size=8):
    """Add the images numbered `ids`, a batch at a time."""
    for start in range(0, len(ids), size):
        some = torch.tensor(ids[start : start + size])
        logits = None if seen.logits is None else seen.logits[some]
        bank.update(Features(seen.features[some], logits), some)


def equal(a, b):
    if (a.logits is None) != (b.logits is None):
        return False
    same_logits = a.logits is None or torch.equal(a.logits, b.logits)
    return torch.equal(a.features, b.features) and same_logits


@pytest.mark.parametrize("with_logits", [True, False])
def test_images_come_back_in_the_order_of_their_numbers(with_logits):
    seen, bank = numbered(with_logits), FeatureBank()
    put(bank, seen, torch.randperm(NUM_IMAGES).tolist())
    assert equal(bank.compute(), seen)
    assert equal(bank.compute(), seen)


def test_an_empty_bank_has_no_images_and_warns_of_nothing(recwarn):
    bank = FeatureBank()
    assert bank.compute().features.shape == (0, 0) and bank.compute().logits is None
    put(bank, numbered(), range(NUM_IMAGES))
    bank.reset()
    assert len(bank.compute().features) == 0
    put(bank, numbered(), range(5))
    assert equal(bank.compute(), Features(*(x[:5] for x in numbered())))
    assert not recwarn.list


def test_it_may_be_filled_in_inference_mode_and_out_of_it():
    seen, bank = numbered(), FeatureBank()
    with torch.inference_mode():
        made = Features(*(x * 1 for x in seen))
        put(bank, made, range(0, 20))
        bank.compute()
    put(bank, seen, range(20, 30))
    with torch.inference_mode():
        put(bank, made, range(30, NUM_IMAGES))
        inside = bank.compute()
    assert equal(bank.compute(), seen) and equal(inside, seen)
    assert not bank.compute().features.is_inference()


def test_what_was_added_is_not_changed_later():
    seen, bank = numbered(), FeatureBank()
    given = Features(*(x.clone() for x in seen))
    ids = torch.arange(NUM_IMAGES)
    bank.update(given, ids)
    for tensor in (*given, ids):
        tensor.zero_()
    assert equal(bank.compute(), seen)


def test_an_image_that_was_given_twice_is_noticed():
    bank = FeatureBank()
    put(bank, numbered(), [0, 1, 2, 1])
    with pytest.raises(AssertionError, match="twice"):
        bank.compute()


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("first_share", [range(0, NUM_IMAGES, 2), range(30), [], range(NUM_IMAGES)])
def test_two_processes_give_the_features_of_one(tmp_path, first_share, with_logits):
    first = list(first_share)
    shares = [first, [i for i in range(NUM_IMAGES) if i not in first]]
    arguments = (shares, with_logits, tmp_path)
    other = torch.multiprocessing.get_context("fork").Process(target=fill, args=(1, *arguments))
    other.start()
    fill(0, *arguments)
    other.join()
    assert other.exitcode == 0
    expected = numbered(with_logits)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(equal(Features(*each), expected) for each in found)


def fill(rank, shares, with_logits, folder):
    """Keep what one of two processes computes, and computes again after more came."""
    distributed, timeout = torch.distributed, datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    try:
        bank, seen, found = FeatureBank(), numbered(with_logits), []
        for inference in (True, False):
            bank.reset()
            put(bank, seen, shares[rank])
            with torch.inference_mode(inference):
                found.append(tuple(bank.compute()))
        bank.reset()
        put(bank, seen, shares[rank][:3])
        bank.compute()  # states that were synchronised can still be added to
        put(bank, seen, shares[rank][3:])
        found.append(tuple(bank.compute()))
    finally:
        distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")
