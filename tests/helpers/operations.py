"""How many floating-point operations a piece of work takes: counted, and by hand."""

from collections.abc import Callable

from var_exp.training.callbacks.throughput import FlopCounter
from var_exp.transformer import VAR


def counted(work: Callable[[], object]) -> int:
    with FlopCounter() as counter:
        work()
    return counter.flops


def step_of_transformer(network: VAR, batch_size: int) -> int:
    """Of a training step of a transformer of AdaLN blocks without dropout."""
    length, first = network.schedule.seq_len, network.schedule.num_tokens[0]
    width, depth = network.width, len(network.blocks)
    token = width * (3 * width + width + 2 * 4 * width)  # q, k, v, projection, MLP
    image = width * 6 * width  # the six vectors
    linear = depth * (length * token + image)
    linear += length * width * network.vocab_size + width * 2 * width  # the head and its vectors
    codes = (length - first) * network.code_dim * width  # no gradient of the codes is needed
    attention = depth * 2 * length * length * width
    return 2 * batch_size * int(3 * linear + 2 * codes + 3.5 * attention)
