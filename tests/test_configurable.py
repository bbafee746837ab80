"""A network's spec is plain data that builds the same network again, and nothing else."""

import json
import os

import pytest
import torch
from torch import nn

from helpers.tiny import tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.configurable import build, register_config
from var_exp.tokenizer import EMACodebook
from var_exp.transformer import VAR

NETWORKS = {
    "tokenizer": lambda: tiny_tokenizer(),
    "per_scale": lambda: tiny_tokenizer(
        tiny_quantizer(ema=True, per_scale=True, quantizer_dropout=0.1)
    ),
    "two_to_one": lambda: tiny_tokenizer(tiny_quantizer([[1, 2], [2, 4]], cosine=True, num_phi=2)),
    "transformer": lambda: tiny_transformer(),
    "gpt2": lambda: tiny_transformer([[1, 2], [2, 4]], block="gpt2", qk_norm=False),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_build_is_the_inverse_of_spec_even_through_json(make):
    network = make()
    again = build(json.loads(json.dumps(network.config)))
    assert type(again) is type(network)
    assert again.config == network.config
    again.load_state_dict(network.state_dict())  # strict: the same keys and shapes
    assert repr(again) == repr(network)


def test_a_spec_holds_every_argument_also_those_left_at_their_default():
    spec = VAR((1, 2), 16, depth=2, width=16, num_heads=2).config
    assert spec["_target_"] == "var_exp.transformer.var.VAR"
    assert spec["patch_nums"] == [1, 2]
    assert spec["vocab_size"] == 16 and spec["code_dim"] == 32 and spec["num_classes"] == 1000


def test_a_recorded_subclass_records_itself_and_not_its_base():
    spec = EMACodebook(8, 4, decay=0.5).config
    assert spec["_target_"].endswith("EMACodebook")
    assert spec["decay"] == 0.5 and spec["cosine"] is False


def test_a_subclass_that_is_not_recorded_does_not_pass_for_its_base():
    class Mine(EMACodebook):
        pass

    assert not hasattr(Mine(8, 4), "config")


@pytest.mark.parametrize(
    "spec",
    [
        {"_target_": "os.system", "command": "touch smuggled"},
        {"_target_": "builtins.eval", "source": "open('smuggled', 'w')"},
        {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
        {"_target_": "var_exp.checkpoint.checkpoint.load_networks", "path": "x"},
        {"_target_": "var_exp.no_such_module.Network"},
        {"_target_": "var_exp.tokenizer.vqvae.NoSuchNetwork"},
        {"_target_": "var_exp"},
        {"_target_": ""},
        {"_target_": 3},
        {"target": "var_exp.transformer.var.VAR"},
    ],
    ids=lambda spec: str(next(iter(spec.values()))),
)
def test_build_refuses_whatever_is_not_a_recorded_network(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a network of var-exp"):
        build(spec)
    assert os.listdir(tmp_path) == []


def test_build_refuses_code_hidden_in_an_argument():
    spec = tiny_tokenizer().config
    spec["encoder"] = {"_target_": "os.getcwd"}
    with pytest.raises(ValueError, match="'os.getcwd' is not a network"):
        build(spec)


def test_a_constructor_that_is_given_no_plain_value_is_refused():
    with pytest.raises(TypeError, match="takes plain values, got Tensor"):
        EMACodebook(8, 4, decay=torch.tensor(0.5))


def test_own_classes_can_be_recorded_and_hold_recorded_parts():
    @register_config
    class Pair(nn.Module):
        def __init__(self, book: nn.Module, sides=(1, (2, 3)), *, name: str | None = None):
            super().__init__()
            self.book = book

    pair = Pair(EMACodebook(8, 4), name="mine")
    assert pair.config["sides"] == [1, [2, 3]] and pair.config["name"] == "mine"
    assert pair.config["book"] == EMACodebook(8, 4).config
    assert build(pair.config).config == pair.config
