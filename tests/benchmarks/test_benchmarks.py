"""The plain way computes what ours does, and the harness counts and averages as it says."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import (
    harness,
    limits,
    loading,
    memory,
    sampling,
    tokenizer,
    tokenizer_training,
    training,
)
from benchmarks.baseline import PlainTokenizer
from benchmarks.harness import Unequal
from benchmarks.networks import draw_codes, draw_images, draw_labels, make_networks, schedule_for

TINY = "--depth 1 --image-size 64 --tokenizer-width 8 --batch 2 --limit-size 64 --repeats 2".split()


def arguments(*more: str):
    return harness.parse(
        "", [*TINY, "--threads", str(torch.get_num_threads()), *more], add=training.add_arguments
    )


# -- the plain way ------------------------------------------------------------------------


def test_the_plain_way_has_our_codes_and_our_images():
    args = arguments()
    _, ours = make_networks(args)
    plain, images = PlainTokenizer(ours), draw_images(args)
    codes = ours.encode(images)
    for a, b in zip(plain.encode_plain(images), codes, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(plain.decode_plain(codes), ours.decode(codes), atol=1e-4, rtol=0)


def test_the_plain_way_reads_what_our_transformer_reads():
    args = arguments()
    _, ours = make_networks(args)
    codes = draw_codes(args)
    torch.testing.assert_close(
        PlainTokenizer(ours).quantizer.teacher_forcing_input(codes),
        ours.quantizer.teacher_forcing_input(codes),
    )


def test_the_plain_way_draws_our_samples():
    sampler = sampling.Sampler(arguments())
    plain, ours = sampler.run_plain(), sampler.run_ours(sampler.networks, "fp32")
    for a, b in zip(plain.indices, ours.indices, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(plain.images, ours.images, atol=1e-4, rtol=0)


def test_the_plain_way_has_our_loss_and_our_gradients():
    args = arguments()
    plain, ours = training.pair(args)
    codes, labels = draw_codes(args), draw_labels(args)
    torch.testing.assert_close(plain.gradients(codes, labels), ours.gradients(codes, labels))
    theirs = dict(plain.transformer.named_parameters())
    for name, parameter in ours.transformer.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_the_plain_way_takes_our_steps():
    args = arguments()
    plain, ours = training.pair(args)
    codes, labels = draw_codes(args), draw_labels(args)
    for _ in range(3):
        plain.step_from_codes(codes, labels)
        ours.step_from_codes(codes, labels)
    theirs = dict(plain.transformer.named_parameters())
    for name, parameter in ours.transformer.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_plain_way_trains_our_tokenizer(adversarial):
    args = arguments()
    images = draw_images(args)
    plain, ours = tokenizer_training.pair(make_networks(args)[1], args, adversarial)
    found = tokenizer_training.check(plain, ours, images)
    differences = [value for name, value in found.items() if "difference" in name]
    assert len(differences) == (4 if adversarial else 2) and max(differences) < 0.02
    if adversarial:
        assert ours.adversary.adaptive_weight > 0
    plain, ours = tokenizer_training.pair(make_networks(args)[1], args, adversarial)
    if not adversarial:  # or fakes of the plain way are those of the step before
        losses = [
            torch.stack([step(images) for _ in range(3)])
            for step in (plain.training_step_plain, ours.training_step)
        ]
        assert losses[0][2] < losses[0][0]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_the_plain_way_makes_reconstructions_anew_for_the_discriminator_and_ours_does_not():
    args = arguments()
    images = draw_images(args)
    pair = tokenizer_training.pair(make_networks(args)[1], args, adversarial=True)
    seen = []
    for one in pair:
        for network in (one.tokenizer.decoder, one.discriminator):
            network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    pair[0].training_step_plain(images)
    assert seen == [2, 2, 2, 2, 2]  # rebuilt, judged; rebuilt, images and reconstructions judged
    seen.clear()
    pair[1].training_step(images)
    assert seen == [2, 2, 4]


# -- no ratio of unequal things -----------------------------------------------------------


def test_codes_that_differ_by_more_than_rounding_are_refused():
    sampler = sampling.Sampler(arguments())
    plain, ours = sampler.run_plain(), sampler.run_ours(sampler.networks, "fp32")
    ours = ours._replace(indices=[codes.clone() for codes in ours.indices])
    ours.indices[1][0, 0] = (ours.indices[1][0, 0] + 1000) % 4096
    with pytest.raises(Unequal, match="1 codes of scale 1 differ"):
        sampling.same_codes(plain, ours, sampler.uniforms)


def test_a_code_on_a_border_may_differ_and_its_sample_counts_no_longer():
    sampler = sampling.Sampler(arguments())
    plain = sampler.run_plain()
    ours = sampler.run_ours(sampler.networks, "fp32")
    ours = ours._replace(indices=[codes.clone() for codes in ours.indices])
    code = plain.indices[0][0, 0]  # the uniform number is moved to its upper border
    mass = plain.masses[0][0, 0]
    sampler.uniforms[0, 0] = mass[code] / mass[-1]
    following = (mass > mass[code]).int().argmax()  # the next code that is not filtered out
    ours.indices[0][0, 0] = following
    alike = sampling.same_codes(plain, ours, sampler.uniforms)
    assert alike.tolist() == [False, True]


def test_codes_that_are_not_equally_near_are_refused():
    args = arguments()
    _, ours = make_networks(args)
    plain, images = PlainTokenizer(ours), draw_images(args)
    codes = plain.encode_plain(images)
    assert tokenizer.check_codes(plain, images, codes, codes) == 2
    other = [c.clone() for c in codes]
    other[2][1, 3] = (other[2][1, 3] + 1) % 4096
    with pytest.raises(Unequal, match="1 codes of scale 2 differ"):
        tokenizer.check_codes(plain, images, codes, other)


def test_gradients_that_differ_are_refused():
    args = arguments()
    plain, ours = training.pair(args)
    with torch.no_grad():
        ours.transformer.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(Unequal, match="loss|gradient"):
        training.check(plain, ours, draw_codes(args), draw_labels(args))


@pytest.mark.parametrize(
    "named", ["loss of the deceiving", "gradient of the deceiving", "gradient of the discriminator"]
)
def test_a_tokenizer_that_learns_otherwise_is_refused(named):
    args = arguments()
    plain, ours = tokenizer_training.pair(make_networks(args)[1], args, adversarial=True)
    if "loss" in named:
        ours.adversary.weight *= 1.1
    else:
        wrong = ours.discriminator if "discriminator" in named else ours.tokenizer
        for weight in wrong.parameters():
            weight.register_hook(lambda gradient: 1.1 * gradient)
    with pytest.raises(Unequal, match=named):
        tokenizer_training.check(plain, ours, draw_images(args))


def test_a_relative_difference_is_one_of_root_mean_squares():
    plain = torch.tensor([3.0, 4.0])
    assert harness.check_close("x", plain, plain * 1.5, 0.6) == pytest.approx(0.5)
    with pytest.raises(Unequal, match="x: relative difference 0.5, at most 0.4 expected"):
        harness.check_close("x", plain, plain * 1.5, 0.4)
    with pytest.raises(Unequal):
        harness.check_close("x", plain, plain * torch.nan, 0.4)


# -- counting -----------------------------------------------------------------------------


def test_operations_of_products_and_convolutions_are_those_of_the_formula():
    linear, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert limits.counted(lambda: linear(x))[0] == 2 * 3 * 5 * 7
    assert limits.counted(lambda: linear(x).sum().backward())[0] == 3 * 2 * 3 * 5 * 7
    conv, image = nn.Conv2d(2, 4, 3, padding=1), torch.randn(1, 2, 6, 6)
    assert limits.counted(lambda: conv(image))[0] == 2 * 36 * 4 * 2 * 9


@pytest.mark.parametrize("additive", [False, True])
def test_of_masked_attention_the_visible_pairs_are_counted_in_both_directions(additive):
    b, h, n, e = 2, 3, 8, 16
    q, k, v = (torch.randn(b, h, n, e, requires_grad=True) for _ in range(3))
    mask = torch.ones(n, n).tril() > 0
    if additive:
        mask = torch.zeros(n, n).masked_fill(~mask, -torch.inf)[None, None]
    pairs = b * h * n * (n + 1) / 2

    def attend(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert limits.counted(lambda: attend(mask))[0] == 4 * pairs * e
    assert limits.counted(lambda: attend(None))[0] == 4 * b * h * n * n * e
    assert limits.counted(lambda: attend(mask).sum().backward())[0] == (4 + 10) * pairs * e


def test_the_operations_of_a_training_step_are_those_of_the_formula():
    args = arguments()
    plain, ours = training.pair(args)
    codes, labels = draw_codes(args), draw_labels(args)
    length, width, first, b = 1 + 4 + 9 + 16, 64, 1, 2
    layers = b * length * (12 * width**2 + width * 4096) + b * (length - first) * 32 * width
    modulation = b * width * (6 + 2) * width
    pairs = b * sum(n * m for n, m in ((1, 1), (4, 5), (9, 14), (16, 30)))
    # Forward and two gradients; none for what comes in: codes.
    expected = 3 * 2 * (layers + modulation) - 2 * b * (length - first) * 32 * width
    expected += (4 + 10) * pairs * width
    with torch.no_grad():
        reading = limits.counted(lambda: ours.tokenizer.quantizer.teacher_forcing_input(codes))[0]
    assert limits.counted(lambda: ours.gradients(codes, labels))[0] - reading == expected


def test_the_fewest_bytes_are_parameters_and_ends():
    network, ends = nn.Linear(3, 5), torch.zeros(7)
    found = limits.fewest_bytes([network], ends, passes=2, per_parameter=28)
    assert found == {"fp32": 20 * (2 * 4 + 28) + 28, "bf16": 20 * (2 * 2 + 28) + 28}


def test_schedules_are_the_published_ones_or_end_at_the_grid():
    assert schedule_for(512).patch_nums == [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
    assert schedule_for(112).patch_nums == [1, 2, 3, 4, 5, 6, 7]
    for size in (100, 300, 0):
        with pytest.raises(ValueError, match="--image-size"):
            schedule_for(size)


# -- the benchmarks -----------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [sampling, training, tokenizer])
def test_a_benchmark_checks_measures_and_keeps_what_it_found(benchmark, tmp_path, capsys):
    benchmark.main([*TINY, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*_fp32.json")
    found = json.loads(path.read_text())
    assert found["arguments"]["precision"] == "fp32"
    assert found["machine"]["machine"] and found["machine"]["threads"] and found["date"]
    assert any("difference" in check for check in found["checks"])
    for work, result in found["results"].items():
        first, *others = result["candidates"]
        assert others and first["name"].startswith("ours" if work.startswith("codes") else "plain")
        assert len(result["rounds"]) == 2
    assert "| times as fast |" in capsys.readouterr().out


def test_the_tokenizers_benchmark_has_steps_alone_and_against_a_discriminator(monkeypatch):
    monkeypatch.setitem(tokenizer_training.PATCHGAN, "width", 8)
    args = arguments("--precision", "bf16")
    made = tokenizer_training.candidates_of(make_networks(args)[1], draw_images(args), args)
    works, checks = made
    assert list(works) == list(tokenizer_training.STEPS)
    for candidates in works.values():
        assert [c.precision for c in candidates] == ["fp32", "bf16"] * 2
        assert [c.keeps_memory for c in candidates] == [False, False, True, True]
        assert all(c.work == candidates[0].work for c in candidates)
        for candidate in candidates:
            candidate.run()
    assert sum(name.endswith("bf16") for name in checks) == 2


def test_loading_is_measured_in_every_form_and_without_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "IMAGENET", 20_000)
    loading.main(["--count", "100", "--rounds", "2", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "loading.json").read_text())
    assert found["machine"] and found["date"] and found["arguments"]["count"] == 100
    forms = {what: [row["name"] for row in r["candidates"]] for what, r in found["results"].items()}
    assert forms["load"] == forms["load, data workers"] == list(loading.READERS)
    assert forms["read, warm cache"] == [*loading.READERS, "webdataset's own"]
    assert set(forms["read, warm cache"]) - set(forms["read, cold cache"]) == {loading.MAPPED}
    for result in found["results"].values():
        assert all(min(times.values()) > 0 for times in result["rounds"])
    assert "| image_folder |" in capsys.readouterr().out


def test_training_in_bfloat16_is_compared_with_the_plain_way_in_float32(tmp_path, capsys):
    training.main([*TINY, "--precision", "bf16", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "training_bf16.json").read_text())
    step = found["results"]["training step"]
    assert [c["precision"] for c in step["candidates"]][:2] == ["fp32", "bf16"]
    measured = ("fp32", "bf16", "copy")
    assert set(step["limits"]) == {n + end for n in measured for end in ("", harness.KEPT)}


@pytest.fixture
def small(monkeypatch):
    """Of what fits: a small tokenizer, one strategy and few numbers of images."""
    monkeypatch.setattr(memory, "WIDTH", 8)
    monkeypatch.setattr(memory, "RECOMPUTE", (0.0, 1.0))
    monkeypatch.setattr(memory, "STRATEGIES", {"fsdp": memory.STRATEGIES["fsdp"]})
    monkeypatch.setattr(memory, "IMAGES", (1, 64, 256, 4096))


def test_more_images_fit_where_blocks_are_recomputed(small):
    kept, anew = memory.rows_of(256, 2, "adaln")
    assert list(anew["images"]) == ["24 GB", "40 GB", "80 GB"]
    assert all(0 < n < anew["images"][gpu] for gpu, n in kept["images"].items())
    assert memory.table([kept, anew]).count("d2, 256 px") == 2


def test_as_many_images_fit_as_their_own_rehearsal_says(small, monkeypatch):
    monkeypatch.setattr(memory, "RECOMPUTE", (0.0,))
    (row,) = memory.rows_of(256, 2, "adaln")
    module = memory.ready(memory.make_module(256, 2, "adaln", 0.0))
    fits = row["images"]["24 GB"]
    few, many = (
        memory.needs_for(module, 256, n).shared(memory.STRATEGIES["fsdp"]).training
        for n in (fits, round(1.05 * fits))
    )
    assert few <= 24e9 * (1 - memory.RESERVE) < many


def test_nothing_fits_where_one_image_does_not(small):
    assert memory.fitting(9.0, [10, 20, 30, 40]) == 0
    assert memory.fitting(20.0, [10, 20, 30, 40]) == 64
