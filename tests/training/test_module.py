"""What both stages share: micro-batches change nothing, broken batches are skipped and named,
schedules reach the optimizer, the average is chosen or not."""

import functools
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers.stages import NUM_BATCHES, Interrupt, assert_equal, make_module, progress, run, weights
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.data import ImageDataModule, ImageSource

STAGES = pytest.mark.parametrize("stage", ["tokenizer", "var"])
PLAIN = {
    # Nothing random, and no codebook that learns from each forward pass.
    "tokenizer": {"freeze": ["codebook"], "quantizer_dropout": 0.0},
    "var": {"dropout": 0.0},
}


@STAGES
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_batch_in_micro_batches_is_the_same_step(stage, micro_batch_size, digits, tmp_path):
    # Plain descent: Adam would turn rounding errors of vanishing gradients into whole steps.
    options = PLAIN[stage] | {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    whole, losses = run(stage, digits, tmp_path / "whole", **options)
    parts, part_losses = run(
        stage, digits, tmp_path / "parts", micro_batch_size=micro_batch_size, **options
    )
    assert list(losses.values()) == pytest.approx(list(part_losses.values()), rel=1e-5)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


class Break(Callback):
    """Outputs of the network that are not finite, in some batches."""

    OUTPUT = {"tokenizer": "tokenizer.decoder", "var": "transformer"}

    def __init__(self, *batches):
        self.batches, self.now = batches, False

    def on_fit_start(self, trainer, module):
        part = module.get_submodule(self.OUTPUT[module.stage])
        part.register_forward_hook(lambda _, __, out: out * torch.nan if self.now else None)

    def on_train_batch_start(self, trainer, module, batch, i):
        self.now = progress(trainer) in self.batches

    def on_validation_start(self, trainer, module):
        self.now = False


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def finite(module):
    return all(tensor.isfinite().all() for tensor in module.state_dict().values())


@STAGES
def test_a_batch_without_a_finite_gradient_is_skipped_and_its_images_are_named(
    stage, digits, tmp_path, capsys
):
    module, losses = run(stage, digits, tmp_path, Break(1, 2, 5), max_skipped=3)
    lines = skipped(tmp_path / stage)
    assert [line["batch"] for line in lines] == [1, 2, 5]
    assert [batch - 1 for batch, loss in losses.items() if loss != loss] == [1, 2, 5]
    sampler = ImageDataModule(digits)
    sampler.plan(6, NUM_BATCHES)
    for number, images in enumerate(sampler.train_dataloader().batch_sampler):
        for line in lines:
            same = line["indices"] == [index for _, index in images]
            assert same == (line["batch"] == number)
    assert finite(module)
    assert f"{stage}: batch 5 was skipped, its loss is nan" in capsys.readouterr().err


@STAGES
def test_a_skipped_batch_changes_nothing_that_is_learned_by_gradient(stage, digits, tmp_path):
    module, _ = run(stage, digits, tmp_path, Break(*range(NUM_BATCHES)), max_skipped=9)
    fresh = make_module(stage)
    assert len(skipped(tmp_path / stage)) == NUM_BATCHES
    for ours, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
        if theirs.requires_grad:
            assert torch.equal(ours, theirs)


@STAGES
def test_too_many_of_them_in_a_row_end_the_run_with_advice(stage, digits, tmp_path):
    with pytest.raises(ValueError, match="3 batches in a row .* lower the learning rate"):
        run(stage, digits, tmp_path, Break(0, 2, 3, 4), max_skipped=3)
    assert [line["batch"] for line in skipped(tmp_path / stage)] == [0, 2, 3, 4]


def test_the_count_in_a_row_goes_on_after_an_interruption(digits, tmp_path):
    run("var", digits, tmp_path, Break(1, 2), Interrupt(3), max_skipped=3)
    with pytest.raises(ValueError, match="3 batches in a row"):
        run("var", digits, tmp_path, Break(3), max_skipped=3)


class Broken(ImageSource):
    """The digits, some of whose training images are not finite."""

    def __init__(self, digits):
        super().__init__("broken", 16, 1, digits.class_names)
        self.digits = digits

    def load(self):
        return self.digits.train, self.digits.val

    def train_transform(self, image, rng):
        pixels = super().train_transform(image, rng)
        return pixels * torch.nan if rng.random() < 0.1 else pixels


def test_images_that_are_not_finite_leave_codebooks_and_weights_finite(digits, tmp_path):
    source = Broken(digits)
    source.setup()
    module, _ = run("tokenizer", source, tmp_path, max_skipped=NUM_BATCHES)
    assert 0 < len(skipped(tmp_path / "tokenizer")) < NUM_BATCHES
    assert finite(module)


class Groups(Callback):
    """Rate and decay of every parameter group at each batch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[progress(trainer) - 1] = [
            (group["lr"], group["weight_decay"])
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]


@STAGES
def test_rate_and_weight_decay_follow_their_schedules(stage, digits, tmp_path):
    groups = Groups()
    module, _ = run(
        stage, digits, tmp_path, groups, weight_decay=0.1, final_weight_decay=0.3, max_skipped=1
    )
    decays = {0: 0.1, 4: 0.2}  # a half cosine over eight batches
    for batch, seen in groups.seen.items():
        assert all(rate == 3e-3 * module.schedule(batch / NUM_BATCHES) for rate, _ in seen)
        assert seen[0][1] == pytest.approx(module.weight_decay(batch / NUM_BATCHES))
        assert seen[-1][1] == 0.0  # vectors and biases
    for batch, decay in decays.items():
        assert groups.seen[batch][0][1] == pytest.approx(decay)


@STAGES
def test_raw_or_averaged_weights_are_what_is_evaluated_and_handed_on(stage, digits, tmp_path):
    averaged, _ = run(stage, digits, tmp_path / "averaged")
    raw, _ = run(stage, digits, tmp_path / "raw", weights="raw")
    name = averaged.network_name
    assert averaged.evaluated is getattr(averaged, f"averaged_{name}")
    assert raw.evaluated is raw.network
    for choice, module in (("averaged", averaged), ("raw", raw)):
        kept = load_networks(tmp_path / choice / stage / "best.ckpt", weights=choice)
        ours = getattr(kept, name).state_dict()
        eval_weights = getattr(load_networks(tmp_path / choice / stage / "best.ckpt"), name)
        assert_equal(ours, eval_weights.state_dict())  # without being asked for
        assert_equal(ours, {k: v.cpu() for k, v in module.network.state_dict().items()})
    assert_equal(weights(tmp_path / "averaged", stage), weights(tmp_path / "raw", stage))


def test_the_average_is_the_mean_of_all_weights_until_its_window_is_full(digits, tmp_path):
    class Weights(Callback):
        seen = []

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append(module.transformer.position.detach().clone())

    module, _ = run("var", digits, tmp_path, Weights(), ema_decay=0.999)
    run("var", digits, tmp_path)  # a finished stage: nothing more is seen
    mean = torch.stack(Weights.seen[:NUM_BATCHES]).mean(dim=0)
    assert torch.allclose(module.averaged_transformer.position, mean, atol=1e-6)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_precisions_in_which_codes_or_losses_suffer_are_refused(precision, digits, tmp_path):
    with pytest.raises(ValueError, match="trainer.precision"):
        run("var", digits, tmp_path, trainer={"precision": precision})


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"weights": "best"}, "weights: expected averaged, raw"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"max_skipped": 0}, "max_skipped"),
        ({"clip": -1.0}, "clip: expected a number >= 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -0.5}, "ema_decay"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": 0.0, "final_weight_decay": 0.1}, "final_weight_decay"),
    ],
    ids=str,
)
@STAGES
def test_arguments_out_of_their_range_are_refused_by_name(stage, changes, named):
    with pytest.raises(ValueError, match=named):
        make_module(stage, **changes)
