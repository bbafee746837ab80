"""Stage one with an adversary: two optimizers, one batch; frozen parts; figures of validation."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers.stages import (
    NUM_BATCHES,
    Interrupt,
    Validations,
    assert_equal,
    make_module,
    progress,
    run,
    weights,
)
from helpers.tiny import tiny_tokenizer
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.discriminator import PatchGAN
from var_exp.tokenizer.losses import ReconstructionLoss


def adversary(**changes):
    torch.manual_seed(1)
    options = {"start": 2, "ramp": 2, "weight": 0.5, "lecam": 0.01} | changes
    return AdversarialLoss(PatchGAN(width=8, num_layers=2), **options)


class Watch(Callback):
    """Logged figures and optimizer steps at each batch."""

    def __init__(self):
        self.figures, self.steps = {}, {}

    def on_train_batch_end(self, trainer, module, *_):
        self.figures[progress(trainer)] = {
            name: float(value)
            for name, value in (trainer.callback_metrics | module.figures).items()
        }
        self.steps[progress(trainer)] = trainer.global_step


def test_the_adversary_sets_in_at_its_start_and_batches_count_not_optimizer_steps(digits, tmp_path):
    watch, validations = Watch(), Validations()
    module, losses = run("tokenizer", digits, tmp_path, watch, validations, adversary=adversary())
    assert sorted(losses) == list(range(1, NUM_BATCHES + 1))
    assert [batch for batch, _ in validations.seen] == [3, 6, NUM_BATCHES]
    adversarial = [b for b, seen in watch.figures.items() if "train/discriminator_loss" in seen]
    assert adversarial == list(range(4, NUM_BATCHES + 1))  # batch 2 is at the foot of the ramp
    assert watch.steps[NUM_BATCHES] == NUM_BATCHES + len(adversarial)
    assert watch.figures[4]["train/adversarial_weight"] == 0  # the first one only measures
    assert watch.figures[5]["train/adversarial_weight"] > 0
    kept = {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == kept


def test_both_networks_learn_and_neither_learns_from_the_others_loss(digits, tmp_path):
    fresh, module = adversary(), adversary()
    run("tokenizer", digits, tmp_path / "a", adversary=module)
    moved = [
        not torch.equal(ours, theirs)
        for ours, theirs in zip(module.parameters(), fresh.parameters(), strict=True)
    ]
    assert all(moved)
    # A discriminator whose word has no weight leaves the tokenizer as it is without one.
    mute = run("tokenizer", digits, tmp_path / "mute", adversary=adversary(weight=0.0))[0]
    alone = run("tokenizer", digits, tmp_path / "alone")[0]
    assert_equal(mute.tokenizer.state_dict(), alone.tokenizer.state_dict())
    heard = run("tokenizer", digits, tmp_path / "heard", adversary=adversary())[0]
    assert not torch.equal(
        heard.tokenizer.decoder.conv_out.weight, alone.tokenizer.decoder.conv_out.weight
    )


@pytest.mark.parametrize("kills", [(5, 7), (3, 6), (2, 4)], ids=str)
def test_interrupted_twice_and_continued_equals_uninterrupted(kills, digits, tmp_path):
    _, whole = run("tokenizer", digits, tmp_path / "whole", adversary=adversary())
    for callbacks in ([Interrupt(kills[0])], [Interrupt(kills[1])], []):
        _, part = run("tokenizer", digits, tmp_path / "parts", *callbacks, adversary=adversary())
        assert part == {batch: whole[batch] for batch in part}
    assert_equal(weights(tmp_path / "parts", "tokenizer"), weights(tmp_path / "whole", "tokenizer"))


def test_micro_batches_are_the_same_step_of_both_networks(digits, tmp_path):
    options = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "freeze": ["codebook"],  # one that learns would learn at every micro-batch
        "quantizer_dropout": 0.0,
    }
    whole, losses = run("tokenizer", digits, tmp_path / "a", adversary=adversary(), **options)
    options["micro_batch_size"] = 4
    parts, part_losses = run("tokenizer", digits, tmp_path / "b", adversary=adversary(), **options)
    assert list(losses.values()) == pytest.approx(list(part_losses.values()), rel=1e-5)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    ours, theirs = whole.adversary, parts.adversary
    assert ours.adaptive_weight.item() == pytest.approx(theirs.adaptive_weight.item(), rel=1e-5)
    assert ours.adaptive_weight.item() > 0


def test_under_bf16_micro_batches_clipping_and_both_optimizers_work(digits, tmp_path):
    options = {"optimizer": functools.partial(torch.optim.SGD, lr=0.02), "quantizer_dropout": 0.0}
    options |= {"micro_batch_size": 4, "clip": 0.1}  # every gradient is clipped
    _, losses = run("tokenizer", digits, tmp_path / "a", adversary=adversary(), **options)
    watch = Watch()
    module, cast = run(
        "tokenizer",
        digits,
        tmp_path / "b",
        watch,
        adversary=adversary(),
        trainer={"precision": "bf16-mixed"},
        **options,
    )
    assert list(cast.values()) == pytest.approx(list(losses.values()), rel=0.05)
    assert watch.figures[NUM_BATCHES]["train/discriminator_grad_norm"] > 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())


FROZEN = {
    "encoder": ("encoder.", "quant_conv."),
    "codebook": ("quantizer.",),
    "decoder": ("decoder.", "post_quant_conv."),
}


@pytest.mark.parametrize("part", FROZEN)
def test_a_frozen_part_stays_as_it_is_and_the_others_learn(part, digits, tmp_path):
    before = make_module("tokenizer").tokenizer.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    module, _ = run("tokenizer", digits, tmp_path, freeze=[part], weights="raw", ema_decay=0)
    for name, tensor in module.tokenizer.state_dict().items():
        frozen = name.startswith(FROZEN[part])
        if frozen or name.endswith("weight") and "phis" not in name:
            assert torch.equal(tensor, before[name]) == frozen, name


def test_codes_do_not_change_while_a_decoder_is_trained_alone(digits, tmp_path):
    images = torch.stack([digits.val_transform(digits.val[i][0]) for i in range(8)])
    before = make_module("tokenizer").tokenizer.eval().encode(images)
    module, _ = run("tokenizer", digits, tmp_path, freeze=["encoder", "codebook"])
    assert all(map(torch.equal, before, module.tokenizer.encode(images)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"freeze": ["phi"]}, "freeze takes some of encoder, codebook, decoder"),
        ({"freeze": ["encoder", "codebook", "decoder"]}, "but not all"),
        ({"freeze": ["decoder"], "adversary": adversary()}, "nothing to learn from an adversary"),
    ],
    ids=["unknown", "all", "decoder"],
)
def test_freezing_what_makes_no_sense_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        make_module("tokenizer", **changes)


def test_images_that_a_network_is_too_deep_for_are_refused_before_training():
    deep = AdversarialLoss(PatchGAN(width=8, num_layers=3))
    with pytest.raises(ValueError, match="PatchGAN takes images of at least 24 .*num_layers"):
        make_module("tokenizer", adversary=deep)
    perceptual = torch.nn.Identity()
    perceptual.smallest_side = 32
    with pytest.raises(ValueError, match="Identity takes images of at least 32 .*loss.lpips=0"):
        make_module("tokenizer", loss=ReconstructionLoss(lpips=1.0, perceptual=perceptual))


def test_the_perceptual_network_is_reported_and_stays_out_of_the_checkpoint(digits, tmp_path):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).square().mean(dim=(1, 2, 3))

    watch = Watch()
    loss = ReconstructionLoss(lpips=0.5, perceptual=Distance())
    module, _ = run("tokenizer", digits, tmp_path, watch, loss=loss)
    figures = watch.figures[NUM_BATCHES]
    assert figures["train/lpips"] == pytest.approx(figures["train/l2"], rel=1e-4)
    assert figures["val/lpips"] == pytest.approx(figures["val/l2"], rel=1e-4)


def test_validation_reports_how_close_reconstructions_are(digits, tmp_path):
    watch = Watch()
    run("tokenizer", digits, tmp_path, watch)
    figures = watch.figures[NUM_BATCHES]
    assert -1 <= figures["val/ssim"] <= 1 and figures["val/psnr"] > 0
    assert "val/lpips" not in figures
    assert {name for name in figures if name.startswith("val/usage")} == {
        f"val/usage_scale_{p}" for p in (1, 2, 8)
    }


def test_perfect_reconstructions_have_the_best_figures(digits):

    module = make_module("tokenizer")
    images = torch.stack([digits.val_transform(digits.val[i][0]) for i in range(4)])
    tokenizer = tiny_tokenizer(channels=1)
    tokenizer.encode = lambda images: [torch.zeros(len(images), 1, dtype=torch.int64)]
    tokenizer.decode = lambda indices: images
    module.tokenizer = module.averaged_tokenizer = tokenizer
    reported = {}
    module.log_dict = lambda values, **_: reported.update(values)
    module.code_counts = torch.zeros(1, 16, dtype=torch.int64)
    module.validation_step(type("B", (), {"images": images})(), 0)
    assert reported["val/ssim"].item() == pytest.approx(1.0)
    assert reported["val/l1"] == reported["val/l2"] == 0
