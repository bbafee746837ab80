"""Fidelity: figures that agree with closed forms, with slow formulas and over processes."""

import datetime
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from var_exp.evaluation import FeatureNetwork, Features, Fidelity, class_accuracy


class Pixels(FeatureNetwork):
    """The features of an image are its pixels; so are its logits, times ten."""

    def __init__(self, num_pixels):
        super().__init__("pixels", num_pixels)
        self.num_calls = 0

    def forward(self, images):
        self.num_calls += 1
        return Features(images.flatten(1), 10 * images.flatten(1))


class RandomNetwork(FeatureNetwork):
    def __init__(self, num_features=12, num_classes=5):
        super().__init__("random", num_features)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, num_features, generator=generator))
        self.head = nn.Parameter(torch.randn(num_features, num_classes, generator=generator))

    def forward(self, images):
        features = (images.flatten(1) @ self.weight).tanh()
        return Features(features, features @ self.head)


def random_images(count, seed, low=0):
    """Images of whole 1/255ths, so that 8 bits hold them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, 8, 8), generator=generator) / 255


def scores(fidelity, real, fake, sample_ids=None):
    fidelity.reset()
    fidelity.update_real(real)
    fidelity.update_fake(fake, sample_ids)
    return fidelity.compute()


def test_the_distance_of_a_set_to_itself_is_zero():
    images = random_images(100, seed=0)
    assert abs(scores(Fidelity(RandomNetwork()), images, images)["fid_random"]) < 1e-3


def test_fid_of_two_gaussians_is_the_closed_form():
    def all_combinations(means, deviations):
        corners = torch.tensor(list(itertools.product((-1, 1), repeat=4)))  # (16, 4)
        return ((means + corners * deviations) / 255).reshape(-1, 1, 2, 2)

    means = torch.tensor([[100, 120, 140, 90], [105, 120, 100, 91]])
    deviations = torch.tensor([[10, 20, 30, 40], [10, 5, 60, 41]])
    fidelity = Fidelity(Pixels(4))
    real, fake = (all_combinations(m, d) for m, d in zip(means, deviations, strict=True))
    between_means = (means[0] - means[1]).square().sum() / 255**2
    between_deviations = (deviations[0] - deviations[1]).square().sum() * 16 / 15 / 255**2
    expected = (between_means + between_deviations).item()
    assert scores(fidelity, real, fake)["fid_pixels"] == pytest.approx(expected, rel=1e-6)


def test_fid_equals_torch_fidelitys_of_the_same_features():
    real, fake = random_images(200, seed=0), random_images(150, seed=1, low=60)
    network = RandomNetwork()
    statistics = [
        fid_features_to_statistics(network(images).features.detach().double())
        for images in (real, fake)
    ]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert expected > 0.1
    assert scores(Fidelity(network), real, fake)["fid_random"] == pytest.approx(expected, rel=1e-4)


def test_inception_score_equals_the_slow_formula():
    fake, network = random_images(103, seed=1), RandomNetwork()
    logits = network(fake).logits.detach().double().numpy()
    logits = logits[np.random.RandomState(7).permutation(len(logits))]
    per_split = []
    for i in range(4):
        part = logits[i * 103 // 4 : (i + 1) * 103 // 4]
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        divergences = [sum(row * np.log(row / p.mean(axis=0))) for row in p]
        per_split.append(math.exp(np.mean(divergences)))
    result = scores(Fidelity(network, num_splits=4, seed=7), fake, fake)
    assert result["inception_score_random"] == pytest.approx(np.mean(per_split), rel=1e-6)
    theirs = isc_features_to_metric(network(fake).logits.detach(), splits=4, rng_seed=7)
    assert result["inception_score_random"] == pytest.approx(theirs["inception_score_mean"])
    other = scores(Fidelity(network, num_splits=4, seed=8), fake, fake)
    assert other["inception_score_random"] != result["inception_score_random"]


def test_inception_score_counts_the_classes_that_are_surely_there():
    class Sure(FeatureNetwork):
        def forward(self, images):
            corner = images.flatten(1)[:, :4]
            return Features(corner, 1000 * corner)

    four_classes = torch.eye(4).repeat(25, 1).reshape(100, 1, 2, 2)
    one_class = four_classes[:1].expand(100, -1, -1, -1)
    fidelity = Fidelity(Sure("sure", 4), num_splits=1)
    assert scores(fidelity, four_classes, four_classes)["inception_score_sure"] == pytest.approx(4)
    assert scores(fidelity, four_classes, one_class)["inception_score_sure"] == pytest.approx(1)


def test_scores_depend_on_the_numbered_samples_alone():
    real, fake = random_images(80, seed=0), random_images(90, seed=1)
    fidelity = Fidelity(RandomNetwork())
    torch.manual_seed(0)
    expected = scores(fidelity, real, fake)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fidelity.reset()
    fidelity.update_real(real)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    for ids in order.split(17):
        fidelity.update_fake(fake[ids], ids)
    assert fidelity.compute() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(torch.get_rng_state(), before)
    fidelity.reset(keep_real=True)
    fidelity.update_fake(fake[order])
    shuffled = fidelity.compute()
    assert shuffled["fid_random"] == pytest.approx(expected["fid_random"], rel=1e-9)
    assert shuffled["inception_score_random"] != expected["inception_score_random"]


def test_the_network_sees_rounded_8_bit_images_once():
    class Recorder(Pixels):
        def forward(self, images):
            self.seen = images
            return super().forward(images)

    network = Recorder(4)
    fidelity = Fidelity(network)
    levels = torch.tensor([-0.4, 0.4, 0.6, 255.4])
    fidelity.update_fake((levels / 255).reshape(1, 1, 2, 2))
    assert torch.equal(network.seen.flatten() * 255, torch.tensor([0.0, 0.0, 1.0, 255.0]))
    assert network.num_calls == 1


def test_reset_forgets_and_can_keep_the_real_images():
    real, fake, other = (random_images(50, seed) for seed in range(3))
    fidelity = Fidelity(RandomNetwork())
    scores(fidelity, real, other)
    fidelity.reset(keep_real=True)
    fidelity.update_fake(fake)
    kept = fidelity.compute()
    assert kept == scores(Fidelity(RandomNetwork()), real, fake)
    assert scores(fidelity, other, fake) == scores(Fidelity(RandomNetwork()), other, fake)


def test_states_survive_a_change_of_inference_mode():
    real, fake = random_images(50, seed=0), random_images(50, seed=1)
    fidelity = Fidelity(RandomNetwork())
    with torch.inference_mode():
        fidelity.reset()
        fidelity.update_real(real)
    fidelity.update_real(real)
    with torch.inference_mode():
        fidelity.update_fake(fake + 0)
        first = fidelity.compute()
    assert first == fidelity.compute()


def test_fewer_images_than_features_give_a_number_and_a_warning():
    fidelity = Fidelity(RandomNetwork(num_features=64))
    with pytest.warns(UserWarning, match="6 real and 5 generated images in 64 features"):
        result = scores(fidelity, random_images(6, seed=0), random_images(5, seed=1))
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("num_real, num_fake", [(0, 5), (5, 1)])
def test_too_few_images_are_refused(num_real, num_fake):
    fidelity = Fidelity(Pixels(3 * 8 * 8))
    for image in random_images(num_real, seed=0):
        fidelity.update_real(image[None])
    fidelity.update_fake(random_images(num_fake, seed=1))
    with pytest.raises(ValueError, match=f"got {num_real} and {num_fake}"):
        fidelity.compute()


@pytest.mark.parametrize("images", [torch.rand(2, 1, 2, 2) * 2 - 1, torch.full((2, 1, 2, 2), 255)])
def test_images_of_another_range_are_refused(images):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        Fidelity(Pixels(4)).update_fake(images)


def test_images_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="nan"):
        Fidelity(Pixels(4)).update_real(torch.full((2, 1, 2, 2), torch.nan))


def test_two_processes_give_the_scores_of_one(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(
        target=score_as_rank, args=(1, tmp_path)
    )
    other.start()
    result = score_as_rank(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    expected = scores(Fidelity(RandomNetwork()), *shared_images())
    assert result == pytest.approx(expected, rel=1e-6)
    assert torch.load(tmp_path / "1.pt") == result


def shared_images():
    return random_images(41, seed=0), random_images(37, seed=1)


def score_as_rank(rank, folder):
    """The scores of every second image, together with the other rank's."""
    distributed, timeout = torch.distributed, datetime.timedelta(seconds=120)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    try:
        real, fake = shared_images()
        fidelity = Fidelity(RandomNetwork())
        fidelity.update_real(real[rank::2])
        for ids in torch.arange(len(fake))[rank::2].split(8):
            fidelity.update_fake(fake[ids], ids)
        with torch.inference_mode():
            result = fidelity.compute()
        fidelity.update_real(real)  # states that were synchronised can still be added to
    finally:
        distributed.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")
    return result


def test_class_accuracy_is_the_share_that_the_judge_agrees_with():
    def judge(images):
        assert images.min() == -1 and images.max() == 1
        return images.flatten(1).argmax(dim=1)

    images = torch.eye(4).reshape(4, 1, 2, 2)
    assert class_accuracy(images, torch.tensor([0, 1, 2, 0]), judge) == 0.75
