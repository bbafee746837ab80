"""Operations are counted as the hand formulas say, and counting them changes nothing; the peak of
the machine is what its best matrix product reached."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from helpers.operations import counted, step_of_transformer
from helpers.tiny import tiny_transformer
from var_exp.training.callbacks import throughput as machine
from var_exp.training.callbacks.throughput import peak_flops

CPU = torch.device("cpu")


def learned(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_a_matrix_product_is_two_operations_for_each_product_of_entries():
    a, b = learned(3, 5), learned(5, 7)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    batched = learned(4, 3, 5), learned(4, 5, 7)
    assert counted(lambda: torch.bmm(*batched)) == 4 * 2 * 3 * 5 * 7
    out = a @ b
    assert counted(lambda: out.sum().backward()) == 2 * 2 * 3 * 5 * 7  # gradients of a and of b


def test_a_linear_layer_counts_every_row_and_no_bias():
    layer, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    assert counted(lambda: layer(x)) == 2 * (2 * 3) * 5 * 7
    out = layer(x)
    # The input needs no gradient.
    assert counted(lambda: out.sum().backward()) == 2 * (2 * 3) * 5 * 7


@pytest.mark.parametrize("stride, side", [(1, 8), (2, 4)])
def test_a_convolution_counts_its_window_at_every_place_of_its_output(stride, side):
    layer, x = nn.Conv2d(3, 6, 3, stride, padding=1), learned(2, 3, 8, 8)
    forward = 2 * (2 * side * side) * 6 * (3 * 3 * 3)
    assert counted(lambda: layer(x)) == forward
    out = layer(x)
    assert counted(lambda: out.sum().backward()) == 2 * forward


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_two_products_and_five_on_the_way_back(masked):
    b, h, n, m, e = 2, 3, 5, 7, 4
    q, k, v = learned(b, h, n, e), learned(b, h, m, e), learned(b, h, m, e)
    mask = torch.rand(n, m) < 0.8 if masked else None
    product = 2 * b * h * n * m * e
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) == 2 * product
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # The scores are computed again, then the gradients of v, of the weights, of q and of k.
    assert counted(lambda: out.sum().backward()) == 5 * product


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_is_counted_as_attention_and_computes_the_same(compiled, monkeypatch):
    # Torch refuses to train with it on a CPU, where its operators would do so.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    attend = torch.compile(flex_attention) if compiled else flex_attention
    q, k, v = learned(2, 3, 128, 4), learned(2, 3, 128, 4), learned(2, 3, 128, 4)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    product, outputs = 2 * 2 * 3 * 128 * 128 * 4, []
    assert counted(lambda: outputs.append(attend(q, k, v, block_mask=causal))) == 2 * product
    assert counted(lambda: outputs[0].sum().backward()) == 5 * product
    found = [outputs[0], q.grad, k.grad, v.grad]
    q.grad = k.grad = v.grad = None
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.sum().backward()
    for ours, expected in zip(found, [out, q.grad, k.grad, v.grad], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_function_is_counted_and_compiled_again_afterwards():
    function = torch.compile(torch.matmul, backend="eager")
    a, b = learned(3, 5), learned(5, 7)
    assert counted(lambda: function(a, b)) == 2 * 3 * 5 * 7
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    function(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + 1


def test_a_training_step_of_the_transformer_is_what_its_sizes_say():
    network = tiny_transformer().train()
    inputs = torch.randn(4, network.schedule.seq_len - 1, 4)
    targets = torch.randint(0, 16, (4, network.schedule.seq_len))

    def step():
        F.cross_entropy(network(inputs, torch.tensor([0, 1, 2, 3])).mT, targets).backward()

    assert counted(step) == step_of_transformer(network, 4)


def test_operations_are_the_same_in_half_precision():
    network = tiny_transformer()
    inputs, counts = torch.randn(2, network.schedule.seq_len - 1, 4), set()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            counts.add(counted(lambda: network(inputs)))
    assert len(counts) == 1


def test_counting_changes_no_bit_of_gradients():
    gradients = []
    for count in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 3)
        )
        loss = nn.Sequential(network, nn.Flatten(), nn.LayerNorm(576), nn.Linear(576, 9))
        x = torch.randn(5, 3, 16, 16)
        work = lambda: loss(x).log_softmax(dim=1).square().mean().backward()  # noqa: B023, E731
        counted(work) if count else work()
        gradients.append([parameter.grad for parameter in loss.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Clock:
    """Goes on by a tick whenever it is looked at."""

    def __init__(self, *ticks: float):
        self.now, self.ticks = 100.0, list(ticks)

    def perf_counter(self) -> float:
        self.now += self.ticks.pop(0) if len(self.ticks) > 1 else self.ticks[0]
        return self.now


@pytest.fixture
def fresh_peak():
    peak_flops.cache_clear()
    yield
    peak_flops.cache_clear()


def test_the_peak_is_what_the_best_product_reached(fresh_peak, monkeypatch):
    # Two looks at the clock for each product and one before the next: 50 ms, but one of 20 ms.
    monkeypatch.setattr(machine, "time", Clock(*[0.05] * 5, 0.02, 0.05))
    assert peak_flops(CPU, torch.float32) == pytest.approx(2 * machine.SMALLEST**3 / 0.02)


def test_the_product_grows_until_it_takes_long_enough_to_be_timed(fresh_peak, monkeypatch):
    monkeypatch.setattr(machine, "time", Clock(1e-3))  # whatever the size
    monkeypatch.setattr(machine, "SMALLEST", 4)
    monkeypatch.setattr(machine, "LARGEST", 32)
    assert peak_flops(CPU, torch.float32) == pytest.approx(2 * 32**3 / 1e-3)


def test_the_peak_is_measured_once_and_draws_no_random_numbers(fresh_peak, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    state = torch.get_rng_state()
    peak = peak_flops(CPU, torch.float32)
    assert peak > 0 and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(machine, "time", None)
    assert peak_flops(CPU, torch.float32) == peak
