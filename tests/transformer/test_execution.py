"""Execution options change nothing of what a transformer computes: checkpointing, compiling."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.tiny import BLOCKS, tiny_transformer
from var_exp.transformer.var import ExecutionOptions, call_block


def loss_and_gradients(transformer, inputs, labels):
    torch.manual_seed(1)  # of dropout
    transformer.zero_grad()
    loss = transformer(inputs, labels).square().mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in transformer.parameters()]


def given(transformer):
    schedule = transformer.schedule
    inputs = torch.randn(2, schedule.seq_len - schedule.num_tokens[0], transformer.code_dim)
    return inputs, torch.tensor([0, 1])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_recomputed_blocks_have_the_same_gradients_to_the_bit_dropout_included(block, share):
    transformer = tiny_transformer(block=block, dropout=0.2, drop_path=0.2).train()
    batch = given(transformer)
    loss, gradients = loss_and_gradients(transformer, *batch)
    transformer.execution = ExecutionOptions(activation_checkpointing=share)
    again, others = loss_and_gradients(transformer, *batch)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, others))


def test_a_share_of_the_blocks_is_recomputed_evenly_spread():
    def chosen(share, depth):
        options = ExecutionOptions(activation_checkpointing=share)
        return [i for i in range(depth) if options.checkpoints(i)]

    assert chosen(0, 8) == [] and chosen(1, 8) == list(range(8))
    assert chosen(0.5, 8) == [1, 3, 5, 7] and chosen(0.25, 8) == [3, 7]


def test_recomputed_blocks_run_twice_in_training_and_once_without_gradients():
    transformer, calls = tiny_transformer(depth=4).train(), []

    def counted(*args):
        calls.append(1)
        return call_block(*args)

    transformer.execution = ExecutionOptions(activation_checkpointing=0.5, call=counted)
    loss_and_gradients(transformer, *given(transformer))
    assert len(calls) == 4 + 2
    calls.clear()
    with torch.no_grad():
        transformer(*given(transformer))
    assert len(calls) == 4


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("attention", ["mask", "per_scale"])
def test_blocks_are_compiled_once_for_all_and_no_key_changes(block, attention):
    torch._dynamo.reset()
    transformer = tiny_transformer(block=block, depth=10).train()
    keys, batch = list(transformer.state_dict()), given(transformer)
    transformer.execution = ExecutionOptions(attention)
    loss, gradients = loss_and_gradients(transformer, *batch)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call_block, backend=counter, dynamic=False)
    transformer.execution = ExecutionOptions(attention, call=compiled)
    for _ in range(2):
        again, others = loss_and_gradients(transformer, *batch)
        torch.testing.assert_close(again, loss)
        for ours, expected in zip(others, gradients, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert counter.frame_count == 1  # neither for another block nor in another step
    assert list(transformer.state_dict()) == keys


def test_blocks_that_drop_branches_at_rates_of_their_own_are_compiled_once_too():
    torch._dynamo.reset()
    transformer = tiny_transformer(depth=10, drop_path=0.2).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call_block, backend=counter, dynamic=False)
    transformer.execution = ExecutionOptions(call=compiled)
    loss_and_gradients(transformer, *given(transformer))
    assert counter.frame_count == 2  # the first block has no rate


@pytest.mark.slow
def test_what_the_compiler_makes_of_the_blocks_says_the_same():
    torch._dynamo.reset()
    transformer = tiny_transformer(depth=2).train()
    batch = given(transformer)
    loss, gradients = loss_and_gradients(transformer, *batch)
    compiled = torch.compile(call_block, dynamic=False)
    transformer.execution = ExecutionOptions("per_scale", call=compiled)
    again, others = loss_and_gradients(transformer, *batch)
    torch.testing.assert_close(again, loss)
    for ours, expected in zip(others, gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)
