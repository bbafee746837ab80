"""Codes without a table are the points of their papers' grids, and need no more than one number."""

import math
from itertools import product

import pytest
import torch

from helpers.tiny import IMPLICIT, features, table, tiny_quantizer, tiny_tokenizer
from var_exp.checkpoint.official import official_state_dict
from var_exp.configurable import build
from var_exp.tokenizer import BitwiseCodebook, EMACodebook, FSQCodebook
from var_exp.tokenizer.codebook import entropies

LEVELS = [8, 5, 3, 4]
every_kind = pytest.mark.parametrize("make", IMPLICIT.values(), ids=IMPLICIT)


def with_magnitude(codebook, magnitude):
    torch.nn.init.constant_(codebook.log_magnitude, math.log(magnitude))
    return codebook


# -- which codes --------------------------------------------------------------------------


@pytest.mark.parametrize("code_dim", [1, 3, 16])
def test_the_codes_of_bits_are_all_signs_on_the_unit_sphere(code_dim):
    codebook = BitwiseCodebook(code_dim)
    assert (codebook.vocab_size, codebook.code_dim) == (2**code_dim, code_dim)
    codes = table(codebook)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2**code_dim))
    assert len(codes.unique(dim=0)) == 2**code_dim
    # Bit d of an index, of value 2^d, is set where dimension d is positive.
    bits = torch.tensor([[i >> d & 1 for d in range(code_dim)] for i in range(2**code_dim)])
    assert torch.equal(codes > 0, bits.bool())


def test_at_magnitude_root_d_the_codes_of_bits_are_those_of_lfq():
    codes = table(with_magnitude(BitwiseCodebook(9), 3.0))
    torch.testing.assert_close(codes.abs(), torch.ones(512, 9))


def test_the_codes_of_fsq_are_all_combinations_of_its_levels():
    codebook = FSQCodebook(LEVELS)
    assert (codebook.vocab_size, codebook.code_dim) == (480, 4)
    values = [  # the paper's, of 8, 5, 3 and 4 levels
        [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75],
        [-1, -0.5, 0, 0.5, 1],
        [-1, 0, 1],
        [-1, -0.5, 0, 0.5],
    ]
    slow = [code[::-1] for code in product(*values[::-1])]  # the first dimension is the fastest
    torch.testing.assert_close(table(codebook), torch.tensor(slow, dtype=torch.float32))


@every_kind
def test_lookup_takes_indices_of_any_shape(make):
    codebook = with_magnitude(make(), 0.7)
    indices = torch.randint(0, codebook.vocab_size, (2, 3, 5))
    assert torch.equal(codebook.lookup(indices), table(codebook)[indices])


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 5.0])
def test_the_nearest_code_of_bits_is_the_nearest_of_all(magnitude):
    codebook, z = with_magnitude(BitwiseCodebook(6), magnitude), torch.randn(300, 6)
    distance = torch.cdist(z.double(), table(codebook).double())
    assert torch.equal(codebook.nearest(z), distance.argmin(dim=1))


def test_fsq_rounds_each_bounded_dimension_to_its_nearest_level():
    """The paper's equation, and its promise that a vector of zeros has code zero."""
    codebook, z = FSQCodebook(LEVELS), 2 * torch.randn(300, 4)
    codes = codebook.lookup(codebook.nearest(z))
    for d, levels in enumerate(LEVELS):
        half, offset = (levels - 1) / 2, 0.5 * (levels % 2 == 0)
        shift = math.atanh(offset / half)
        for value, code in zip(z[:, d].tolist(), codes[:, d].tolist(), strict=True):
            bounded = half * math.tanh(value + shift) - offset
            assert code == pytest.approx(round(bounded) / (levels // 2))
    assert not codebook.lookup(codebook.nearest(torch.zeros(1, 4))).any()


def test_every_code_of_fsq_has_vectors_that_choose_it():
    codebook = with_magnitude(FSQCodebook(LEVELS), 0.7)
    levels = torch.tensor(LEVELS)
    half, offset = (levels - 1) / 2, 0.5 * (levels % 2 == 0)
    bounded = table(codebook) / 0.7 * (levels // 2)  # whole numbers
    z = torch.atanh(((bounded + offset) / half).clamp(-0.99, 0.99)) - torch.atanh(offset / half)
    assert torch.equal(codebook.nearest(0.7 * z), torch.arange(480))


@every_kind
def test_vectors_that_are_not_finite_get_a_code_all_the_same(make):
    codebook = make()
    z = torch.tensor([[torch.nan] * 4, [torch.inf] * 4, [-torch.inf] * 4, [1e38] * 4])
    indices = codebook.nearest(z)
    assert ((indices >= 0) & (indices < codebook.vocab_size)).all()
    top = table(codebook).max(dim=0).values
    assert torch.equal(codebook.lookup(indices[1]), top)
    assert torch.equal(codebook.lookup(indices[3]), top)


# -- the magnitude ------------------------------------------------------------------------


@every_kind
def test_the_magnitude_is_the_only_parameter_and_has_a_gradient(make):
    codebook = make()
    assert [p.shape for p in codebook.parameters()] == [(1,)]
    assert list(codebook.state_dict()) == ["log_magnitude"]
    assert codebook.magnitude == 1
    codes = codebook.lookup(torch.tensor([3, 5]))
    [gradient] = torch.autograd.grad(codes.square().sum(), codebook.log_magnitude)
    torch.testing.assert_close(gradient, 2 * codes.square().sum().view(1))
    torch.testing.assert_close(table(with_magnitude(make(), 2.5)), 2.5 * table(codebook))


def test_a_start_from_data_gives_bits_the_magnitude_of_least_error():
    vectors = 0.3 * torch.randn(2000, 4) ** 3  # no Gaussian
    codebook = BitwiseCodebook(4, start_from="data")
    codebook.start(vectors)
    assert error(codebook, vectors) <= min(
        error(with_magnitude(BitwiseCodebook(4), codebook.magnitude.item() * factor), vectors)
        for factor in (0.97, 1.0, 1.03)
    )


@pytest.mark.parametrize("levels", [[3, 3, 3], [5, 5, 5], [8, 5, 5], [8, 8, 8]])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_a_start_from_data_gives_fsq_nearly_the_magnitude_of_least_error(levels, scale):
    vectors = scale * torch.randn(2000, 3)
    codebook = FSQCodebook(levels, start_from="data")
    codebook.start(vectors)
    best = min(
        error(with_magnitude(FSQCodebook(levels), scale * 1.1**n), vectors) for n in range(-10, 25)
    )
    assert error(codebook, vectors) < 1.8 * best
    assert error(codebook, vectors) < 0.4 * vectors.square().mean()


def error(codebook, vectors):
    return (codebook.lookup(codebook.nearest(vectors)) - vectors).square().mean()


@every_kind
def test_a_start_that_is_not_asked_for_or_has_no_data_changes_nothing(make):
    codebook = make()
    codebook.start(torch.randn(9, 4))
    assert codebook.magnitude == 1
    codebook.start_from = "data"
    for vectors in (torch.full((9, 4), torch.nan), torch.zeros(9, 4)):
        codebook.start(vectors)
        assert codebook.magnitude == 1


@pytest.mark.parametrize("implicit", IMPLICIT)
def test_magnitudes_start_where_the_residual_of_each_scale_is_and_then_learn(implicit):
    quantizer = tiny_quantizer(implicit=implicit, per_scale=True).train()
    for codebook in quantizer.codebooks:
        codebook.start_from = "data"
    f = features(quantizer, 16)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    first = quantizer(f).loss.item()
    started = [codebook.magnitude.item() for codebook in quantizer.codebooks]
    assert len(set(started)) == 5 and quantizer.started
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(f).loss.backward()
        optimizer.step()
    assert quantizer(f).loss < 0.97 * first
    moved = [codebook.magnitude.item() for codebook in quantizer.codebooks]
    assert all(a != b for a, b in zip(started, moved, strict=True))


# -- entropy ------------------------------------------------------------------------------


def test_the_entropy_of_bits_is_that_of_the_softmax_over_all_codes():
    codebook = with_magnitude(BitwiseCodebook(5), 1.7)
    z = torch.randn(64, 5).requires_grad_()
    over_all = entropies(-torch.cdist(z, table(codebook)).square() / 0.6)
    ours = codebook.entropy(z, 0.6)
    torch.testing.assert_close(ours.each, over_all.each)
    assert ours.mean > over_all.mean  # an upper bound
    for a, b in zip(
        torch.autograd.grad(ours.each, [z, codebook.log_magnitude]),
        torch.autograd.grad(over_all.each, [z, codebook.log_magnitude]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_the_entropy_of_the_mean_is_exact_where_the_dimensions_are_independent():
    codebook = BitwiseCodebook(3)
    values = torch.randn(4, 3).double()
    z = torch.stack([torch.stack(row) for row in product(*values.T)]).float()  # all combinations
    over_all = entropies(-torch.cdist(z, table(codebook)).square() / 0.6)
    torch.testing.assert_close(codebook.entropy(z, 0.6).mean, over_all.mean)


def test_the_entropy_of_fsq_is_that_of_each_bounded_dimension():
    codebook = with_magnitude(FSQCodebook([4, 5]), 0.8)
    z = torch.randn(64, 2)
    each = mean = 0
    for d, levels in enumerate([4, 5]):
        half, offset = (levels - 1) / 2, 0.5 * (levels % 2 == 0)
        bounded = half * torch.tanh(z[:, d] / 0.8 + math.atanh(offset / half)) - offset
        grid = torch.arange(levels) - levels // 2
        distance = (0.8 / (levels // 2) * (bounded[:, None] - grid)).square()
        q = (-distance / 0.1).softmax(dim=-1)
        each += torch.special.entr(q).sum(-1).mean()
        mean += torch.special.entr(q.mean(0)).sum()
    torch.testing.assert_close(codebook.entropy(z, 0.1).each, each)
    torch.testing.assert_close(codebook.entropy(z, 0.1).mean, mean)


@every_kind
def test_entropies_reach_from_certainty_to_all_codes_alike(make):
    codebook = make()
    certain = codebook.entropy(table(codebook)[:1], 1e-4)
    assert certain.each < 1e-3 and certain.mean < 1e-3
    alike = codebook.entropy(torch.zeros(3, 4), 1e6)
    for value in alike:
        assert value.item() == pytest.approx(math.log(codebook.vocab_size), abs=1e-3)


# -- as parts of a tokenizer --------------------------------------------------------------


@every_kind
def test_they_are_built_again_from_their_spec(make):
    codebook = make()
    again = build(codebook.config)
    assert type(again) is type(codebook) and again.config == codebook.config
    assert torch.equal(table(again), table(codebook))


def test_the_fingerprint_changes_with_the_levels_and_with_the_magnitude():
    tokenizers = [tiny_tokenizer(tiny_quantizer(implicit="fsq"))]
    for levels in ([3, 4, 5, 3], [4, 3, 3, 5]):
        other = tiny_tokenizer(tiny_quantizer(implicit="fsq"))
        other.quantizer.codebooks[0] = FSQCodebook(levels)
        tokenizers.append(other)
    for other in tokenizers[1:]:
        other.load_state_dict(tokenizers[0].state_dict())
    prints = {tokenizer.fingerprint() for tokenizer in tokenizers}
    assert len(prints) == 3
    with_magnitude(tokenizers[0].quantizer.codebooks[0], 3.0)
    assert tokenizers[0].fingerprint() not in prints


def test_the_fingerprint_does_not_change_with_how_codes_learn():
    tokenizer = tiny_tokenizer(tiny_quantizer(ema=True))
    before = tokenizer.fingerprint()
    other = EMACodebook(16, 4, decay=0.5, restart_below=0.2, start_from="kmeans")
    other.load_state_dict(tokenizer.quantizer.codebooks[0].state_dict())
    tokenizer.quantizer.codebooks[0] = other
    assert tokenizer.fingerprint() == before
    tokenizer.quantizer.codebooks[0].cosine = True
    assert tokenizer.fingerprint() != before


@every_kind
def test_a_published_file_cannot_say_them(make):
    quantizer = tiny_quantizer()
    quantizer.codebooks[0] = make()
    with pytest.raises(ValueError, match=r"have no \w+Codebook \(tokenizer.quantizer.codebook\)"):
        official_state_dict(tiny_tokenizer(quantizer))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: BitwiseCodebook(17), "at most 65536 codes, because the transformer has a logit"),
        (lambda: BitwiseCodebook(0), "code_dim: expected a number > 0, got 0"),
        (lambda: BitwiseCodebook(4, "kmeans"), "one of none, data, got 'kmeans'"),
        (lambda: FSQCodebook([]), "levels: expected a list of at least 1, got []"),
        (lambda: FSQCodebook([8, 2]), "levels[1]: expected a number >= 3, got 2"),
        (lambda: FSQCodebook([50, 50, 50]), "got 125000 of 3 dimensions"),
        (lambda: FSQCodebook([5], "mean"), "one of none, data, got 'mean'"),
    ],
)
def test_a_grid_that_cannot_serve_is_refused(make, expected):
    with pytest.raises(ValueError) as refusal:
        make()
    assert expected in str(refusal.value)
