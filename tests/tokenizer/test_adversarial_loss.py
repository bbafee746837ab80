"""The game's mathematics, and that it does not matter how a batch is split."""

import copy
import datetime

import pytest
import torch
from torch import nn

from var_exp.tokenizer.adversarial_loss import (
    AdversarialLoss,
    hinge_discriminator,
    hinge_generator,
    lecam_distance,
    non_saturating_discriminator,
    non_saturating_generator,
)

KEY = "adversary"


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.LeakyReLU(0.2), nn.Flatten())


def images(seed: int, num: int = 8) -> torch.Tensor:
    return torch.rand(num, 1, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- when it plays ------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "ramp"), [(0.2, 0.1), (20, 10), (0.2, 10), (20, 0.1)])
def test_the_factor_rises_along_a_line_after_the_start(start, ramp):
    adversary = AdversarialLoss(discriminator(), start=start, ramp=ramp)
    factors = [adversary.factor(batch, 100) for batch in (0, 19, 20, 21, 25, 30, 99)]
    assert factors == pytest.approx([0, 0, 0, 0.1, 0.5, 1, 1])


@pytest.mark.parametrize(("start", "ramp"), [(0.28, 0.0), (28, 0)])
def test_without_a_ramp_it_sets_in_at_once(start, ramp):
    adversary = AdversarialLoss(discriminator(), start=start, ramp=ramp)
    assert [adversary.factor(batch, 100) for batch in (0, 27, 28, 99)] == [0, 0, 1, 1]


def test_a_whole_share_is_never_and_one_batch_is_one_batch():
    never = AdversarialLoss(discriminator(), start=1.0, ramp=0)
    assert not any(never.factor(batch, 50) for batch in range(50))
    soon = AdversarialLoss(discriminator(), start=1, ramp=0)
    assert [soon.factor(batch, 50) for batch in range(3)] == [0, 1, 1]


@pytest.mark.parametrize("name", ["start", "ramp"])
@pytest.mark.parametrize("value", [True, -0.1, 1.5, -1, 240.0, float("nan"), "0.2", None])
def test_neither_a_share_nor_a_number_of_batches_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"a number of batches, got .* \({KEY}.{name}\)"):
        AdversarialLoss(discriminator(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("weight", -1), ("max_weight", float("nan")), ("lecam", "a"), ("loss", "w")]
)
def test_other_arguments_out_of_range_are_refused(name, value):
    owner = "(AdversarialLoss|adversary)"
    with pytest.raises(ValueError, match=rf"{owner}: {name}(:| must be) .*, got "):
        AdversarialLoss(discriminator(), **{name: value})


# -- losses -------------------------------------------------------------------------------


def test_the_hinge_losses_are_those_computed_by_hand():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.5, -0.5]])
    # Images: 0, 0.5, 2, 0 of four; reconstructions: 0, 1, 1.5, 0.5 of four.
    assert hinge_discriminator(real, fake).item() == (2.5 / 4 + 3.0 / 4) / 2
    assert hinge_generator(fake).item() == 3.0 / 4


def test_the_non_saturating_losses_are_log_likelihoods():
    real, fake = torch.randn(2, 3), torch.randn(2, 3)
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2
    torch.testing.assert_close(non_saturating_discriminator(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator(fake), -fake.sigmoid().log().mean())


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_each_side_pulls_its_own_way(loss):
    adversary = AdversarialLoss(nn.Flatten(), loss=loss)
    real, fake = images(1).requires_grad_(), images(2).requires_grad_()
    adversary.discriminator_loss(real, fake)["loss"].backward()
    assert fake.grad is None and (real.grad <= 0).all() and real.grad.min() < 0
    adversary.generator_loss(fake).backward()
    assert (fake.grad < 0).all()


def test_terms_of_the_discriminator_have_names():
    adversary = AdversarialLoss(discriminator(), lecam=0.1)
    adversary.logit_averages.copy_(torch.tensor([0.3, -0.2]))
    real, fake = images(1, 6), images(2, 3)
    terms = adversary.discriminator_loss(real, fake)
    a, b = adversary.discriminator(real), adversary.discriminator(fake)
    assert set(terms) == {"loss", "real", "fake", "lecam"}
    torch.testing.assert_close(terms["real"], a.mean().detach())
    torch.testing.assert_close(terms["fake"], b.mean().detach())
    torch.testing.assert_close(terms["lecam"], lecam_distance(a, b, torch.tensor([0.3, -0.2])))
    torch.testing.assert_close(terms["loss"], hinge_discriminator(a, b) + 0.1 * terms["lecam"])


def test_logits_and_losses_are_float32_under_autocast():
    adversary = AdversarialLoss(discriminator(), lecam=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        fake = images(2).bfloat16().requires_grad_()
        terms = adversary.discriminator_loss(images(1), fake)
        terms["generator"] = adversary.generator_loss(fake)
        adversary.measure(fake.float().square().mean(), terms["generator"], fake)
    adversary.finish_batch()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert adversary.adaptive_weight.dtype == torch.float32 and adversary.adaptive_weight > 0


# -- LeCam --------------------------------------------------------------------------------


def test_the_lecam_distance_draws_logits_to_the_average_of_the_other_side():
    averages = torch.tensor([0.5, -0.5])  # of images, of reconstructions
    real, fake = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([0.0, 2.0])
    distance = lecam_distance(real, fake.requires_grad_(), averages)
    assert distance.item() == (2.5**2 + 0.5**2) / 2 + (0.5**2 + 1.5**2) / 2
    distance.backward()
    assert real.grad.tolist() == [2.5, -0.5] and fake.grad.tolist() == [-0.5, 1.5]


def test_averages_of_logits_move_once_a_batch_where_lecam_is_on():
    off, on = AdversarialLoss(nn.Flatten()), AdversarialLoss(nn.Flatten(), lecam=0.1)
    for adversary in (off, on):
        for part in range(2):
            terms = adversary.discriminator_loss(images(part), images(part + 2))
            assert not adversary.logit_averages.any()
        adversary.finish_batch()
        assert ("lecam" in terms) == (adversary is on)
    means = [torch.cat([images(i), images(i + 1)]).mean() for i in (0, 2)]
    assert not off.logit_averages.any()
    torch.testing.assert_close(on.logit_averages, 0.01 * torch.stack(means))
    on.finish_batch()  # nothing new was collected
    torch.testing.assert_close(on.logit_averages, 0.01 * torch.stack(means))


# -- the adaptive weight ------------------------------------------------------------------


class Game:
    """A tiny decoder, its two losses, and an adversary.

    Gradients are about as small as the constant of the ratio, so that it matters whether they are
    means or sums over processes.
    """

    def __init__(self, **others):
        torch.manual_seed(1)
        self.decoder = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
        self.adversary = AdversarialLoss(discriminator(), **others)

    @property
    def last_layer(self):
        return self.decoder[-1].weight

    def losses(self, x):
        reconstructed = self.decoder(x)
        rec, gan = (reconstructed - x).square().mean(), self.adversary.generator_loss(reconstructed)
        return 1e-5 * rec, 1e-5 * gan

    def play(self, parts) -> None:
        """One batch, in the given micro-batches."""
        total = sum(map(len, parts))
        for x in parts:
            share = len(x) / total
            rec, gan = self.losses(x)
            self.adversary.measure(rec * share, gan * share, self.last_layer)
            (rec + gan).backward()  # the graphs are still there
            self.adversary.discriminator_loss(x, self.decoder(x))
        self.adversary.finish_batch()


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_of_the_last_layer():
    game, x = Game(), images(1)
    rec, gan = (torch.autograd.grad(game.losses(x)[i], game.last_layer)[0].norm() for i in range(2))
    game.play([x])
    torch.testing.assert_close(game.adversary.adaptive_weight, rec / (gan + 1e-6))


def test_it_takes_effect_on_the_next_batch():
    game = Game(weight=0.5)
    assert game.adversary.generator_weight(1.0) == 0
    rec, gan = game.losses(images(1))
    game.adversary.measure(rec, gan, game.last_layer)
    assert game.adversary.generator_weight(1.0) == 0
    game.adversary.finish_batch()
    ratio = game.adversary.adaptive_weight
    assert ratio > 0
    torch.testing.assert_close(game.adversary.generator_weight(0.3), 0.5 * 0.3 * ratio)


def test_without_adaption_the_weight_is_the_given_one():
    adversary = AdversarialLoss(discriminator(), weight=0.4, adaptive=False)
    assert adversary.generator_weight(0.5).item() == pytest.approx(0.2)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [5, 3]])
def test_micro_batches_remember_what_the_whole_batch_does(sizes):
    whole, split = Game(lecam=0.1), Game(lecam=0.1)
    for seed in range(3):
        whole.play([images(seed)])
        split.play(images(seed).split(sizes))
    assert_same_memory(split.adversary, whole.adversary)


def assert_same_memory(a: AdversarialLoss, b: AdversarialLoss) -> None:
    assert a.adaptive_weight > 0 and a.logit_averages.abs().min() > 0
    torch.testing.assert_close(a.adaptive_weight, b.adaptive_weight, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.logit_averages, b.logit_averages, rtol=1e-5, atol=1e-8)


def test_the_adaptive_weight_is_clamped():
    game = Game(max_weight=0.01)
    game.play([images(1)])
    assert game.adversary.adaptive_weight.item() == pytest.approx(0.01)
    rec, gan = game.losses(images(1))
    game.adversary.measure(rec, 0 * gan, game.last_layer)
    game.adversary.finish_batch()
    assert game.adversary.adaptive_weight.item() == pytest.approx(0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_not_remembered(value, where):
    game = Game(lecam=0.1)
    game.play([images(1)])
    before = copy.deepcopy(dict(game.adversary.named_buffers()))
    factors = [1.0, 1.0]
    factors[where] = value
    losses = [(factor * game.last_layer).sum() for factor in factors]  # gradients of the factor
    game.adversary.measure(*losses, game.last_layer)
    game.adversary.discriminator_loss(images(2) * factors[0], images(3) * factors[1])
    game.adversary.finish_batch()
    torch.testing.assert_close(dict(game.adversary.named_buffers()), before)
    game.play([images(4)])
    assert game.adversary.adaptive_weight != before["adaptive_weight"]


def test_the_memory_is_in_the_state_dict():
    game, other = Game(lecam=0.1), Game(lecam=0.1)
    game.play([images(1)])
    names = {n for n in game.adversary.state_dict() if not n.startswith("discriminator.")}
    assert names == {"adaptive_weight", "logit_averages"}
    other.adversary.load_state_dict(game.adversary.state_dict())
    assert_same_memory(other.adversary, game.adversary)


def test_two_processes_remember_what_one_does_with_the_whole_batch(tmp_path):
    other = torch.multiprocessing.get_context("fork").Process(
        target=play_as_rank, args=(1, tmp_path)
    )
    other.start()
    mine = play_as_rank(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    theirs, whole = Game(lecam=0.1), Game(lecam=0.1)
    theirs.adversary.load_state_dict(torch.load(tmp_path / "1.pt"))
    for seed in range(2):
        whole.play([images(seed)])
    assert_same_memory(mine.adversary, whole.adversary)
    assert_same_memory(theirs.adversary, whole.adversary)


def play_as_rank(rank, folder) -> Game:
    """Two batches, of which this process has every second image, in two micro-batches."""
    distributed, timeout = torch.distributed, datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    try:
        game = Game(lecam=0.1)
        for seed in range(2):
            game.play(images(seed)[rank::2].split(2))
    finally:
        distributed.destroy_process_group()
    torch.save(game.adversary.state_dict(), folder / f"{rank}.pt")
    return game
