"""QK-norm is `F.normalize`, with the same gradient."""

import pytest
import torch
import torch.nn.functional as F

from var_exp.ops.qk_norm import unit_vectors


def drawn(dtype, *, scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator).transpose(1, 2)
    factors = torch.rand(1, 3, 1, 1, dtype=torch.float64, generator=generator) + 1
    leaves = [x, factors] if scale else [x]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def normalized(x, scale=None):
    unit = F.normalize(x, dim=-1)
    return unit if scale is None else unit * scale


def results(compute, inputs):
    """What comes out, and the gradients of a sum with weights."""
    out = compute(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_normalize_times_the_scale_with_its_gradients(dtype, scale):
    inputs = drawn(dtype, scale=scale)
    expected = results(normalized, inputs)
    for ours, theirs in zip(results(unit_vectors, inputs), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_the_gradients_are_those_of_differences_and_have_none_of_their_own():
    inputs = drawn(torch.float64, scale=True)
    assert torch.autograd.gradcheck(unit_vectors, inputs)
    (grad,) = torch.autograd.grad(unit_vectors(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_a_vector_of_zeros_stays_one_and_has_the_gradient_of_normalize():
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    for ours, theirs in zip(results(unit_vectors, [x]), results(normalized, [x]), strict=True):
        assert torch.equal(ours, theirs)


def test_under_autocast_lengths_are_computed_in_float32():
    inputs = drawn(torch.bfloat16, scale=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(unit_vectors, inputs)
    exact = results(normalized, [leaf.detach().double().requires_grad_() for leaf in inputs])
    assert [found.dtype for found in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for found, expected, tolerance in zip(ours, exact, (1e-6, 1e-2, 1e-2), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_compiled_code_gives_the_same():
    inputs = drawn(torch.float32, scale=True)
    compiled = results(torch.compile(unit_vectors, backend="aot_eager", fullgraph=True), inputs)
    for ours, plain in zip(compiled, results(unit_vectors, inputs), strict=True):
        torch.testing.assert_close(ours, plain)
