"""What every test of the networks shares: one thread, a fixed seed, and two tiny networks."""

import pytest
import torch

from tiny import tiny_tokenizer, tiny_transformer
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> VQVAE:
    return tiny_tokenizer()


@pytest.fixture
def transformer() -> VAR:
    return tiny_transformer()
