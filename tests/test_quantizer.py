"""The multi-scale quantizer does what the method says, written out here step by step."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tiny import QUANTIZERS, features, tiny_quantizer
from var_exp.tokenizer.codebook import Codebook
from var_exp.tokenizer.quantizer import area_matrix, assign_phis, bicubic_matrix

every_variant = pytest.mark.parametrize("variant", QUANTIZERS.values(), ids=QUANTIZERS)


def slow_quantize(quantizer, f):
    """The method's five steps in float64, with torch's own resizes and all distances.

    Returns (indices, what is added after each scale, the residual that is left, the vectors
    that each scale quantized).
    """
    quantizer = copy.deepcopy(quantizer).double()
    residual, last = f.double(), quantizer.schedule.num_scales - 1
    all_indices, parts, seen = [], [], []
    for k, size in enumerate(quantizer.schedule.sizes):
        z = residual if k == last else F.interpolate(residual, size=size, mode="area")
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        book = quantizer.codebooks[k if len(quantizer.codebooks) > 1 else 0]
        if book.cosine:
            score = F.cosine_similarity(vectors[:, None], book.weight[None], dim=-1)
        else:
            score = -(vectors[:, None] - book.weight[None]).norm(dim=-1)
        indices = score.argmax(dim=1)
        h = book.weight[indices].view(len(f), *size, -1).permute(0, 3, 1, 2)
        if k != last:
            h = F.interpolate(h, size=f.shape[2:], mode="bicubic")
        h = 0.5 * h + 0.5 * quantizer.phis[quantizer.phi_of_scale[k]](h)
        residual = residual - h
        all_indices.append(indices.view(len(f), -1))
        parts.append(h)
        seen.append(vectors)
    return all_indices, parts, residual, seen


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


def test_features_of_half_precision_are_quantized_in_float32():
    quantizer = tiny_quantizer()
    f = features(quantizer).bfloat16()
    quantized = quantizer(f)
    assert quantized.f_hat.dtype == quantized.loss.dtype == torch.float32
    assert all(map(torch.equal, quantized.indices, quantizer(f.float()).indices))


# -- which phi, and how to resize ---------------------------------------------------------


@pytest.mark.parametrize(
    ("num_scales", "expected"),
    [
        (1, [0]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 2, 3]),
        (6, [0, 0, 1, 2, 3, 3]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_four_phis_serve_the_scales_as_in_the_published_code(num_scales, expected):
    assert assign_phis(num_scales, 4) == expected
    assert tiny_quantizer(list(range(1, num_scales + 1)), num_phi=4).phi_of_scale == expected


@pytest.mark.parametrize("num_scales", range(1, 15))
def test_one_phi_serves_all_scales_and_k_phis_one_each(num_scales):
    assert assign_phis(num_scales, 1) == [0] * num_scales
    assert assign_phis(num_scales, num_scales) == list(range(num_scales))


@pytest.mark.parametrize(("num_phi", "largest"), [(0, 5), (-1, 5), (6, 5)])
def test_a_number_of_phis_that_cannot_serve_is_refused(num_phi, largest):
    with pytest.raises(ValueError, match=rf"num_phi must be in 1\.\.{largest} .* got {num_phi}"):
        tiny_quantizer(num_phi=num_phi)


@pytest.mark.parametrize("source", [1, 2, 5, 13, 16])
@pytest.mark.parametrize("target", [1, 2, 3, 5, 8, 13, 16])
def test_the_resizes_are_torchs_area_and_bicubic_as_matrices(source, target):
    x = torch.randn(2, 3, source, source, dtype=torch.float64)
    for make, mode in ((area_matrix, "area"), (bicubic_matrix, "bicubic")):
        if mode == "area" and target > source:
            continue
        matrix = make(source, target).double()
        assert matrix.shape == (target, source)
        expected = F.interpolate(x, size=(target, target), mode=mode)
        torch.testing.assert_close(matrix @ x @ matrix.T, expected, atol=1e-6, rtol=0)


# -- how the codes learn ------------------------------------------------------------------


class Witness(Codebook):
    """Remembers what it is told about the data."""

    def __init__(self, *args):
        super().__init__(*args)
        self.starts, self.updates = [], []

    def start(self, vectors):
        self.starts.append(vectors.clone())

    def update(self, vectors, indices):
        self.updates.append((vectors.clone(), indices.clone()))


def with_witnesses(per_scale: bool):
    quantizer = tiny_quantizer(per_scale=per_scale)
    books = []
    for book in quantizer.codebooks:
        books.append(Witness(book.vocab_size, book.code_dim))
        books[-1].load_state_dict(book.state_dict())
    quantizer.codebooks = torch.nn.ModuleList(books)
    return quantizer


@pytest.mark.parametrize("per_scale", [False, True])
def test_each_codebook_is_updated_with_the_vectors_of_its_scales(per_scale):
    quantizer = with_witnesses(per_scale).train()
    f = features(quantizer)
    indices, _, _, seen = slow_quantize(quantizer, f)
    quantizer(f)
    codes = [i.flatten() for i in indices]
    if not per_scale:
        seen, codes = [torch.cat(seen)], [torch.cat(codes)]
    for book, vectors, chosen in zip(quantizer.codebooks, seen, codes, strict=True):
        [(told, told_codes)] = book.updates
        torch.testing.assert_close(told, vectors.float(), atol=1e-5, rtol=0)
        assert torch.equal(told_codes, chosen)


def test_codebooks_start_once_from_what_their_own_scales_see():
    quantizer = with_witnesses(per_scale=True)
    f = features(quantizer)
    _, _, _, seen = slow_quantize(quantizer, f)
    quantizer(f)
    assert not quantizer.started and not quantizer.codebooks[0].starts  # not in evaluation
    quantizer.train()
    quantizer(f)
    quantizer(features(quantizer))
    assert quantizer.started and "started" in quantizer.state_dict()
    for book, vectors in zip(quantizer.codebooks, seen, strict=True):
        [told] = book.starts
        torch.testing.assert_close(told, vectors.float(), atol=1e-5, rtol=0)


def test_a_shared_codebook_starts_from_the_features_at_every_scale():
    quantizer = with_witnesses(per_scale=False).train()
    f = features(quantizer)
    quantizer(f)
    [told] = quantizer.codebooks[0].starts
    maps = [F.interpolate(f, size=size, mode="area") for size in quantizer.schedule.sizes]
    expected = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps])
    torch.testing.assert_close(told, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("per_scale", [False, True])
def test_training_leads_ema_codes_to_the_data_and_evaluation_leaves_them(per_scale):
    quantizer = tiny_quantizer(ema=True, per_scale=per_scale, vocab_size=64, phi_ratio=0.0)
    f = 3 + 0.1 * features(quantizer, 8)
    before = copy.deepcopy(quantizer.state_dict())
    loss = quantizer(f).loss
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
    quantizer.train()
    for _ in range(30):
        quantizer(f)
    assert quantizer(f).loss < loss / 10


def test_codebooks_for_each_scale_start_different():
    weights = [book.weight for book in tiny_quantizer(per_scale=True).codebooks]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


# -- scale drop ---------------------------------------------------------------------------


@torch.no_grad()
def test_scale_drop_decodes_from_every_prefix_but_reports_all_codes_and_the_whole_loss():
    quantizer = tiny_quantizer(scale_drop=1.0)
    f = features(quantizer)
    whole = quantizer(f)
    sums = list(quantizer.partial_sums(whole.indices))
    quantizer.train()
    met = set()
    for _ in range(60):
        quantized = quantizer(f)
        errors = [(quantized.f_hat - f_hat).abs().max().item() for f_hat in sums]
        met.add(min(range(len(sums)), key=errors.__getitem__))
        assert min(errors) < 1e-5
        assert all(map(torch.equal, quantized.indices, whole.indices))
        assert torch.equal(quantized.loss, whole.loss)
    assert met == {0, 1, 2, 3}  # never all five


@torch.no_grad()
def test_scale_drop_hits_its_share_of_the_batches():
    quantizer = tiny_quantizer([1, 2], num_phi=1, scale_drop=0.25)
    f = features(quantizer, 1)
    whole = quantizer(f).f_hat
    quantizer.train()
    dropped = sum(not torch.allclose(quantizer(f).f_hat, whole, atol=1e-5) for _ in range(400))
    assert abs(dropped / 400 - 0.25) < 0.08


def test_a_single_scale_cannot_be_dropped():
    quantizer = tiny_quantizer([3], num_phi=1, scale_drop=1.0).train()
    f = features(quantizer)
    *_, whole = quantizer.partial_sums(quantizer.encode(f))
    torch.testing.assert_close(quantizer(f).f_hat, whole)
