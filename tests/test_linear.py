"""A linear layer is the same by whichever library its product is computed."""

import pytest
import torch
import torch.nn.functional as F

from tiny import tiny_transformer
from var_exp.compiling import check_compiler
from var_exp.training.machine import FlopCounter
from var_exp.transformer import linear as module
from var_exp.transformer.linear import OneDNNLinear, linear

needs_both = pytest.mark.skipif(module.ONEDNN_LINEAR is None, reason="torch without MKL and oneDNN")
# As few numbers as a step has at its smallest, and as many as one product is cut into parts for.
SHAPES = [((3,), 5, 7), ((2, 9), 64, 192), ((4, 340), 512, 96)]


def drawn(rows, inputs, outputs, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, inputs), (outputs, inputs), (outputs,)][: 3 if bias else 2]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def with_gradients(compute, tensors):
    out = compute(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
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
    if module.ONEDNN_LINEAR is not None:
        with pytest.raises(AssertionError):
            linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(*(tensor.bfloat16() for tensor in (x, weight, bias))).dtype == torch.bfloat16
    assert linear(x[:0], weight, bias).shape == (0, 3, 8)
    assert linear(*(tensor.to("meta") for tensor in (x, weight, bias))).shape == (2, 3, 8)
    torch.testing.assert_close(linear(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight[:, :5], bias)
    elsewhere = F.linear(x, weight.to("meta"), bias)
    assert linear(x, weight.to("meta"), bias).device == elsewhere.device
    monkeypatch.setattr(module, "ONEDNN_LINEAR", None)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_both
@pytest.mark.parametrize(
    "options", [{}, {"block": "gpt2"}, {"block": "shared_adaln"}, {"mlp": "swiglu"}]
)
@torch.no_grad()
def test_every_linear_layer_of_a_transformer_is_computed_so(options, monkeypatch):
    transformer, seen = tiny_transformer(**options), []
    weights = [m.weight for m in transformer.modules() if isinstance(m, torch.nn.Linear)]
    compute = module.ONEDNN_LINEAR

    def spy(x, weight, *others):
        seen.append(weight)
        return compute(x, weight, *others)

    monkeypatch.setattr(module, "ONEDNN_LINEAR", spy)
    transformer(torch.randn(2, transformer.schedule.seq_len - 1, transformer.code_dim))
    assert weights and {id(weight) for weight in weights} == {id(weight) for weight in seen}


@needs_both
@pytest.mark.slow
def test_a_layer_compiles_and_computes_the_same_with_its_gradients():
    try:
        check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    tensors = drawn((2, 9), 64, 96)
    compiled = torch.compile(lambda x, w, b: F.silu(linear(x, w, b)), fullgraph=True)
    found = with_gradients(compiled, tensors)
    expected = with_gradients(lambda x, w, b: F.silu(F.linear(x, w, b)), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
