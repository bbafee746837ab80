"""Codebooks find the nearest code, and learn to lie where the data are."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from var_exp.tokenizer import Codebook, EMACodebook
from var_exp.tokenizer.codebook import pick


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_is_the_best_of_all_distances(book, cosine):
    codebook = book(50, 6, cosine=cosine)
    with torch.no_grad():
        codebook.weight.mul_(torch.linspace(0.2, 3, 50).unsqueeze(1))  # cosine ignores lengths
    z = torch.randn(200, 6)
    for vector, code in zip(z.double(), codebook.nearest(z), strict=True):
        weight = codebook.weight.double()
        if cosine:
            cosines = F.cosine_similarity(weight, vector.unsqueeze(0))
            assert cosines[code] == cosines.max()
        else:
            distances = (weight - vector).norm(dim=1)
            assert distances[code] == distances.min()


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_looked_up_as_stored(cosine):
    codebook = Codebook(5, 3, cosine=cosine)
    indices = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(codebook.lookup(indices), codebook.weight[indices])


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
@pytest.mark.parametrize("vocab_size", [1, 0, -3])
def test_fewer_than_two_codes_are_refused(book, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size: expected a number >= 2, got {vocab_size}"):
        book(vocab_size, 4)


def test_a_gradient_codebook_is_left_alone_by_start_and_update():
    codebook = Codebook(5, 3)
    before = codebook.weight.detach().clone()
    codebook.start(torch.randn(10, 3))
    codebook.update(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64))
    assert torch.equal(codebook.weight, before) and codebook.weight.requires_grad


def test_updates_are_the_moving_averages_written_out():
    codebook = EMACodebook(4, 2, decay=0.9, restart_below=0.0)
    count, total = [1.0] * 4, codebook.weight.double().tolist()
    for _ in range(5):
        vectors, indices = torch.randn(12, 2), torch.randint(0, 3, (12,))  # never code 3
        codebook.update(vectors, indices)
        for v in range(4):
            mine = [x.tolist() for x, i in zip(vectors.double(), indices, strict=True) if i == v]
            count[v] = 0.9 * count[v] + 0.1 * len(mine)
            for d in range(2):
                total[v][d] = 0.9 * total[v][d] + 0.1 * sum(x[d] for x in mine)
    expected = torch.tensor([[x / count[v] for x in total[v]] for v in range(4)])
    torch.testing.assert_close(codebook.weight, expected)
    torch.testing.assert_close(codebook.average_count, torch.tensor(count))


def test_an_unused_code_stays_in_place_for_ever_unless_it_is_restarted():
    codebook = EMACodebook(2, 2, decay=0.5, restart_below=0.0)
    place = codebook.weight[1].clone()
    for _ in range(200):
        codebook.update(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(codebook.weight[1], place)


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_a_dead_code_moves_to_a_vector_of_the_batch_and_counts_as_used_like_all(book):
    codebook = book(3, 2, decay=0.5, restart_below=0.1, start_from="none")
    used, first = torch.zeros(12, dtype=torch.int64), torch.randn(12, 2)
    codebook.start(first)
    assert (codebook.average_count == 4).all()  # 12 vectors for 3 codes
    for _ in range(3):
        codebook.update(first, used)
    assert (codebook.average_count[1:] == 0.5).all()  # not yet a tenth of 4
    before = copy.deepcopy(codebook)
    second = 10 + torch.randn(12, 2)
    codebook.update(second, used)
    for code in (1, 2):
        assert (codebook.weight[code] == second).all(dim=1).any()
        assert codebook.average_count[code] == 4
    assert not torch.equal(codebook.weight[1], codebook.weight[2])
    before.restart_below = 0.0  # what a code in use becomes does not depend on the dead ones
    before.update(second, used)
    assert torch.equal(codebook.weight[0], before.weight[0])
    if book is EMACodebook:
        assert torch.equal(codebook.average_sum[0], before.average_sum[0])
        assert torch.equal(codebook.average_sum[1:], 4 * codebook.weight[1:])


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
@pytest.mark.parametrize("number", [16, 4096])
def test_a_code_that_nobody_chooses_is_dead_after_as_many_steps_however_many_vectors(book, number):
    codebook = book(16, 2, decay=0.9, restart_below=0.03, start_from="data")
    vectors, used = torch.randn(number, 2), torch.zeros(number, dtype=torch.int64)
    codebook.start(vectors)
    places = codebook.weight[1:].clone()
    steps = 0
    while torch.allclose(codebook.weight[1:], places):
        codebook.update(torch.randn(number, 2), used)
        steps += 1
    assert steps == math.ceil(math.log(0.03) / math.log(0.9))


def test_codes_that_are_used_as_often_as_the_others_are_never_restarted():
    codebook = EMACodebook(4, 2, decay=0.5, restart_below=0.9)
    vectors = torch.randn(4, 2).repeat(64, 1)
    codebook.start(vectors)
    indices = torch.arange(4).repeat(64)
    for _ in range(20):
        codebook.update(vectors, indices)
    torch.testing.assert_close(codebook.weight.detach(), vectors[:4])
    assert (codebook.average_count == 64).all()


def test_a_gradient_codebook_keeps_no_counts_unless_it_restarts():
    assert list(Codebook(5, 3).state_dict()) == ["weight"]
    assert list(Codebook(5, 3, start_from="kmeans").state_dict()) == ["weight"]
    assert list(Codebook(5, 3, restart_below=0.1).state_dict()) == ["weight", "average_count"]


def test_restarts_mend_a_collapse():
    data = torch.randn(512, 2)

    def codes_in_use(restart_below):
        codebook = EMACodebook(32, 2, restart_below=restart_below)
        with torch.no_grad():
            codebook.weight[1:] += 100  # all but one far away
            codebook.average_sum.copy_(codebook.weight)
        for _ in range(300):
            batch = data[torch.randint(0, 512, (128,))]
            codebook.update(batch, codebook.nearest(batch))
        return len(codebook.nearest(data).unique())

    assert codes_in_use(restart_below=0.0) == 1
    assert codes_in_use(restart_below=0.03) == 32


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_a_start_takes_different_vectors_of_the_data(book):
    codebook, vectors = book(16, 3, restart_below=0.1, start_from="data"), torch.randn(40, 3)
    codebook.start(vectors)
    same = (codebook.weight[:, None] == vectors[None]).all(dim=-1)  # (V, N)
    assert (same.sum(dim=1) == 1).all() and (same.sum(dim=0) <= 1).all()
    assert (codebook.average_count == 40 / 16).all()
    if book is EMACodebook:
        assert torch.equal(codebook.average_sum, codebook.weight * 40 / 16)


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_a_codebook_that_starts_from_nothing_keeps_its_codes(book):
    codebook = book(16, 3, start_from="none")
    before = codebook.weight.clone()
    codebook.start(torch.randn(40, 3))
    assert torch.equal(codebook.weight, before)


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_starts_at_the_means_of_the_vectors_that_are_nearest(book, cosine):
    codebook = book(8, 3, cosine=cosine, start_from="kmeans")
    means = 5 * torch.randn(8, 3)
    vectors = (means[:, None] + 0.05 * torch.randn(8, 100, 3)).flatten(0, 1)
    vectors = vectors[torch.randperm(800)]
    codebook.start(vectors)
    indices = codebook.nearest(vectors)
    slow = torch.stack([vectors[indices == v].mean(0) for v in range(8)])
    torch.testing.assert_close(codebook.weight.detach(), slow, atol=0.01, rtol=0)


def test_kmeans_halves_the_error_of_a_start_from_single_vectors():
    vectors = torch.randn(2000, 2)
    errors = {}
    for start_from in ("data", "kmeans"):
        codebook = Codebook(16, 2, start_from=start_from)
        codebook.start(vectors)
        codes = codebook.lookup(codebook.nearest(vectors))
        errors[start_from] = (codes - vectors).square().mean()
    assert errors["kmeans"] < 0.65 * errors["data"]


def test_a_code_without_a_cluster_stays_at_a_vector_of_the_data():
    codebook, places = Codebook(8, 3, start_from="kmeans"), 9 + torch.randn(2, 3)
    codebook.start(places.repeat(50, 1))
    distance = torch.cdist(codebook.weight.detach(), places)
    assert (distance.min(dim=1).values < 1e-4).all() and (distance.min(dim=0).values < 1e-4).all()


def test_kmeans_looks_at_so_many_vectors_at_most(monkeypatch):
    monkeypatch.setattr("var_exp.tokenizer.codebook.KMEANS_VECTORS", 7)
    codebook, seen = Codebook(2, 3, start_from="kmeans"), []
    nearest = codebook.nearest
    codebook.nearest = lambda z: seen.append(len(z)) or nearest(z)
    codebook.start(torch.randn(50, 3))
    assert seen and set(seen) == {7}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("start_from", "random", " must be one of none, data, kmeans, got 'random'"),
        ("restart_below", 1.0, ": expected a number < 1, got 1.0"),
        ("restart_below", -0.1, ": expected a number >= 0, got -0.1"),
        ("decay", 1.0, ": expected a number < 1, got 1.0"),
    ],
)
@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_a_switch_outside_its_range_is_refused_and_named(book, name, value, expected):
    with pytest.raises(ValueError) as error:
        book(4, 4, **{name: value})
    assert f"{name}{expected}" in str(error.value)


def test_a_start_draws_from_all_the_vectors_and_not_from_the_first():
    codebook, met = EMACodebook(4, 1), set()
    for _ in range(100):
        codebook.start(torch.arange(12.0).unsqueeze(1))
        met |= set(codebook.weight.flatten().tolist())
    assert met == set(range(12))


def test_a_start_from_fewer_vectors_than_codes_repeats_none_exactly():
    codebook, vectors = EMACodebook(16, 3), torch.randn(5, 3)
    codebook.start(vectors)
    assert len(codebook.weight.unique(dim=0)) == 16
    for vector in vectors:
        assert (codebook.weight == vector).all(dim=1).sum() == 1
    assert (codebook.weight - vectors.mean(0)).abs().max() < 5


def test_the_averages_travel_with_the_state():
    codebook = EMACodebook(4, 2)
    codebook.update(torch.randn(9, 2), torch.randint(0, 4, (9,)))
    again = EMACodebook(4, 2)
    again.load_state_dict(codebook.state_dict())
    vectors, indices = torch.randn(9, 2), torch.randint(0, 4, (9,))
    codebook.update(vectors, indices)
    again.update(vectors, indices)
    assert torch.equal(again.weight, codebook.weight)


# -- vectors that are not finite ----------------------------------------------------------


@pytest.mark.parametrize("start_from", ["data", "kmeans"])
@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_no_code_starts_at_or_moves_to_a_vector_that_is_not_finite(book, start_from):
    codebook = book(8, 2, decay=0.5, restart_below=0.5, start_from=start_from)
    vectors = torch.randn(20, 2)
    vectors[::2, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf] * 2)
    codebook.start(vectors)
    assert len(codebook.weight.unique(dim=0)) == 8
    assert (codebook.average_count == 10 / 8).all()  # ten are finite
    if start_from == "data":
        same = (codebook.weight[:, None] == vectors[None]).all(dim=-1)  # (V, N)
        assert (same.sum(dim=1) == 1).all()
    for _ in range(20):
        codebook.update(vectors, codebook.nearest(vectors))
        assert all(value.isfinite().all() for value in codebook.state_dict().values())


def test_updates_are_those_of_the_finite_vectors_alone():
    codebook = EMACodebook(4, 2, decay=0.9, restart_below=0.0)
    again = copy.deepcopy(codebook)
    vectors, indices = torch.randn(12, 2), torch.randint(0, 4, (12,))
    bad = torch.tensor([[torch.nan, 1.0], [torch.inf, 0.0], [2.0, -torch.inf]])
    codebook.update(torch.cat((bad, vectors)), torch.cat((codebook.nearest(bad), indices)))
    again.update(vectors, indices)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(codebook.state_dict()[name], value)


def test_finite_vectors_that_are_too_few_are_repeated_with_a_little_noise():
    vectors = torch.full((40, 3), torch.nan)
    vectors[[3, 17]] = torch.randn(2, 3)
    picked = pick(vectors, 16)
    assert picked.isfinite().all() and len(picked.unique(dim=0)) == 16
    for vector in vectors[[3, 17]]:
        assert (picked == vector).all(dim=1).sum() == 1
    spread = vectors[[3, 17]].std(dim=0, correction=0)
    assert ((picked - vectors[[3, 17]].mean(0)).abs() < 2 * spread).all()


@pytest.mark.parametrize("start_from", ["none", "data", "kmeans"])
@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_learning_reads_no_value_back_from_the_device(book, start_from):
    """On the meta device there is none to read: whatever would wait for an accelerator fails."""
    codebook = book(8, 2, restart_below=0.1, start_from=start_from).to("meta")
    vectors = torch.randn(40, 2, device="meta")
    codebook.start(vectors)
    codebook.update(vectors, codebook.nearest(vectors))
