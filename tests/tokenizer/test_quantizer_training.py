"""In training the quantizer tells its codebooks of the data, drops scales and adds an entropy."""

import copy

import pytest
import torch
import torch.nn.functional as F

from helpers.slow_quantizer import slow_quantize
from helpers.tiny import features, table, tiny_quantizer
from var_exp.tokenizer import (
    BitwiseCodebook,
    Codebook,
    EMACodebook,
    FSQCodebook,
    MultiScaleQuantizer,
)

# -- how the codes learn ------------------------------------------------------------------


class Witness(Codebook):
    """Remembers what it is told about the data."""

    learns_from_vectors = True

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


def test_restarts_before_the_backward_pass_change_no_gradient():
    quantizers = []
    for restart_below in (0.0, 0.9):
        torch.manual_seed(1)
        codebook = Codebook(64, 4, decay=0.1, restart_below=restart_below)
        choices = {"entropy": 0.1, "entropy_temperature": 1.0}
        quantizers.append(MultiScaleQuantizer([1, 2, 3], codebook, **choices).train())
    f = features(quantizers[0])
    for quantizer in quantizers:
        quantizer(f).loss.backward()
    plain, restarted = (quantizer.codebook(0).weight for quantizer in quantizers)
    assert (plain != restarted).any(dim=1).sum() > 20
    torch.testing.assert_close(restarted.grad, plain.grad)


def test_codebooks_for_each_scale_start_different():
    weights = [book.weight for book in tiny_quantizer(per_scale=True).codebooks]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


# -- scale drop ---------------------------------------------------------------------------


@torch.no_grad()
def test_scale_drop_decodes_from_every_prefix_but_reports_all_codes_and_the_whole_loss():
    quantizer = tiny_quantizer(quantizer_dropout=1.0)
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
    quantizer = tiny_quantizer([1, 2], num_phi=1, quantizer_dropout=0.25)
    f = features(quantizer, 1)
    whole = quantizer(f).f_hat
    quantizer.train()
    dropped = sum(not torch.allclose(quantizer(f).f_hat, whole, atol=1e-5) for _ in range(400))
    assert abs(dropped / 400 - 0.25) < 0.08


def test_a_single_scale_cannot_be_dropped():
    quantizer = tiny_quantizer([3], num_phi=1, quantizer_dropout=1.0).train()
    f = features(quantizer)
    *_, whole = quantizer.partial_sums(quantizer.encode(f))
    torch.testing.assert_close(quantizer(f).f_hat, whole)


@torch.no_grad()
def test_scale_drop_keeps_the_scales_that_a_prefix_always_has():
    quantizer = tiny_quantizer(quantizer_dropout=1.0, quantizer_dropout_from=3)
    f = features(quantizer)
    sums = list(quantizer.partial_sums(quantizer.encode(f)))
    quantizer.train()
    met = set()
    for _ in range(30):
        f_hat = quantizer(f).f_hat
        errors = [(f_hat - prefix).abs().max().item() for prefix in sums]
        met.add(min(range(len(sums)), key=errors.__getitem__))
    assert met == {2, 3}  # three or four scales
    whole = tiny_quantizer(quantizer_dropout=1.0, quantizer_dropout_from=5).train()
    *_, f_hat = whole.partial_sums(whole.encode(f))
    torch.testing.assert_close(whole(f).f_hat, f_hat)


# -- the entropy term ---------------------------------------------------------------------


def slow_entropy_term(quantizer, f, temperature):
    """Mean over the scales of E[H(q)] - H(E[q]), in float64, with gradient to f and the codes.

    What coarser scales took away is a constant.
    """
    _, parts, _, _ = slow_quantize(quantizer, f.detach())
    terms = []
    for k, size in enumerate(quantizer.schedule.sizes):
        residual = f.double() - sum(parts[:k], torch.zeros(())).detach()
        z = F.interpolate(residual, size=size, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        book = quantizer.codebook(k)
        codes = table(book).double()
        if getattr(book, "cosine", False):
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        q = (-torch.cdist(z, codes).square() / temperature).softmax(dim=-1)
        each, mean = (torch.special.entr(p).sum(-1) for p in (q, q.mean(0)))
        terms.append(each.mean() - mean)
    return sum(terms) / len(terms)


def with_entropy(quantizer, weight, temperature):
    other = copy.deepcopy(quantizer)
    other.entropy, other.entropy_temperature = weight, temperature
    return other


@pytest.mark.parametrize("per_scale", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_the_entropy_term_and_its_gradients_are_the_written_out_ones(per_scale, cosine, ema):
    quantizer = tiny_quantizer(per_scale=per_scale, cosine=cosine, ema=ema).train()
    quantizer.started.fill_(True)
    other = with_entropy(quantizer, 0.7, 0.5)
    f = features(quantizer).requires_grad_()

    def gradients(loss, network):
        codes = [book.weight for book in network.codebooks if book.weight.requires_grad]
        return torch.autograd.grad(loss, [f, *codes])

    slow = 0.7 * slow_entropy_term(quantizer, f, 0.5)
    expected = gradients(slow, quantizer)
    plain = quantizer(f).loss
    before = gradients(plain, quantizer)
    loss = other(f).loss  # EMA codes move in here, before the backward pass
    after = gradients(loss, other)
    torch.testing.assert_close(loss - plain, slow.float(), atol=1e-5, rtol=1e-4)
    assert len(after) == 1 if ema else len(after) > 1
    for a, b, e in zip(after, before, expected, strict=True):
        assert e.abs().max() > 1e-4
        torch.testing.assert_close(a - b, e.float(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("implicit", ["bitwise", "fsq"])
def test_codebooks_without_a_table_have_an_entropy_term_too(implicit):
    quantizer = tiny_quantizer(implicit=implicit, per_scale=True).train()
    f = features(quantizer).requires_grad_()
    plain, loss = quantizer(f).loss, with_entropy(quantizer, 0.7, 0.5)(f).loss
    steps = quantizer._residual_steps(f)
    terms = []
    for k, step in enumerate(steps):
        z = step.z.permute(0, 2, 3, 1).flatten(0, 2)
        each, mean = quantizer.codebook(k).entropy(z, 0.5)
        terms.append(0.7 * (each - mean))
    torch.testing.assert_close(loss - plain, sum(terms) / len(terms))
    assert torch.autograd.grad(loss - plain, f)[0].abs().max() > 1e-4


def test_the_entropy_term_is_for_training_alone():
    quantizer = tiny_quantizer()
    f = features(quantizer)
    assert torch.equal(with_entropy(quantizer, 0.7, 0.5)(f).loss, quantizer(f).loss)


# -- vectors that are not finite ----------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["ema", "kmeans", "gradient", "bitwise", "fsq"])
@torch.no_grad()
def test_an_image_that_is_not_finite_leaves_the_codes_as_if_it_were_not_there(kind, bad):
    """Every place of every other image is the same, so draws cannot matter."""
    make = {
        "ema": lambda: EMACodebook(4, 4, decay=0.5, restart_below=0.2),
        "kmeans": lambda: EMACodebook(4, 4, decay=0.5, restart_below=0.2, start_from="kmeans"),
        "gradient": lambda: Codebook(4, 4, decay=0.5, restart_below=0.2, start_from="data"),
        "bitwise": lambda: BitwiseCodebook(4, start_from="data"),
        "fsq": lambda: FSQCodebook([3, 3, 3, 3], start_from="data"),
    }[kind]
    clean = MultiScaleQuantizer([1, 2], make(), per_scale=True, phi_ratio=0.0).train()
    dirty = copy.deepcopy(clean)
    image = torch.randn(1, 4, 1, 1).expand(1, 4, 2, 2)
    spoilt = image.clone()
    spoilt[:, 1] = bad
    for seed in range(4):
        for quantizer, batch in ((clean, [image] * 6), (dirty, [image, spoilt] + [image] * 5)):
            torch.manual_seed(seed)
            indices = quantizer(torch.cat(batch)).indices
            assert all(0 <= i.min() and i.max() < quantizer.vocab_size for i in indices)
    assert all(value.isfinite().all() for value in dirty.state_dict().values())
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(dirty.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["ema", "gradient", "bitwise"])
def test_a_batch_without_any_finite_vector_changes_no_code(kind):
    choices = {"implicit": kind} if kind == "bitwise" else {"ema": kind == "ema"}
    quantizer = tiny_quantizer(per_scale=True, **choices).train()
    before = [table(book).clone() for book in quantizer.codebooks]
    for _ in range(300):  # long enough for every code to be found dead
        quantizer(torch.full_like(features(quantizer), torch.nan))
    for book, codes in zip(quantizer.codebooks, before, strict=True):
        assert torch.equal(table(book), codes)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
