"""The authors' files in and out: every name, every shape, every byte, and the same numbers."""

import json
import os

import pytest
import torch
import torch.nn.functional as F

from helpers.golden_weights import GOLDEN, golden_arrays
from helpers.published import (
    COMPUTED,
    DESCRIPTION,
    assert_same_bytes,
    load_tokenizer,
    load_transformer,
    meta_state,
    phi_names,
    reference_codes,
    reference_logits,
    tokenizer_shapes,
    tokenizer_state,
    transformer_shapes,
    transformer_state,
)
from helpers.tiny import tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.official import load_official, official_state_dict, save_official
from var_exp.sampling.generate import generate, guided_logits

MANIFESTS = json.loads((GOLDEN / "released_checkpoints.json").read_text())
PARAMETERS = {
    "var_d16.pth": 310_283_520,
    "var_d20.pth": 600_917_136,
    "var_d24.pth": 1_033_399_360,
    "var_d30.pth": 2_010_020_356,
    "var_d36.pth": 2_353_893_904,
}
TRANSFORMERS = {
    "golden": {},
    "shared_adaln": {"shared": True},
    "no_qk_norm": {"qk_norm": False},
    "shared_no_qk_norm": {"shared": True, "qk_norm": False},
    "four_heads": {"heads": 4},
    "1235": {"patch_nums": [1, 2, 3, 5]},
    "134": {"patch_nums": [1, 3, 4]},
    "starts_at_2": {"patch_nums": [2, 3, 4]},
    "single_scale": {"patch_nums": [3]},
    "small": {"depth": 1, "width": 64, "heads": 1, "classes": 1, "vocab_size": 7, "code_dim": 3},
}
# Scales, spelling of the phis, and which of them serves each scale.
TOKENIZERS = {
    "golden": ([1, 2, 3, 4, 5], "groups", [0, 1, 2, 2, 3]),
    "one_phi": ([1, 2, 3, 4, 5], "all", [0] * 5),
    "phi_for_each": ([1, 2, 3, 4, 5], "each", range(5)),
    "1235": ([1, 2, 3, 5], "groups", range(4)),
    "1235_phi_for_each": ([1, 2, 3, 5], "each", range(4)),
    "134": ([1, 3, 4], "groups", [0, 2, 3]),
    "134_phi_for_each": ([1, 3, 4], "each", range(3)),
    "six": ([1, 2, 3, 4, 5, 6], "groups", [0, 0, 1, 2, 3, 3]),
}
each_transformer = pytest.mark.parametrize("name", TRANSFORMERS)
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


# -- names and shapes ---------------------------------------------------------------------


def test_the_names_that_these_tests_write_are_those_of_the_published_files():
    for part, ours in (("var", transformer_shapes()), ("vae", tokenizer_shapes())):
        golden = [(entry["key"], tuple(entry["shape"])) for entry in DESCRIPTION[part]]
        assert list(ours.items()) == golden
    for name in ("var_d16.pth", "var_d36.pth"):
        c = MANIFESTS[name]["config"]
        sizes = (c["patch_nums"], c["depth"], c["embed_dim"], c["num_heads"], c["num_classes"])
        ours = transformer_shapes(*sizes, 4096, 32, shared=c["shared_aln"])
        theirs = [(key, tuple(shape)) for key, shape in MANIFESTS[name]["tensors"].items()]
        assert list(ours.items()) == theirs


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_released_file_maps_both_ways_with_nothing_missing_and_nothing_left_over(name):
    state = meta_state(MANIFESTS[name]["tensors"])
    c = MANIFESTS[name]["config"]
    kind = "transformer" if name.startswith("var") else "tokenizer"
    network = getattr(load_official(**{kind: state}), kind)
    parameters = [t for key, t in state.items() if key.rpartition(".")[2] not in COMPUTED]
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in parameters)
    if kind == "transformer":
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
        assert (network.width, network.num_heads) == (c["embed_dim"], c["num_heads"])
        assert len(network.blocks) == c["depth"]
    assert network.schedule.patch_nums == c["patch_nums"]
    ours = official_state_dict(network)
    assert list(ours) == list(state)
    assert all((ours[k].shape, ours[k].dtype) == (t.shape, t.dtype) for k, t in state.items())


# -- numbers ------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_files_compute_the_golden_arrays(tmp_path):
    for part, state in (("var", transformer_state()), ("vae", tokenizer_state())):
        torch.save(state, tmp_path / part)
    transformer, tokenizer = load_official(tmp_path / "var", str(tmp_path / "vae"))
    golden = golden_arrays()
    codes = golden["indices"].long()
    indices = tokenizer.encode(golden["image"])
    assert torch.equal(torch.cat(indices, dim=1), codes)
    inputs = tokenizer.quantizer.teacher_forcing_input(indices)
    logits = transformer(inputs, golden["label"])
    loss = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    guided, chosen = [], []
    for _, step in guided_logits(transformer, tokenizer, golden["label"], 3.0, chosen):
        guided.append(step)
        chosen.append(step.argmax(dim=-1))
    assert torch.equal(torch.cat(chosen, 1), golden["greedy_cfg3_indices"].long())
    for name, ours in {
        "feature": tokenizer.features(golden["image"]),
        "reconstruction_per_scale": torch.stack(tokenizer.decode(indices, per_scale=True), 1),
        "reconstruction": tokenizer.decode(indices),
        "teacher_forcing_input": inputs,
        "logits": logits,
        "cross_entropy_per_token": loss,
        "greedy_cfg3_guided_logits": torch.cat(guided, dim=1),
        "greedy_cfg3_image": generate(
            transformer, tokenizer, golden["label"], cfg_scale=3.0, top_k=1
        ),
    }.items():
        torch.testing.assert_close(ours, golden[name], atol=1e-4, rtol=0, msg=name)


@each_transformer
@torch.no_grad()
def test_a_transformer_computes_what_its_file_says(name):
    sizes = TRANSFORMERS[name]
    state = transformer_state(**sizes)
    network = load_transformer(state, num_heads=sizes.get("heads", 2))
    expected_scales = sizes.get("patch_nums", [1, 2, 3, 4, 5])
    assert network.schedule.patch_nums == expected_scales
    length = network.schedule.seq_len - network.schedule.num_tokens[0]
    inputs = torch.randn(2, length, network.code_dim)
    label = torch.tensor([0, network.num_classes])
    expected = reference_logits(state, sizes.get("heads", 2), inputs, label)
    torch.testing.assert_close(network(inputs, label), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cosine", [False, True])
@each_tokenizer
def test_a_tokenizer_computes_what_its_file_says(name, cosine):
    scales, phis, serves = TOKENIZERS[name]
    state = tokenizer_state(scales, phis)
    quantizer = load_tokenizer(state, scales, cosine_codes=cosine).quantizer
    features = torch.randn(2, 8, scales[-1], scales[-1])
    names = phi_names(phis, len(scales))
    indices, f_hat = reference_codes(state, scales, [names[i] for i in serves], features, cosine)
    ours = quantizer.encode(features)
    assert all(torch.equal(a, b) for a, b in zip(ours, indices, strict=True))
    torch.testing.assert_close(list(quantizer.partial_sums(ours))[-1], f_hat, atol=1e-4, rtol=0)


def test_cosine_codes_choose_other_codes():
    state, features = tokenizer_state(), torch.randn(2, 8, 5, 5)
    cosine = load_tokenizer(state, cosine_codes=True).quantizer.encode(features)
    euclidean = load_tokenizer(state).quantizer.encode(features)
    assert not torch.equal(torch.cat(cosine, 1), torch.cat(euclidean, 1))


# -- round trips --------------------------------------------------------------------------


@each_transformer
def test_a_transformer_goes_out_as_it_came_in(name, tmp_path):
    sizes = TRANSFORMERS[name]
    state = transformer_state(**sizes)
    network = load_transformer(state)
    assert_same_bytes(official_state_dict(network), state)
    files = save_official(tmp_path / "new", transformer=network)
    assert files.transformer.name == f"var_d{sizes.get('depth', 2)}.pth"
    assert files.tokenizer is None
    assert_same_bytes(torch.load(files.transformer, weights_only=True), state)


@each_tokenizer
def test_a_tokenizer_goes_out_as_it_came_in(name, tmp_path):
    scales, phis, _ = TOKENIZERS[name]
    state = tokenizer_state(scales, phis)
    network = load_tokenizer(state, scales)
    assert_same_bytes(official_state_dict(network), state)
    files = save_official(tmp_path, tokenizer=network)
    assert files.tokenizer == tmp_path / "vae_ch32v64z8.pth"
    assert_same_bytes(torch.load(files.tokenizer, weights_only=True), state)
    assert os.listdir(tmp_path) == [files.tokenizer.name]


def test_saved_files_load_again_and_replace_older_ones(tmp_path):
    networks = load_official(transformer_state(), tokenizer_state())
    for _ in range(2):
        again = load_official(*save_official(tmp_path, *networks))
    images = [generate(*pair, [0, 3], top_k=5) for pair in (networks, again)]
    assert torch.equal(*images)
    assert sorted(os.listdir(tmp_path)) == ["vae_ch32v64z8.pth", "var_d2.pth"]


def test_half_precision_is_widened_and_comes_back_from_a_half_precision_network():
    state = {n: t.half() if t.is_floating_point() else t for n, t in transformer_state().items()}
    network = load_transformer(state)
    assert network.position.dtype == torch.float32
    assert_same_bytes(official_state_dict(network.half()), state)


def test_networks_of_ours_become_published_ones():
    """Without a file behind them: phis are named by their number, no code was counted."""
    for num_phi, phis in ((1, "all"), (4, "groups"), (5, "each")):
        for ema in (False, True):
            tokenizer = tiny_tokenizer(tiny_quantizer(ema=ema, num_phi=num_phi))
            state = official_state_dict(tokenizer)
            assert {f"{phi}.weight" for phi in phi_names(phis, 5)} <= state.keys()
            assert torch.equal(state["quantize.ema_vocab_hit_SV"], torch.zeros(5, 16))
            again = load_tokenizer(state)
            assert again.fingerprint() == tokenizer.fingerprint()
    four = official_state_dict(tiny_tokenizer(tiny_quantizer([1, 2, 3, 4], num_phi=4)))
    assert "quantize.quant_resi.qresi_ls.3.bias" in four  # the published form comes first
    for block in ("adaln", "shared_adaln"):
        transformer = tiny_transformer(block=block)
        again = load_transformer(official_state_dict(transformer))
        inputs = torch.randn(2, 54, 4)
        assert torch.equal(again(inputs), transformer(inputs))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: tiny_transformer(block="gpt2"), "transformer.block"),
        (lambda: tiny_transformer(mlp="swiglu"), r"no SwiGLU, only .* \(transformer.mlp\)"),
        (lambda: tiny_transformer(norm="rms"), r"no RMSNorm, only .* \(transformer.norm\)"),
        (lambda: tiny_transformer(rope=True), r"no rotary position .* \(transformer.rope\)"),
        (lambda: tiny_transformer(qk_norm=False), "softmax_scale 1 without QK-norm, only 0.25"),
        (lambda: tiny_tokenizer(tiny_quantizer(per_scale=True)), "codebook for each scale"),
        (lambda: tiny_tokenizer(tiny_quantizer(phi_ratio=0.25)), "phi_ratio 0.25, only 0.5"),
        (lambda: torch.nn.Linear(1, 1), "expected a VAR or a VQVAE, got Linear"),
    ],
)
def test_a_network_that_a_file_cannot_describe_is_refused_and_nothing_written(
    network, named, tmp_path
):
    with pytest.raises(ValueError, match=named):
        save_official(tmp_path / "new", tiny_transformer(), network())
    assert not os.listdir(tmp_path)


def test_a_weight_without_a_published_place_is_refused_and_named(transformer):
    transformer.blocks[1].mlp.fc3 = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no place for blocks.1.mlp.fc3.weight"):
        official_state_dict(transformer)
