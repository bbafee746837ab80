"""Our networks compute what the authors' published ones do, number for number."""

import pytest
import torch
import torch.nn.functional as F

from helpers.golden_weights import golden_arrays, golden_networks
from var_exp.sampling.generate import generate, guided_logits


@pytest.fixture(scope="module")
def golden():
    return golden_arrays()


@pytest.fixture(scope="module")
def networks():
    return golden_networks()


@pytest.fixture(scope="module")
def golden_indices(networks, golden):
    return networks[0].schedule.split(golden["indices"].long())


def assert_golden(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_features(networks, golden):
    assert_golden(networks[0].features(golden["image"]), golden["feature"])


def test_indices(networks, golden):
    indices = torch.cat(networks[0].encode(golden["image"]), dim=1)
    assert torch.equal(indices, golden["indices"].long())


def test_reconstructions_after_each_scale(networks, golden, golden_indices):
    images = torch.stack(networks[0].decode(golden_indices, per_scale=True), dim=1)
    assert_golden(images, golden["reconstruction_per_scale"])
    assert_golden(networks[0].decode(golden_indices), golden["reconstruction"])


@torch.no_grad()
def test_teacher_forcing_input(networks, golden, golden_indices):
    inputs = networks[0].quantizer.teacher_forcing_input(golden_indices)
    assert_golden(inputs, golden["teacher_forcing_input"])


@torch.no_grad()
def test_logits_and_cross_entropy(networks, golden):
    logits = networks[1](golden["teacher_forcing_input"], golden["label"])
    assert_golden(logits, golden["logits"])
    targets = golden["indices"].long()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert_golden(losses, golden["cross_entropy_per_token"])


@torch.no_grad()
def test_guided_logits_of_greedy_sampling(networks, golden):
    tokenizer, transformer = networks
    logits, indices = [], []
    for _, guided in guided_logits(transformer, tokenizer, golden["label"], 3.0, indices):
        logits.append(guided)
        indices.append(guided.argmax(dim=-1))
    assert_golden(torch.cat(logits, 1), golden["greedy_cfg3_guided_logits"])
    assert torch.equal(torch.cat(indices, 1), golden["greedy_cfg3_indices"].long())


def test_greedy_samples(networks, golden):
    tokenizer, transformer = networks
    settings = {"cfg_scale": 3.0, "top_k": 1, "return_indices": True}
    samples = generate(transformer, tokenizer, golden["label"], **settings)
    assert torch.equal(torch.cat(samples.indices, 1), golden["greedy_cfg3_indices"].long())
    assert_golden(samples.images, golden["greedy_cfg3_image"])
