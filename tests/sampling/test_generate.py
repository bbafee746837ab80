"""What `generate` promises whoever calls it on networks of their own."""

import pytest
import torch

from helpers.tiny import tiny_tokenizer, tiny_transformer
from var_exp.sampling.generate import generate


def test_a_network_in_training_samples_without_dropout_and_stays_in_training():
    tokenizer = tiny_tokenizer()
    transformer = tiny_transformer(tokenizer.schedule.patch_nums, dropout=0.5).train()
    first, second = (generate(transformer, tokenizer, [0, 1], seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert all(part.training for part in transformer.modules())
    assert not any(part.training for part in tokenizer.modules())


def test_a_number_of_samples_that_is_not_that_of_the_labels_is_refused():
    tokenizer = tiny_tokenizer()
    transformer = tiny_transformer(tokenizer.schedule.patch_nums)
    with pytest.raises(ValueError, match="1 labels and num_samples 4"):
        generate(transformer, tokenizer, [0], num_samples=4)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"seed": -1},
        {"cfg_scale": None},
        {"top_p": True + 1},
    ],
    ids=str,
)
def test_a_setting_of_another_type_or_sign_is_named(setting):
    tokenizer = tiny_tokenizer()
    transformer = tiny_transformer(tokenizer.schedule.patch_nums)
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value!r}"):
        generate(transformer, tokenizer, [0], **setting)
