"""What a published file may look like, what it need not say, and what is refused."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from helpers.golden_weights import GOLDEN
from helpers.published import (
    COMPUTED,
    assert_same_bytes,
    load_tokenizer,
    load_transformer,
    meta_state,
    tokenizer_state,
    transformer_state,
)
from var_exp.checkpoint.official import load_official, official_state_dict

MANIFESTS = json.loads((GOLDEN / "released_checkpoints.json").read_text())
LEVELS = transformer_state()["lvl_1L"]
LOADS = ((load_transformer, transformer_state()), (load_tokenizer, tokenizer_state()))


# -- forms of a source --------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_taken_off(prefix):
    for load, state in LOADS:
        network = load({prefix + name: tensor for name, tensor in state.items()})
        assert_same_bytes(official_state_dict(network), state)


def test_parts_that_were_compiled_alone_are_read_too():
    state = transformer_state()
    compiled = {name.replace("attn.", "attn._orig_mod."): t for name, t in state.items()}
    assert compiled.keys() != state.keys()
    assert_same_bytes(official_state_dict(load_transformer(compiled)), state)


def test_checkpoints_of_the_authors_trainer_are_read(tmp_path):
    parts = {
        "config": {"patch_nums": (1, 2, 3, 4, 5), "prog_it": 3},
        "var_wo_ddp": transformer_state(),
        "vae_local": tokenizer_state(),
        "var_opt": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    }
    content = {"epoch": 7, "iter": 0, "trainer": parts, "args": {"depth": 2}}
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(content, path)
    for source in (path, content, parts):
        transformer, tokenizer = load_official(source, source)
        assert_same_bytes(official_state_dict(transformer), parts["var_wo_ddp"])
        assert_same_bytes(official_state_dict(tokenizer), parts["vae_local"])
    del parts["vae_local"]
    with pytest.raises(ValueError, match="expected a state dict, or .* with 'vae_local'"):
        load_official(tokenizer=content)


def test_files_of_the_older_format_are_read(tmp_path):
    state = transformer_state()
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_same_bytes(official_state_dict(load_transformer(tmp_path / "old")), state)


def test_networks_are_frozen_own_their_weights_and_do_not_start_anew():
    state = tokenizer_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    transformer, tokenizer = load_official(transformer_state(), state)
    for network in (transformer, tokenizer):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        assert tokenizer.quantizer.started
        tokenizer.train()(torch.randn(1, 3, 80, 80))
        assert_same_bytes(official_state_dict(tokenizer), before)
        for parameter in tokenizer.parameters():
            parameter.add_(1)
    assert_same_bytes(state, before)


def test_computed_tensors_may_be_missing_and_are_written_all_the_same():
    for load, state in LOADS:
        lean = {n: t for n, t in state.items() if n.rpartition(".")[2] not in COMPUTED}
        ours = official_state_dict(load(lean, patch_nums=[1, 2, 3, 4, 5]))
        hits = {n: torch.zeros_like(t) for n, t in state.items() if "ema_vocab_hit" in n}
        assert_same_bytes(ours, state | hits)


# -- what the files do not say ------------------------------------------------------------


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_a_transformers_scales_come_from_its_file_or_the_published_ones_or_the_caller():
    state = without(transformer_state([1, 2, 3, 5]), "lvl_1L")
    with pytest.raises(ValueError, match=r"which 4 scales its 39 tokens have.*patch_nums=\[...\]"):
        load_transformer(state)
    assert load_transformer(state, patch_nums=(1, 2, 3, 5)).schedule.patch_nums == [1, 2, 3, 5]
    released = without(meta_state(MANIFESTS["var_d36.pth"]["tensors"]), "lvl_1L")
    assert load_transformer(released).schedule.patch_nums[-1] == 32


def test_a_tokenizer_takes_the_transformers_scales():
    """As the published tokenizer does for 256, 512 and 1024 pixels, whatever codes it counts."""
    published = meta_state(MANIFESTS["vae_ch160v4096z32.pth"]["tensors"])
    assert load_official(tokenizer=published).tokenizer.schedule.seq_len == 680
    d36 = meta_state(MANIFESTS["var_d36.pth"]["tensors"])
    assert load_official(d36, published).tokenizer.schedule.seq_len == 2240
    state = tokenizer_state()
    tokenizer = load_official(transformer_state([1, 3, 4]), state).tokenizer
    assert tokenizer.schedule.patch_nums == [1, 3, 4]
    assert_same_bytes(official_state_dict(tokenizer), state)


def test_a_tokenizer_without_a_known_schedule_asks_for_it():
    with pytest.raises(ValueError, match=r"counts codes of 5 scales .*expected patch_nums=\[...\]"):
        load_official(tokenizer=tokenizer_state())


def test_heads_without_qk_norm_have_64_channels_unless_told():
    state = transformer_state(qk_norm=False)
    assert load_transformer(state).num_heads == 2
    assert load_transformer(state, num_heads=4).num_heads == 4


# -- what is refused ----------------------------------------------------------------------


def refusal(**sources):
    """The one line that loading such a source gives."""
    with pytest.raises(ValueError) as error:
        load_official(**sources)
    message = str(error.value)
    assert message.startswith("official: ") and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("pos_1LC", None, "pos_1LC is missing, it should have the shape (1, L, C)"),
        ("blocks.1.attn.q_bias", None, "q_bias is missing, it should have the shape (128,)"),
        ("class_emb.weight", torch.zeros(9), "the shape (9,), it should have (classes + 1, C)"),
        ("head.bias", torch.zeros(63), "head.bias has the shape (63,), it should have (64,)"),
        ("lvl_embed.weight", torch.zeros(4, 128), "(4, 128), it should have (5, 128)"),
        ("lvl_1L", torch.zeros(1, 55).long(), "does not say growing square scales"),
        ("lvl_1L", torch.arange(55)[None], "expected patch_nums=[...]"),
        ("lvl_1L", 4 - LEVELS, "does not say growing square scales"),
        ("lvl_1L", LEVELS.flip(1), "holds other values"),
        ("lvl_1L", LEVELS.float(), "holds torch.float32, it should hold torch.int64"),
        ("attn_bias_for_masking", torch.zeros(1, 1, 55, 55), "holds other values"),
        ("attn_bias_for_masking", torch.zeros(1, 1, 54, 54), "it should have (1, 1, 55, 55)"),
        ("blocks.0.attn.zero_k_bias", torch.ones(128), "holds other values"),
        ("blocks.1.attn.scale_mul_1H11", torch.ones(1, 4, 1, 1), "it should have (1, 2, 1, 1)"),
        ("head.weight", torch.zeros(64, 128, dtype=torch.int8), "holds torch.int8"),
        ("rope.table", torch.zeros(3), "rope.table has the shape (3,) and no place"),
    ],
)
def test_a_transformer_that_does_not_fit_says_which_tensor(name, tensor, expected):
    state = transformer_state()
    bad = without(state, name) if tensor is None else state | {name: tensor}
    message = refusal(transformer=bad)
    assert name in message and expected in message


def test_what_else_does_not_fit_is_counted():
    state = without(transformer_state(), "head.bias", "head_nm.ada_lin.1.bias")
    assert refusal(transformer=state | {"x": torch.zeros(1)}).endswith("(and 2 more)")
    assert "divisible" in refusal(transformer=transformer_state(heads=3))


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("quantize.embedding.weight", None, "is missing, it should have the shape (V, D)"),
        ("encoder.conv_in.weight", torch.zeros(3), "it should have (ch, channels, 3, 3)"),
        ("encoder.down.2.block.0.conv1.weight", torch.zeros(48, 32, 3, 3), "(a multiple of 32, "),
        ("quantize.ema_vocab_hit_SV", torch.zeros(5, 63), "it should have (5, 64)"),
        ("decoder.up.0.block.2.conv2.bias", None, "is missing, it should have the shape (32,)"),
        ("quant_conv.weight", torch.zeros(8, 8, 1, 1), "it should have (8, 8, 3, 3)"),
        ("quantize.quant_resi.qresi_ls.4.bias", torch.zeros(8), "qresi_ls.4.weight is missing"),
    ],
)
def test_a_tokenizer_that_does_not_fit_says_which_tensor(name, tensor, expected):
    state = tokenizer_state()
    bad = without(state, name) if tensor is None else state | {name: tensor}
    message = refusal(tokenizer=bad, patch_nums=[1, 2, 3, 4, 5])
    assert expected in message
    assert name.rpartition(".")[0] in message


def test_positions_that_do_not_fit_the_asked_scales_are_refused():
    message = refusal(transformer=transformer_state(), patch_nums=[1, 2, 3, 4])
    assert "pos_1LC has the shape (1, 55, 128), it should have (1, 30, 128)" in message
    message = refusal(tokenizer=tokenizer_state(phis="each"), patch_nums=[1, 2, 4])
    assert "one phi for each of 5 scales" in message and "[1, 2, 4]" in message


def test_two_networks_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="one vocab_size, got 7 and 64"):
        load_official(transformer_state(vocab_size=7), tokenizer_state())


def test_files_in_each_others_place_are_refused_and_recognised(tmp_path):
    for part, state in (("var", transformer_state()), ("vae", tokenizer_state())):
        torch.save(state, tmp_path / part)
    assert "it holds a tokenizer" in refusal(transformer=tmp_path / "vae")
    assert "it holds a transformer" in refusal(tokenizer=tmp_path / "var")


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {"a": torch.zeros(2)}}, [1, 2], 3, {"trainer": {}}, {1: torch.zeros(2)}],
)
def test_a_foreign_file_is_refused_by_name(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    for kind in ("transformer", "tokenizer"):
        message = refusal(**{kind: tmp_path / "x.pth"})
        assert repr(str(tmp_path / "x.pth")) in message and "is not a published" in message


def test_another_networks_weights_are_refused_with_what_was_looked_for(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    assert "pos_1LC is missing" in refusal(transformer=tmp_path / "resnet.pth")
    assert "quantize.embedding.weight is missing" in refusal(tokenizer=tmp_path / "resnet.pth")


class Smuggler:
    def __reduce__(self):
        return os.mkdir, ("smuggled",)


def test_code_in_a_file_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(transformer_state() | {"extra": Smuggler()}, tmp_path / "x.pth")
    message = refusal(transformer=tmp_path / "x.pth")
    assert "mkdir" in message and "x.pth" in message and "weights_only" not in message
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Smuggler()))
    refusal(transformer=tmp_path / "x.pth")
    assert not (tmp_path / "smuggled").exists()


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(transformer_state(), path)
    whole = path.read_bytes()
    for share in np.linspace(0, 0.999, 25):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "x.pth': damaged" in refusal(transformer=path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    message = refusal(tokenizer=tmp_path / "nothing.pth")
    assert "nothing.pth': there is no such file" in message
    assert "damaged" in refusal(tokenizer=tmp_path)
