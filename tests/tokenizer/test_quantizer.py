"""The multi-scale quantizer does what the method says, written out here step by step."""

import pytest
import torch
import torch.nn.functional as F

from helpers.slow_quantizer import slow_quantize
from helpers.tiny import QUANTIZERS, features, tiny_quantizer

every_variant = pytest.mark.parametrize("variant", QUANTIZERS.values(), ids=QUANTIZERS)


@every_variant
@torch.no_grad()
def test_codes_and_f_hat_are_those_of_the_written_out_method(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer)
    indices, parts, residual, _ = slow_quantize(quantizer, f)
    quantized = quantizer(f)
    for ours, slow in zip(quantized.indices, indices, strict=True):
        assert torch.equal(ours, slow)
    # Property 1: what is quantized and what is left make the whole.
    torch.testing.assert_close(quantized.f_hat + residual.float(), f, atol=1e-5, rtol=0)
    sums = torch.stack(list(quantizer.partial_sums(quantized.indices)))
    torch.testing.assert_close(sums, torch.stack(parts).cumsum(0).float(), atol=1e-5, rtol=0)


@every_variant
@torch.no_grad()
def test_decoding_the_codes_gives_the_encoders_own_f_hat(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer)
    *_, decoded = quantizer.partial_sums(quantizer.encode(f))
    torch.testing.assert_close(decoded, quantizer(f).f_hat, atol=1e-5, rtol=0)
    for ours, forward in zip(quantizer.encode(f), quantizer(f).indices, strict=True):
        assert torch.equal(ours, forward) and ours.dtype == torch.int64


@every_variant
@torch.no_grad()
def test_the_transformers_input_is_f_hat_resized_by_area(variant):
    quantizer = tiny_quantizer(**variant)
    indices, parts, _, _ = slow_quantize(quantizer, features(quantizer))
    sizes = quantizer.schedule.sizes
    slow = [torch.zeros(3, 0, quantizer.code_dim, dtype=torch.float64)]
    for k in range(len(sizes) - 1):
        f_hat = sum(parts[: k + 1])
        slow.append(F.interpolate(f_hat, sizes[k + 1], mode="area").flatten(2).transpose(1, 2))
    ours = quantizer.teacher_forcing_input(indices)
    torch.testing.assert_close(ours, torch.cat(slow, dim=1).float(), atol=1e-5, rtol=0)
    # Of the first n scales: the inputs that they determine; the finest codes do not matter.
    for n in range(1, len(sizes)):
        known = torch.cat(slow[: n + 1], dim=1).float()
        torch.testing.assert_close(
            quantizer.teacher_forcing_input(indices[:n]), known, atol=1e-5, rtol=0
        )
    other = [*indices[:-1], (indices[-1] + 1) % quantizer.vocab_size]
    assert torch.equal(quantizer.teacher_forcing_input(other), ours)


@every_variant
def test_the_loss_is_the_mean_of_the_written_out_terms_of_each_scale(variant):
    quantizer = tiny_quantizer(**variant, beta=0.3)
    f = features(quantizer)
    _, parts, _, _ = slow_quantize(quantizer, f)
    errors = [(f - sum(parts[: k + 1])).square().mean() for k in range(len(parts))]
    slow = sum(0.3 * error + error for error in errors) / len(errors)
    torch.testing.assert_close(quantizer(f).loss, slow.float())


@pytest.mark.parametrize("per_scale", [False, True])
def test_commitment_pulls_the_features_and_the_other_term_the_codes(per_scale):
    quantizer = tiny_quantizer(per_scale=per_scale, beta=0.3)
    f = features(quantizer).requires_grad_()
    quantizer(f).loss.backward()
    _, parts, _, _ = slow_quantize(quantizer, f.detach())
    num_scales = len(parts)
    errors = [f.detach() - sum(parts[: k + 1]) for k in range(num_scales)]
    pull = sum(0.3 * 2 * error / f.numel() for error in errors) / num_scales
    torch.testing.assert_close(f.grad, pull.detach().float(), atol=1e-6, rtol=1e-4)
    assert all(book.weight.grad.abs().sum() > 0 for book in quantizer.codebooks)
    assert all(phi.weight.grad.abs().sum() > 0 for phi in quantizer.phis)


def test_ema_codes_take_no_gradient_but_the_phis_do():
    quantizer = tiny_quantizer(ema=True)
    quantizer(features(quantizer)).loss.backward()
    assert not any(book.weight.requires_grad for book in quantizer.codebooks)
    assert all(phi.weight.grad.abs().sum() > 0 for phi in quantizer.phis)


@every_variant
def test_the_gradient_passes_straight_through_to_the_features_alone(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer).requires_grad_()
    pull = torch.randn_like(f)
    (quantizer(f).f_hat * pull).sum().backward()
    torch.testing.assert_close(f.grad, pull)
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())


@every_variant
@torch.no_grad()
def test_bf16_autocast_changes_no_bit(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer)
    plain, codes = quantizer(f), quantizer.encode(f)
    inputs, sums = quantizer.teacher_forcing_input(codes), list(quantizer.partial_sums(codes))
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_codes = quantizer(f), quantizer.encode(f)
        cast_inputs = quantizer.teacher_forcing_input(codes)
        cast_sums = list(quantizer.partial_sums(codes))
    assert cast.f_hat.dtype == cast_inputs.dtype == cast_sums[-1].dtype == torch.float32
    assert torch.equal(cast.f_hat, plain.f_hat) and torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast_inputs, inputs)
    assert all(map(torch.equal, cast_sums, sums))
    assert all(map(torch.equal, cast_codes + cast.indices, codes + plain.indices))


@every_variant
def test_corrupted_codes_are_the_nearest_of_what_the_mistakes_before_them_left(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer)
    targets, seen = quantizer.encode_corrupted(f, 0.3)
    nearest, _, _, _ = slow_quantize(quantizer, f, used=seen)
    for ours, slow in zip(targets, nearest, strict=True):
        assert torch.equal(ours, slow) and ours.dtype == torch.int64
    replaced = torch.cat(targets, 1) != torch.cat(seen, 1)
    assert replaced.any() and not replaced.all()


def test_a_share_of_the_codes_is_replaced_by_any_other():
    quantizer = tiny_quantizer([2, 8], num_phi=1)
    f = features(quantizer, 60)
    for share in (0.1, 0.5, 1.0):
        targets, seen = quantizer.encode_corrupted(f, share)
        for ours, used in zip(targets, seen, strict=True):
            # A sixteenth of the draws are the code that was there.
            assert abs((ours != used).float().mean() - share * 15 / 16) < 0.1
    for used in seen:  # at share 1 every code is drawn, uniformly
        counts = torch.bincount(used.flatten(), minlength=16) / used.numel()
        assert (counts - 1 / 16).abs().max() < 0.05
    first, second = (quantizer.encode_corrupted(f, 0.5).seen for _ in range(2))
    assert not torch.equal(first[1], second[1])


@every_variant
def test_without_corruption_codes_and_targets_are_those_of_encode(variant):
    quantizer = tiny_quantizer(**variant)
    f = features(quantizer)
    state = torch.get_rng_state()
    targets, seen = quantizer.encode_corrupted(f.requires_grad_(), 0.0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    for ours, used, encoded in zip(targets, seen, quantizer.encode(f), strict=True):
        assert torch.equal(ours, encoded) and torch.equal(used, encoded)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    quantizer = tiny_quantizer()
    with pytest.raises(ValueError, match=rf"share: expected a number [<>]= [01], got {share}"):
        quantizer.encode_corrupted(features(quantizer), share)


def test_features_of_half_precision_are_quantized_in_float32():
    quantizer = tiny_quantizer()
    f = features(quantizer).bfloat16()
    quantized = quantizer(f)
    assert quantized.f_hat.dtype == quantized.loss.dtype == torch.float32
    assert all(map(torch.equal, quantized.indices, quantizer(f.float()).indices))


# -- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(("num_phi", "largest"), [(6, 5), (7, 5)])
def test_a_number_of_phis_that_cannot_serve_is_refused(num_phi, largest):
    with pytest.raises(ValueError, match=rf"num_phi must be in 1\.\.{largest} .* got {num_phi}"):
        tiny_quantizer(num_phi=num_phi)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_phi", 0, ": expected a number > 0"),
        ("quantizer_dropout", 1.5, ": expected a number <= 1"),
        ("quantizer_dropout_from", 0, ": expected a number > 0"),
        ("quantizer_dropout_from", 6, " must be in 1..5, the number of scales"),
        ("entropy", -0.1, ": expected a number >= 0"),
        ("entropy_temperature", 0.0, ": expected a number > 0"),
    ],
)
def test_a_switch_outside_its_range_is_refused_and_named(name, value, expected):
    with pytest.raises(ValueError) as error:
        tiny_quantizer(**{name: value})
    assert f"{name}{expected}, got {value}" in str(error.value)
