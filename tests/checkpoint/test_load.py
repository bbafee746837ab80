"""Networks are read from whatever holds them, which shows in what lies there, not in its name."""

import shutil

import pytest
import torch

from helpers.published import tokenizer_state, transformer_state
from helpers.tiny import tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.checkpoint import KEY, describe, load_networks
from var_exp.checkpoint.load import read_networks, read_published, read_tokenizer
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.sampling.generate import generate

DIGITS = tuple(str(digit) for digit in range(10))


def codes(networks) -> torch.Tensor:
    """What a pair of networks draws."""
    drawn = generate(networks.transformer, networks.tokenizer, [3], return_indices=True)
    return torch.cat(drawn.indices, dim=1)


def test_run_folders_checkpoints_and_portable_folders_hold_the_same(trained, tmp_path):
    VARPipeline.from_checkpoint(trained).save_pretrained(tmp_path / "portable")
    shutil.copy(trained / "var" / "best.ckpt", tmp_path / "odd.pth")
    expected = codes(load_networks(trained))
    for path in (trained, trained / "var", str(tmp_path / "odd.pth"), tmp_path / "portable"):
        found = read_networks(path)
        assert found.class_names == DIGITS and found.path.exists()
        assert torch.equal(codes(found), expected)
        assert not any(p.requires_grad for p in found.transformer.parameters())


def test_published_files_hold_what_their_tensors_say(published, tmp_path):
    shutil.copy(published / "var_d16.pth", tmp_path / "a.ckpt")
    found = read_networks(tmp_path / "a.ckpt")
    assert found.tokenizer is None and found.transformer.num_classes == 10
    assert found.class_names == DIGITS and found.path == tmp_path / "a.ckpt"
    found = read_networks(published / "vae_ch160v4096z32.pth", patch_nums=[1, 3])
    assert found.transformer is None and found.class_names == ()
    assert found.tokenizer.schedule.patch_nums == [1, 3]


def test_a_checkpoint_of_the_authors_trainer_holds_both(tmp_path):
    parts = {"var_wo_ddp": transformer_state([1, 3, 4]), "vae_local": tokenizer_state()}
    torch.save({"trainer": parts, "epoch": 3}, tmp_path / "ar-ckpt.pth")
    found = read_networks(tmp_path / "ar-ckpt.pth")
    assert codes(found).shape == (1, 26)
    other = read_networks(tmp_path / "ar-ckpt.pth", patch_nums=[1, 2])
    assert other.transformer.schedule.patch_nums == [1, 3, 4]  # that of its positions
    assert other.tokenizer.schedule.patch_nums == [1, 2]


def test_a_published_model_is_read_by_its_name(published):
    found = read_published("var_d16", published)
    assert found.path == published / "var_d16.pth" and found.class_names == DIGITS
    assert codes(found).shape == (1, 55)


def test_classes_without_names_are_numbered(tmp_path):
    VARPipeline(tiny_transformer(), tiny_tokenizer()).save_pretrained(tmp_path)
    assert read_networks(tmp_path).class_names == ("0", "1", "2")


def test_a_run_folder_is_searched_in_the_order_of_the_stages(trained):
    assert read_networks(trained).path.parent.name == "var"
    found = read_networks(trained, stages=("tokenizer", "var"))
    assert found.path.parent.name == "tokenizer" and found.transformer is None


def test_the_tokenizer_is_that_of_the_first_place_that_is_given(trained, published, tmp_path):
    shape = [1, 2]
    published = published / "vae_ch160v4096z32.pth"
    first = read_tokenizer({"a": None, "b": trained, "c": published}, shape)
    assert first.fingerprint() == load_networks(trained).tokenizer.fingerprint()
    assert read_tokenizer({"a": "", "b": published}, shape).schedule.patch_nums == shape
    with pytest.raises(ValueError, match="needs a trained tokenizer; set tokenizer_ckpt=PATH"):
        read_tokenizer({"tokenizer_ckpt": None, "init_from": None}, shape)


def refusal(path, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_networks(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_what_holds_no_networks_is_refused_with_the_key(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "nowhere")
    assert refusal(tmp_path / "nowhere", key="init_from").endswith(
        f"(init_from={tmp_path}/nowhere)"
    )
    assert "var/best.ckpt" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert "damaged" in refusal(tmp_path / "notes.txt")
    for content in ({}, [1], {"state_dict": {}}, {"conv.weight": torch.zeros(2)}):
        torch.save(content, tmp_path / "foreign.pth")
        assert "is not a checkpoint of var-exp, and no published" in refusal(
            tmp_path / "foreign.pth"
        )
    info = describe("tokenizer", {"tokenizer": tiny_tokenizer()}, [])
    torch.save({KEY: info | {"format": 1}, "state_dict": {}}, tmp_path / "old.ckpt")
    assert "has format 1" in refusal(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="expected averaged, raw or null, got 'best'"):
        read_networks(tmp_path, "best")


def test_a_folder_may_be_called_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    VARPipeline(tiny_transformer(), tiny_tokenizer()).save_pretrained("2024")
    assert read_networks(2024).transformer is not None  # as Hydra hands over ckpt=2024
