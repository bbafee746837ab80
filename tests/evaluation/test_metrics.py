"""Fidelity: figures that agree with closed forms, with slow formulas and with torch-fidelity's."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset

from var_exp.evaluation import (
    FeatureNetwork,
    Features,
    ScoreSettings,
    class_accuracy,
    scores,
    to_uint8,
    too_few,
)
from var_exp.evaluation.reference import Reference

ALL = ("fid", "inception_score", "kid", "precision", "recall")
NUM_FEATURES, NUM_CLASSES = 12, 5


def random_features(count, seed=0, num_features=NUM_FEATURES, shift=0.0):
    """Correlated features, and logits made of them."""
    mix = torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(99))
    head = torch.randn(num_features, NUM_CLASSES, generator=torch.Generator().manual_seed(98))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, num_features, generator=generator) @ mix + shift
    return Features(features, features @ head)


def reference_of(features, num_images=None):
    """Statistics by numpy, with the features they are of."""
    values = features.double().numpy()
    mu, sigma = values.mean(axis=0), np.cov(values, rowvar=False)
    return Reference(mu, np.atleast_2d(sigma), num_images or len(values), features, None, {})


def score(fake, real, *only, **settings):
    """Values without the network's name in their keys."""
    found = scores(fake, reference_of(real.features), "net", ScoreSettings(**settings), only)
    return {key.removesuffix("_net"): value for key, value in found.items()}


# -- torch-fidelity ---------------------------------------------------------------------------


def see(pixels):
    """A cheap network of uint8 pixels (B, 3, 8, 8): 12 features and 5 logits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 8 * 8, NUM_FEATURES, generator=generator)
    head = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=generator)
    features = (pixels.flatten(1).float() / 255 @ weight).tanh()
    return features, features @ head


class Ours(FeatureNetwork):
    def __init__(self):
        super().__init__("ours", NUM_FEATURES)

    def extract(self, pixels):
        return Features(*see(pixels))


class Theirs(torch_fidelity.FeatureExtractorBase):
    def __init__(self, name, features_list, **_others):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, pixels):
        seen = dict(zip(self.get_provided_features_list(), see(pixels), strict=True))
        return tuple(seen[name] for name in self.features_list)


class Images(Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


@pytest.fixture(scope="module")
def extractor():
    torch_fidelity.register_feature_extractor("cheap", Theirs)
    return "cheap"


def random_images(count, seed, low=0):
    """Not whole 1/255ths: rounding is part of what must agree."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 2, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    return low + (1 - low) * images


@pytest.mark.parametrize("num_real", [150, 200])
def test_scores_of_the_same_images_are_torch_fidelitys(extractor, num_real):
    fake, real = random_images(200, seed=0, low=0.2), random_images(num_real, seed=1)
    settings = {"kid_subsets": 5, "kid_subset_size": 60}
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(to_uint8(fake)),
        input2=Images(to_uint8(real)),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_extractor=extractor,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        **settings,
    )
    network = Ours()
    ours = scores(
        network(fake),
        reference_of(network(real).features),
        network.name,
        ScoreSettings(**settings),
    )
    assert ours == {
        "fid_ours": pytest.approx(theirs["frechet_inception_distance"], rel=1e-4),
        "inception_score_ours": pytest.approx(theirs["inception_score_mean"], rel=1e-4),
        "kid_ours": pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4),
        "precision_ours": pytest.approx(theirs["precision"], rel=1e-4),
        "recall_ours": pytest.approx(theirs["recall"], rel=1e-4),
    }
    assert ours["fid_ours"] > 0.1 and ours["kid_ours"] > 1e-3
    assert ours["inception_score_ours"] > 1.05
    assert 0.1 < ours["precision_ours"] < 0.95 and 0.1 < ours["recall_ours"] < 0.95
    assert ours["precision_ours"] != ours["recall_ours"]


def test_the_default_settings_are_torch_fidelitys():
    defaults = torch_fidelity.defaults.DEFAULTS
    names = ("isc_splits", "kid_subsets", "kid_subset_size", "prc_neighborhood", "rng_seed")
    assert tuple(ScoreSettings()) == tuple(defaults[name] for name in names)


# -- FID --------------------------------------------------------------------------------------


def test_the_distance_of_a_set_to_itself_is_zero():
    seen = random_features(100)
    assert abs(score(seen, seen, "fid")["fid"]) < 1e-3


def test_fid_of_two_gaussians_is_the_closed_form():
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))  # (16, 4)
    means = torch.tensor([[0.1, 0.2, 0.3, -0.4], [0.5, 0.2, 0.3, -0.3]])
    deviations = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.5, 6.0, 4.1]])
    fake, real = (Features(m + corners * d, None) for m, d in zip(means, deviations, strict=True))
    between_means = (means[0] - means[1]).square().sum()
    between_deviations = (deviations[0] - deviations[1]).square().sum() * 16 / 15
    expected = (between_means + between_deviations).item()
    assert score(fake, real, "fid")["fid"] == pytest.approx(expected, rel=1e-6)


def test_fid_is_the_slow_formula_with_a_matrix_square_root():
    fake, real = (random_features(*of, shift=s) for of, s in (((300, 0), 0.0), ((250, 1), 0.3)))
    (mu_1, sigma_1), (mu_2, sigma_2) = (
        (x.mean(dim=0), x.T.cov()) for x in (fake.features.double().T.T, real.features.double())
    )
    values, vectors = torch.linalg.eigh(sigma_1)
    root = vectors @ values.sqrt().diag() @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ sigma_2 @ root).sqrt().sum()
    expected = (mu_1 - mu_2).square().sum() + (sigma_1 + sigma_2).trace() - 2 * trace_of_root
    assert score(fake, real, "fid")["fid"] == pytest.approx(expected.item(), rel=1e-6)


def test_fewer_images_than_features_give_numbers_and_are_told():
    for num_fake, num_real in ((6, 5), (2, 90), (5, 5)):
        fake, real = random_features(num_fake, 0, 64), random_features(num_real, 1, 64)
        found = score(fake, real, "fid", "inception_score", "kid")
        assert all(math.isfinite(value) for value in found.values())
        assert found["fid"] > 1
        assert too_few(num_fake, num_real, 64)
    same = random_features(6, 0, 64)
    assert abs(score(same, same, "fid")["fid"]) < 1e-3
    assert too_few(64, 100, 64) and too_few(100, 64, 64) and too_few(64, None, 64)
    assert not too_few(65, 65, 64) and not too_few(65, None, 64)


def test_features_that_never_change_give_a_number():
    fake, real = random_features(40), random_features(50, seed=1)
    fake.features[:, 3] = 1.0
    real.features[:, 3] = 1.0
    assert math.isfinite(score(fake, real, "fid")["fid"])
    constant = Features(torch.ones(40, NUM_FEATURES), None)
    expected = (
        reference_of(real.features).sigma.trace()
        + np.square(1 - real.features.double().mean(dim=0).numpy()).sum()
    )
    assert score(constant, real, "fid")["fid"] == pytest.approx(expected, rel=1e-6)


# -- Inception Score --------------------------------------------------------------------------


def test_inception_score_is_the_slow_formula():
    fake = random_features(103)
    logits = fake.logits.double().numpy()[np.random.RandomState(7).permutation(103)]
    per_split = []
    for i in range(4):
        part = logits[i * 103 // 4 : (i + 1) * 103 // 4]
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        divergences = [sum(row * np.log(row / p.mean(axis=0))) for row in p]
        per_split.append(math.exp(np.mean(divergences)))
    found = score(fake, fake, "inception_score", num_splits=4, seed=7)
    assert found["inception_score"] == pytest.approx(np.mean(per_split), rel=1e-6)
    other = score(fake, fake, "inception_score", num_splits=4, seed=8)
    assert other["inception_score"] != found["inception_score"]


def test_inception_score_counts_the_classes_that_are_surely_there():
    four_classes = torch.eye(4).repeat(25, 1)  # (100, 4)
    one_class = four_classes[:1].expand(100, -1)
    for logits, classes in ((four_classes, 4), (one_class, 1)):
        fake = Features(four_classes, 1000 * logits)
        found = score(fake, fake, "inception_score", num_splits=1)
        assert found["inception_score"] == pytest.approx(classes)


def test_a_network_without_logits_has_no_inception_score():
    fake = random_features(50)._replace(logits=None)
    assert set(score(fake, random_features(50), *ALL)) == set(ALL) - {"inception_score"}


# -- KID, precision, recall -------------------------------------------------------------------


def test_kid_of_all_images_is_the_slow_formula():
    fake, real = random_features(20, shift=0.5).features, random_features(20, seed=1).features
    kernel = [
        [[(x @ y / NUM_FEATURES + 1) ** 3 for y in b] for x in a]
        for a, b in ((fake, fake), (real, real), (fake, real))
    ]
    within = [
        sum(k[i][j] for i in range(20) for j in range(20) if i != j) / (20 * 19) for k in kernel[:2]
    ]
    across = sum(sum(row) for row in kernel[2]) / (20 * 20)
    found = score(Features(fake, None), Features(real, None), "kid", kid_subsets=1)
    assert found["kid"] == pytest.approx((sum(within) - 2 * across).item(), rel=1e-3)


def test_precision_and_recall_are_the_slow_formula(monkeypatch):
    monkeypatch.setattr("var_exp.evaluation.metrics.ROWS_AT_ONCE", 7)
    fake, real = random_features(40).features, random_features(30, seed=1, shift=1.0).features

    def share_within(points, centres):
        radii = [sorted((c - other).norm().item() for other in centres)[3] for c in centres]
        hits = [
            any((p - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return sum(hits) / len(points)

    found = score(Features(fake, None), Features(real, None), "precision", "recall")
    assert found["precision"] == pytest.approx(share_within(fake, real))
    assert found["recall"] == pytest.approx(share_within(real, fake))
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


def test_only_what_is_asked_for_and_can_be_had_is_scored():
    fake = random_features(50)
    reference = reference_of(random_features(60, seed=1).features)
    everything = scores(fake, reference, "net")
    assert set(everything) == {f"{key}_net" for key in ALL}
    assert scores(fake, reference, "net", only=("recall",)) == {
        "recall_net": everything["recall_net"]
    }
    bare = reference._replace(features=None, num_images=None)
    assert scores(fake, bare, "net") == {
        key: everything[key] for key in ("fid_net", "inception_score_net")
    }
    with pytest.raises(ValueError, match="got .'fdi'."):
        scores(fake, reference, "net", only=("fdi",))


def test_scores_neither_draw_nor_print(capfd):
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = score(random_features(50), random_features(60, seed=1), *ALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert score(random_features(50), random_features(60, seed=1), *ALL) == first
    assert capfd.readouterr() == ("", "")


# -- what cannot be scored --------------------------------------------------------------------


@pytest.mark.parametrize("num_fake, num_real", [(0, 5), (1, 5), (5, 1)])
def test_too_few_images_are_refused(num_fake, num_real):
    reference = reference_of(random_features(9).features, num_images=num_real)
    with pytest.raises(ValueError, match=f"at least 2 .* got {num_fake} and {num_real} .*num_sam"):
        scores(random_features(num_fake), reference, "net")


@pytest.mark.parametrize("num_fake, num_real", [(3, 50), (50, 3)])
def test_no_more_images_than_neighbours_are_refused(num_fake, num_real):
    fake, real = random_features(num_fake), random_features(num_real, seed=1)
    for only in ("precision", "recall"):
        with pytest.raises(ValueError, match=r"more than 3 .*num_samples.*num_neighbours\)"):
            score(fake, real, only)
    assert math.isfinite(score(fake, real, "precision", num_neighbours=2)["precision"])
    assert math.isfinite(score(fake, real, "kid")["kid"])


def test_a_reference_of_another_network_is_refused():
    reference = reference_of(random_features(50, num_features=7).features)
    with pytest.raises(ValueError, match=r"12 features, .* 7: .*\(evaluation.reference\)"):
        scores(random_features(50), reference, "net")


def test_features_that_are_no_numbers_are_refused():
    fake = random_features(50)
    fake.features[7, 3] = torch.nan
    with pytest.raises(ValueError, match="nan or infinity"):
        score(fake, random_features(50), "fid")


def test_class_accuracy_is_the_share_that_the_classifier_agrees_with():
    def classify(images):
        assert images.min() == -1 and images.max() == 1
        return images.flatten(1).argmax(dim=1)

    images = torch.eye(4).reshape(4, 1, 2, 2)
    assert class_accuracy(images, torch.tensor([0, 1, 2, 0]), classify) == 0.75
