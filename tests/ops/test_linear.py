"""A linear layer is the same whichever library computes its product."""

import threading

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny import tiny_tokenizer, tiny_transformer
from var_exp.ops.linear import (
    CASTS,
    HAS_BFLOAT16,
    ONEDNN_LINEAR,
    Linear,
    OneDNNLinear,
    cached_weight_casts,
    linear,
    linear_gelu,
)
from var_exp.sampling.generate import generate
from var_exp.training.callbacks.throughput import FlopCounter

needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN without bfloat16")
needs_both = pytest.mark.skipif(ONEDNN_LINEAR is None, reason="torch without MKL and oneDNN")
# As few numbers as a step has at its smallest, and as many as one product is cut into parts for.
SHAPES = [((3,), 5, 7), ((2, 9), 64, 192), ((4, 340), 512, 96)]


def drawn(rows, inputs, outputs, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, inputs), (outputs, inputs), (outputs,)][: 3 if bias else 2]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def with_gradients(compute, tensors):
    out = compute(*tensors)
    weights = (torch.arange(out.numel()) % 8 - 3).to(out.dtype).view_as(out) / 4  # exact in all
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


@needs_both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(shape, bias):
    tensors = drawn(*shape, bias=bias)
    precise = [tensor.detach().double().requires_grad_() for tensor in tensors]
    ours, expected = with_gradients(linear, tensors), with_gradients(F.linear, precise)
    assert ours[0].grad_fn is not None and "OneDNN" in type(ours[0].grad_fn).__name__
    for a, b in zip(ours, expected, strict=True):
        assert a.is_contiguous() and a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=1e-5)


@needs_both
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_gelu_is_the_same_after_the_product_within_it_and_in_compiled_code(
    dtype, share, monkeypatch
):
    tensors = drawn((2, 9), 64, 96)
    exact = F.gelu(F.linear(*(tensor.double() for tensor in tensors)), approximate="tanh")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = [linear_gelu(*tensors)]
        with torch.no_grad():
            found.append(linear_gelu(*tensors))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found.append(linear_gelu(*tensors))
    for out in found:
        assert out.dtype == dtype and (out - exact).norm() <= share * exact.norm()
    slopes = [torch.autograd.grad(found[i].float().square().sum(), tensors) for i in (0, 2)]
    for a, b in zip(*slopes, strict=True):
        assert (a - b).norm() <= share * a.norm()


@needs_bfloat16
def test_weights_are_cast_once_for_all_scales(monkeypatch):
    transformer, tokenizer, casts = tiny_transformer(depth=2), tiny_tokenizer(), []
    to = torch.Tensor.to

    def spy(tensor, *target, **options):
        if isinstance(tensor, torch.nn.Parameter) and target == (torch.bfloat16,):
            casts.append(tensor)
        return to(tensor, *target, **options)

    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(transformer, tokenizer, [0, 1], return_indices=True)
        monkeypatch.setattr(torch.Tensor, "to", spy)
        again = generate(transformer, tokenizer, [0, 1], return_indices=True)
    assert all(map(torch.equal, again.indices, expected.indices))
    layers = [m for m in transformer.modules() if isinstance(m, Linear)]
    assert len({id(tensor) for tensor in casts}) == len(casts) >= len(layers)


def test_cached_casts_are_those_of_autocast_and_end_with_the_context():
    layer, x = Linear(8, 6), torch.randn(2, 8)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with pytest.raises(KeyboardInterrupt), cached_weight_casts():
        with autocast:
            assert layer(x).grad_fn is not None  # with gradients nothing is kept
            assert CASTS.get() == {}
            with torch.no_grad():
                once, again = layer(x), layer(x)
                assert torch.equal(once, again) and once.dtype == torch.bfloat16
                assert {kept.dtype for kept in CASTS.get().values()} == {torch.bfloat16}
                assert len(CASTS.get()) == 2
                with cached_weight_casts():  # one of its own within another
                    assert CASTS.get() == {}
                assert len(CASTS.get()) == 2
                assert Linear(8, 6).double()(x.double()).dtype == torch.float64
        assert layer(x).dtype == torch.float32  # autocast is off
        seen = []
        thread = threading.Thread(target=lambda: seen.append(CASTS.get()))
        thread.start()
        thread.join()
        assert seen == [None]
        raise KeyboardInterrupt
    assert CASTS.get() is None


@needs_both
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_a_row_is_the_same_whatever_rows_come_with_it_but_alone(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for inputs, outputs in ((512, 1536), (2048, 512), (32, 96)):
            x, weight, bias = drawn((1024,), inputs, outputs)
            whole = linear(x, weight, bias)
            for rows in (2, 8, 16, 72, 288, 800):
                assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
    finally:
        torch.set_num_threads(before)


@needs_both
def test_gradients_have_gradients():
    tensors = drawn((6,), 4, 3)

    def penalty(compute):
        (slope,) = torch.autograd.grad(
            compute(*tensors).tanh().sum(), tensors[:1], create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), tensors)

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@needs_both
def test_gradients_that_nobody_asks_for_are_not_computed():
    x, weight, bias = drawn((6,), 4, 3)
    with FlopCounter() as forward:
        out = linear(x.detach(), weight, bias)
    with FlopCounter() as backward:
        out.sum().backward()
    assert forward.flops == backward.flops == 2 * 6 * 4 * 3
    assert weight.grad is not None and bias.grad is not None and x.grad is None
    with FlopCounter() as both:
        linear(x, weight.detach(), bias.detach()).sum().backward()
    assert both.flops == 2 * forward.flops and x.grad is not None


def test_what_onednn_is_not_asked_for_is_left_to_torch(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(OneDNNLinear, "apply", never)
    x, weight, bias = drawn((2, 3), 8, 8)
    if ONEDNN_LINEAR is not None:
        with pytest.raises(AssertionError):
            linear(x, weight, bias)
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight, bias).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*(tensor.double() for tensor in (x, weight, bias))).dtype == torch.float64
    assert linear(*(tensor.half() for tensor in (x, weight, bias))).dtype == torch.float16
    assert linear(x[:0], weight, bias).shape == (0, 3, 8)
    assert linear(*(tensor.to("meta") for tensor in (x, weight, bias))).shape == (2, 3, 8)
    torch.testing.assert_close(linear(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight[:, :5], bias)
    elsewhere = F.linear(x, weight.to("meta"), bias)
    assert linear(x, weight.to("meta"), bias).device == elsewhere.device
    monkeypatch.setattr("var_exp.ops.linear.ONEDNN_LINEAR", None)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_both
@pytest.mark.parametrize(
    "options", [{}, {"block": "gpt2"}, {"block": "shared_adaln"}, {"mlp": "swiglu"}]
)
@torch.no_grad()
def test_every_linear_layer_of_a_transformer_is_computed_so(options, monkeypatch):
    transformer, seen = tiny_transformer(**options), []
    weights = [m.weight for m in transformer.modules() if isinstance(m, torch.nn.Linear)]

    def spy(x, weight, *others):
        seen.append(weight)
        return ONEDNN_LINEAR(x, weight, *others)

    monkeypatch.setattr("var_exp.ops.linear.ONEDNN_LINEAR", spy)
    transformer(torch.randn(2, transformer.schedule.seq_len - 1, transformer.code_dim))
    assert weights and {id(weight) for weight in weights} == {id(weight) for weight in seen}
