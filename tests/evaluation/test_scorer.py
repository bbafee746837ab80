"""Scores of samples: counted batch by batch, whoever saw them, and after each scale."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from helpers.feature_networks import JudgingProjection
from helpers.tiny import SCALES
from var_exp.evaluation import ScoreSettings
from var_exp.evaluation.reference import Reference
from var_exp.evaluation.scorer import SampleScorer
from var_exp.sampling.generate import Samples, decode_by_rows


def reference_of(features):
    statistics = fid_features_to_statistics(features.double())
    return Reference(
        **statistics, num_images=len(features), features=features, indices=None, about={}
    )


@pytest.fixture
def network():
    return JudgingProjection((10, 10))


@pytest.fixture
def reference(network):
    return reference_of(network(torch.rand(40, 3, 10, 10)).features)


@pytest.fixture
def samples(tokenizer):
    indices = [torch.randint(16, (30, n)) for n in tokenizer.schedule.num_tokens]
    return Samples(tokenizer.decode(indices).add(1).div(2), indices)


def part(samples, where):
    return Samples(samples.images[where], [codes[where] for codes in samples.indices])


def scorer(network, reference, tokenizer, **others):
    classifier = ("mean", lambda images: (images.mean(dim=(1, 2, 3)) > 0).long())
    return SampleScorer(network, reference, tokenizer.schedule, classifier, **others)


def count(scorer, ids, tokenizer, *samples, **options):
    scorer.update(ids, scorer.extract_features(tokenizer, *samples, **options))


def test_scores_do_not_depend_on_the_batches_or_their_order(network, reference, tokenizer, samples):
    labels = torch.arange(30) % 2
    whole, parts = (scorer(network, reference, tokenizer) for _ in range(2))
    count(whole, torch.arange(30), tokenizer, samples, labels)
    for ids in torch.randperm(30).split(7):
        count(parts, ids, tokenizer, part(samples, ids), labels[ids])
    one, other = whole.compute(), parts.compute()
    assert one == pytest.approx(other, rel=1e-6)
    assert {"fid_projection", "recall_projection", "class_accuracy_mean"} < set(one)


def test_features_can_be_counted_later_and_elsewhere(network, reference, tokenizer, samples):
    first, second = (scorer(network, reference, tokenizer) for _ in range(2))
    features = first.extract_features(tokenizer, samples, torch.zeros(30), per_scale=True)
    assert all(len(tensor) == 30 and tensor.device.type == "cpu" for tensor in features.values())
    first.update(torch.arange(30), features)
    second.update(torch.arange(30), {name: tensor.clone() for name, tensor in features.items()})
    assert first.compute() == second.compute()
    first.reset()
    first.update(torch.arange(30), features)
    assert first.compute() == second.compute()


def test_the_score_after_a_scale_is_that_of_the_images_decoded_from_it(
    network, reference, tokenizer, samples
):
    ours = scorer(network, reference, tokenizer)
    count(ours, torch.arange(30), tokenizer, samples, torch.zeros(30), per_scale=True)
    found = ours.compute()
    for k, name in enumerate(map(str, SCALES)):
        # By as many rows: the network sees 8 bits, and another rounding may be another pixel.
        images = decode_by_rows(tokenizer, samples.indices[: k + 1])[-1].add(1).div(2)
        statistics = fid_features_to_statistics(network(images).features.double())
        theirs = {"mu": reference.mu, "sigma": reference.sigma}
        expected = fid_statistics_to_metric(statistics, theirs, verbose=False)
        expected = expected["frechet_inception_distance"]
        assert found[f"fid_projection_scale_{name}"] == pytest.approx(expected, rel=1e-4)
    assert found["fid_projection"] == pytest.approx(expected, rel=1e-4)


def test_only_the_samples_that_are_scored_per_scale_count_there(
    network, reference, tokenizer, samples
):
    ours, few = (scorer(network, reference, tokenizer) for _ in range(2))
    first, rest = part(samples, slice(10)), part(samples, slice(10, 30))
    count(ours, torch.arange(10), tokenizer, first, torch.zeros(10), per_scale=True)
    count(ours, torch.arange(10, 30), tokenizer, rest, torch.zeros(20))
    count(few, torch.arange(10), tokenizer, first, torch.zeros(10), per_scale=True)
    ours, few = ours.compute(), few.compute()
    assert ours["fid_projection_scale_5"] == few["fid_projection_scale_5"]
    assert ours["fid_projection"] != few["fid_projection"]


def test_copies_of_training_images_show_in_the_ratio_of_neighbours(
    network, reference, tokenizer, samples
):
    held_out = reference_of(network(torch.rand(40, 3, 10, 10)).features)
    for features, low, high in (
        (reference.features[:30], -1e-9, 1e-3),
        (held_out.features[:30], 0.5, 2.0),
    ):
        ours = scorer(network, reference, tokenizer, held_out=held_out)
        ours.update(torch.arange(30), {"features": features, "right": torch.ones(30)})
        assert low <= ours.compute()["neighbour_ratio_projection"] <= high


def test_with_too_few_real_images_precision_and_recall_are_left_out(network, tokenizer, samples):
    few = reference_of(network(torch.rand(3, 3, 10, 10)).features)
    ours = scorer(network, few, tokenizer, settings=ScoreSettings(num_neighbours=3))
    count(ours, torch.arange(30), tokenizer, samples, torch.zeros(30))
    found = ours.compute()
    assert "kid_projection" in found and "precision_projection" not in found
    assert all(np.isfinite(value) for value in found.values())
