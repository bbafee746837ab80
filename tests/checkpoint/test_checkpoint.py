"""A checkpoint alone gives back its networks, and a bad file is one clear line."""

import os
import pickle

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.checkpoint import (
    FORMAT,
    KEY,
    describe,
    find_checkpoint,
    load_networks,
    read_checkpoint,
    write_checkpoint,
)
from var_exp.sampling.generate import generate
from var_exp.training.ema import ema_copy


def prefixed(name, network):
    return {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}


def var_checkpoint(tokenizer, transformer, average=None):
    networks = {"tokenizer": tokenizer, "transformer": transformer}
    content = {
        "state_dict": prefixed("tokenizer", tokenizer) | prefixed("transformer", transformer),
        KEY: describe("var", networks, ["cat", "dog", "owl"]),
    }
    if average is not None:
        content["state_dict"] |= prefixed("averaged_transformer", average)
    return content


@pytest.fixture
def file(tmp_path, tokenizer, transformer):
    path = tmp_path / "model.ckpt"
    write_checkpoint(var_checkpoint(tokenizer, transformer), path)
    return path


def refusal(path):
    """The one line that loading such a file gives."""
    with pytest.raises(ValueError) as error:
        load_networks(path)
    message = str(error.value)
    assert repr(str(path)) in message and "\n" not in message and len(message) < 700
    return message


# -- what comes back ----------------------------------------------------------------------


def test_a_checkpoint_alone_draws_the_same_images(file, tokenizer, transformer):
    expected = generate(transformer, tokenizer, [0, 1])
    loaded = load_networks(file)
    assert torch.equal(generate(loaded.transformer, loaded.tokenizer, [0, 1]), expected)
    for network in (loaded.tokenizer, loaded.transformer):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_it_says_what_it_holds(file, tokenizer):
    info = load_networks(file).info
    assert info["stage"] == "var" and info["class_names"] == ["cat", "dog", "owl"]
    assert info["patch_nums"] == [1, 2, 3, 4, 5]
    assert info["tokenizer_fingerprint"] == tokenizer.fingerprint()
    assert load_networks(file).tokenizer.fingerprint() == info["tokenizer_fingerprint"]


def test_the_file_is_plain_data_and_tensors(file):
    content = torch.load(file, weights_only=True)

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for v in value.values() for leaf in leaves(v)]
        return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(content[KEY])} <= {int, float, str, bool, type(None)}


@pytest.mark.parametrize("block", ["gpt2", "shared_adaln"])
def test_networks_of_any_kind_come_back(tmp_path, block):
    scales = [[1, 2], [2, 4]]
    quantizer = tiny_quantizer(scales, ema=True, per_scale=True, cosine=True, num_phi=2)
    tokenizer, transformer = tiny_tokenizer(quantizer), tiny_transformer(scales, block, False)
    write_checkpoint(var_checkpoint(tokenizer, transformer), tmp_path / "x.ckpt")
    loaded = load_networks(tmp_path / "x.ckpt")
    for ours, theirs in zip(loaded[:2], (tokenizer, transformer), strict=True):
        assert ours.config == theirs.config
        state = theirs.state_dict()
        assert all(torch.equal(v, state.pop(k)) for k, v in ours.state_dict().items())
        assert not state


def test_a_tokenizers_checkpoint_has_no_transformer(tmp_path, tokenizer):
    info = describe("tokenizer", {"tokenizer": tokenizer}, [])
    content = {"state_dict": prefixed("tokenizer", tokenizer), KEY: info}
    write_checkpoint(content, tmp_path / "x.ckpt")
    loaded = load_networks(tmp_path / "x.ckpt")
    assert loaded.transformer is None
    assert loaded.tokenizer.fingerprint() == tokenizer.fingerprint()


def test_the_average_is_taken_where_there_is_one_unless_raw_weights_are_asked_for(
    tmp_path, file, tokenizer, transformer
):
    average = ema_copy(transformer)
    average.position.add_(1)
    path = tmp_path / "averaged.ckpt"
    write_checkpoint(var_checkpoint(tokenizer, transformer, average), path)
    for source, weights, expected in (
        (path, "averaged", average),
        (path, "raw", transformer),
        (file, "averaged", transformer),
        (file, "raw", transformer),
    ):
        loaded = load_networks(source, weights)
        assert torch.equal(loaded.transformer.position, expected.position)
    assert torch.equal(load_networks(path).transformer.position, average.position)
    with pytest.raises(ValueError, match="expected averaged, raw or null, got 'ema'"):
        load_networks(path, "ema")


# -- where it is --------------------------------------------------------------------------


def test_a_run_folder_means_its_best_checkpoint_of_the_last_stage(tmp_path):
    names = ["tokenizer/last.ckpt", "tokenizer/best.ckpt", "var/last.ckpt", "var/best.ckpt"]
    for name in names:  # each is preferred to all before it
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name
    assert find_checkpoint(tmp_path, ("tokenizer", "var")) == tmp_path / "tokenizer/best.ckpt"
    assert find_checkpoint(tmp_path / "tokenizer") == tmp_path / "tokenizer/best.ckpt"
    assert find_checkpoint(tmp_path / names[0]) == tmp_path / names[0]


def test_a_folder_without_a_checkpoint_is_refused_with_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert "var/best.ckpt" in refusal(path)


# -- what is refused ----------------------------------------------------------------------


class Smuggler:
    def __reduce__(self):
        return os.mkdir, ("smuggled",)


def test_code_in_a_file_is_named_and_not_run(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(file, weights_only=True)
    content["callbacks"] = Smuggler()
    write_checkpoint(content, file)
    assert "mkdir" in refusal(file)
    file.write_bytes(pickle.dumps(content))
    refusal(file)
    assert not (tmp_path / "smuggled").exists()


def test_a_file_cannot_name_code_as_its_network(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(file, weights_only=True)
    content[KEY]["networks"]["tokenizer"] = {"_target_": "os.mkdir", "path": "smuggled"}
    write_checkpoint(content, file)
    assert "'os.mkdir' is not a network of var-exp" in refusal(file)
    assert not (tmp_path / "smuggled").exists()


def test_a_refusal_does_not_explain_how_to_run_the_code_all_the_same(file):
    write_checkpoint({KEY: Smuggler()}, file)
    assert "weights_only" not in refusal(file)


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_bytes()
    for share in np.linspace(0, 0.999, 40):
        file.write_bytes(whole[: int(share * len(whole))])
        assert "damaged" in refusal(file)


def test_noise_and_damaged_pickles_are_refused(file):
    rng = np.random.default_rng(0)
    plain = pickle.dumps({KEY: {"networks": [1, "two", 3.0]}}, protocol=2)
    for _ in range(150):
        damaged = bytearray(plain)
        for place in rng.integers(len(plain), size=3):
            damaged[place] = rng.integers(256)
        for content in (rng.bytes(rng.integers(1, 100)), bytes(damaged)):
            file.write_bytes(content)
            with pytest.raises(ValueError, match="checkpoint"):
                read_checkpoint(file)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"model": torch.zeros(2)}, [1, 2], 3])
def test_a_foreign_file_is_refused(file, content):
    write_checkpoint(content, file)
    assert "is not a checkpoint of var-exp" in refusal(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.ckpt': there is no such file"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    refusal(tmp_path / "nothing.ckpt")


def drop_tensor(content):
    del content["state_dict"]["transformer.position"]


def add_tensor(content):
    content["state_dict"]["tokenizer.extra"] = torch.zeros(1)


def reshape_tensor(content):
    content["state_dict"]["transformer.position"] = torch.zeros(1, 7, 16)


def drop_network(content):
    for key in [k for k in content["state_dict"] if k.startswith("transformer.")]:
        del content["state_dict"][key]


def drop_state(content):
    del content["state_dict"]


def drop_tokenizer_spec(content):
    del content[KEY]["networks"]["tokenizer"]


def unknown_argument(content):
    content[KEY]["networks"]["transformer"]["wings"] = True


def empty_about(content):
    content[KEY] = {"format": FORMAT}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop_tensor, "position"),
        (add_tensor, "extra"),
        (reshape_tensor, "position"),
        (drop_network, ""),
        (drop_state, "state_dict"),
        (drop_tokenizer_spec, "tokenizer"),
        (unknown_argument, "wings"),
        (empty_about, "networks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_whose_parts_do_not_fit_is_refused_with_the_part(file, damage, named):
    content = torch.load(file, weights_only=True)
    damage(content)
    write_checkpoint(content, file)
    message = refusal(file)
    assert "does not hold the networks it describes" in message and named in message


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ("mine", "not a checkpoint of var-exp"),
        ({}, "format None"),
        ({"format": 1}, "format 1"),
        ({"format": torch.ones(3)}, "format of a Tensor"),
    ],
)
def test_a_file_of_another_program_or_version_is_refused(file, about, named):
    content = torch.load(file, weights_only=True)
    content[KEY] = about
    write_checkpoint(content, file)
    assert named in refusal(file)
