"""Codebooks find the nearest code, and EMA codebooks follow, start from and return to the data."""

import pytest
import torch
import torch.nn.functional as F

from var_exp.tokenizer import Codebook, EMACodebook


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
    with pytest.raises(ValueError, match=f"at least 2 codes, got {vocab_size}"):
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


def test_a_dead_code_is_restarted_at_a_vector_of_the_batch_and_gets_a_full_count():
    codebook = EMACodebook(3, 2, decay=0.5, restart_below=0.3)
    used = torch.zeros(8, dtype=torch.int64)
    first = torch.randn(8, 2)
    codebook.update(first, used)  # counts of codes 1 and 2 fall to a half
    assert (codebook.average_count[1:] == 0.5).all()
    second = 10 + torch.randn(8, 2)
    alive = codebook.average_sum[0] * 0.5 + second.sum(0) * 0.5
    codebook.update(second, used)  # and now to a quarter
    for code in (1, 2):
        assert (codebook.weight[code] == second).all(dim=1).any()
        assert torch.equal(codebook.average_sum[code], codebook.weight[code])
        assert codebook.average_count[code] == 1
    assert not torch.equal(codebook.weight[1], codebook.weight[2])
    torch.testing.assert_close(codebook.average_sum[0], alive)  # a used code is not touched
    torch.testing.assert_close(codebook.weight[0], alive / codebook.average_count[0])


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


def test_a_start_takes_different_vectors_of_the_data():
    codebook, vectors = EMACodebook(16, 3), torch.randn(40, 3)
    codebook.start(vectors)
    same = (codebook.weight[:, None] == vectors[None]).all(dim=-1)  # (V, N)
    assert (same.sum(dim=1) == 1).all() and (same.sum(dim=0) <= 1).all()
    assert torch.equal(codebook.average_sum, codebook.weight)
    assert (codebook.average_count == 1).all()


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
