"""The moving average follows the network's weights, and is a network of its own."""

import torch

from helpers.tiny import tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.training.ema import ema_copy, update_ema


def test_the_average_is_the_one_written_out(transformer):
    average = ema_copy(transformer)
    slow = [p.detach().double().clone() for p in transformer.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_ema(average, transformer, decay=0.9)
        now = transformer.parameters()
        slow = [0.9 * mean + 0.1 * p.double() for mean, p in zip(slow, now, strict=True)]
    for ours, expected in zip(average.parameters(), slow, strict=True):
        torch.testing.assert_close(ours, expected.float(), atol=1e-6, rtol=1e-5)


def test_a_decay_of_zero_is_the_network_itself(transformer):
    average = ema_copy(transformer)
    transformer.position.data.add_(1)
    assert not torch.equal(average.position, transformer.position)
    update_ema(average, transformer, decay=0.0)
    assert all(map(torch.equal, average.parameters(), transformer.parameters()))


def test_the_copy_is_frozen_in_evaluation_mode_and_shares_nothing(transformer):
    average = ema_copy(transformer.train())
    assert not average.training and transformer.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in transformer.parameters())
    theirs = {p.data_ptr() for p in transformer.parameters()}
    assert not theirs & {p.data_ptr() for p in average.parameters()}
    assert average.config == transformer.config


def test_leading_the_average_leaves_the_network_and_its_gradients_alone():
    network = tiny_transformer().train()
    network(torch.randn(1, 54, 4)).sum().backward()
    before = [(p.clone(), p.grad.clone()) for p in network.parameters()]
    update_ema(ema_copy(network), network, decay=0.5)
    for parameter, (value, gradient) in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, gradient)


def test_buffers_are_copied_not_averaged():
    network = tiny_tokenizer(tiny_quantizer(ema=True))
    average = ema_copy(network)
    network.train()(torch.rand(4, 3, 10, 10))
    update_ema(average, network, decay=0.99)
    assert average.quantizer.started
    assert all(map(torch.equal, average.buffers(), network.buffers()))
    assert not average.quantizer.training
