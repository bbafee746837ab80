"""A warm start copies what two networks have in common, fits what belongs to places and classes,
and refuses by name what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from helpers.command import QUICK, Finished, composed, run
from helpers.golden_weights import GOLDEN
from helpers.published import (
    load_tokenizer,
    load_transformer,
    meta_state,
    tokenizer_state,
    transformer_state,
)
from helpers.tiny import SCALES, stir, tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.checkpoint.warm_start import warm_start, warm_start_from, warm_start_tokenizer
from var_exp.tokenizer.resize import bicubic_matrix

MANIFESTS = json.loads((GOLDEN / "released_checkpoints.json").read_text())
FITTED = ("class_embedding", "level_embedding", "position", "start_position")


def copy_of(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(ours: dict, theirs: dict, but: tuple[str, ...] = ()) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert name.startswith(but or ("?",)) or torch.equal(ours[name], tensor), name


def refusal(start, network: nn.Module, source: nn.Module) -> str:
    """The one line that says why not; then nothing was changed."""
    before = copy_of(network.state_dict())
    with pytest.raises(ValueError) as error:
        start(network, source)
    assert_equal(network.state_dict(), before)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


# -- the transformer ----------------------------------------------------------------------


@pytest.mark.parametrize("block", ["gpt2", "adaln", "shared_adaln"])
def test_between_equals_everything_is_copied(block):
    source, network = tiny_transformer(block=block), tiny_transformer(block=block, dropout=0.5)
    warm_start(network, source)
    assert_equal(network.state_dict(), source.state_dict())
    inputs, labels = torch.randn(2, 54, 4), torch.tensor([0, 3])
    assert torch.equal(network(inputs, labels), source(inputs, labels))


@pytest.mark.parametrize("num_classes", [0, 2, 7])
def test_other_classes_get_a_fresh_table_but_for_no_class(num_classes):
    source, network = tiny_transformer(), tiny_transformer(num_classes=num_classes)
    fresh = network.class_embedding.weight.clone()
    warm_start(network, source)
    table = network.class_embedding.weight
    assert torch.equal(table[:-1], fresh[:-1])
    assert torch.equal(table[-1], source.class_embedding.weight[-1])
    assert_equal(network.state_dict(), source.state_dict(), ("class_embedding",))
    inputs = torch.randn(2, 54, 4)
    assert torch.equal(network(inputs), source(inputs))  # without a class


@pytest.mark.parametrize(
    "old, new, nearest",
    [
        (SCALES, [1, 2, 4], [0, 1, 3]),
        (SCALES, [1, 2, 3, 5, 8, 11], [0, 1, 2, 4, 4, 4]),
        ([1, 2, 4, 8], [1, 3, 6], [0, 1, 2]),  # ties go to the coarser
        ([2, 4], [1, 2, 3, 4], [0, 0, 0, 1]),
        ([1, 2], [3, 4], [1, 1]),
        ([[1, 2], [2, 4], [3, 6]], [[1, 1], [2, 3], [3, 6], [4, 7]], [0, 1, 2, 2]),
    ],
)
def test_another_schedule_takes_places_from_the_nearest_scale_resized(old, new, nearest):
    source, network = tiny_transformer(old), tiny_transformer(new)
    warm_start(network, source)
    assert_equal(
        {k: v for k, v in network.state_dict().items() if not k.startswith(FITTED[1:])},
        {k: v for k, v in source.state_dict().items() if not k.startswith(FITTED[1:])},
    )
    for k, j in enumerate(nearest):
        assert torch.equal(network.level_embedding.weight[k], source.level_embedding.weight[j])
        ours = network.position[0, network.schedule.slices[k]]
        theirs = source.position[0, source.schedule.slices[j]]
        check_resized(ours, network.schedule.sizes[k], theirs, source.schedule.sizes[j])
    first = network.schedule.sizes[0], source.schedule.sizes[0]
    check_resized(network.start_position[0], first[0], source.start_position[0], first[1])


def check_resized(ours, new, theirs, old) -> None:
    """Rows (h w, C) of a grid: equal where the sizes are, else resized one axis at a time."""
    if new == old:
        assert torch.equal(ours, theirs)
        return
    rows, columns = (bicubic_matrix(old[axis], new[axis]) for axis in range(2))
    grid = theirs.unflatten(0, old)  # (h, w, C)
    expected = torch.einsum("ah,bw,hwc->abc", rows, columns, grid).flatten(0, 1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"width": 32}, ["width 32 instead of 16", "(transformer.width)"]),
        ({"depth": 3}, ["depth 3 instead of 2", "(transformer.depth)"]),
        ({"block": "gpt2"}, ["block gpt2 instead of adaln", "(transformer.block)"]),
        ({"num_heads": 4}, ["num_heads 4 instead of 2", "(transformer.num_heads)"]),
        ({"mlp_ratio": 2.0}, ["mlp_ratio 2.0 instead of 4.0", "(transformer.mlp_ratio)"]),
        ({"qk_norm": False}, ["qk_norm False instead of True", "(transformer.qk_norm)"]),
        ({"norm": "rms"}, ["norm rms instead of layer", "(transformer.norm)"]),
        ({"rope": True}, ["rope True instead of False", "(transformer.rope)"]),
        ({"vocab_size": 9}, ["vocab_size 9 instead of 16", "tokenizer_ckpt"]),
        ({"code_dim": 5}, ["code_dim 5 instead of 4", "tokenizer_ckpt"]),
        ({"width": 32, "depth": 1}, ["transformer.width", "transformer.depth"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_transformer_that_differs_in_more_is_refused_by_name(other, named):
    message = refusal(warm_start, tiny_transformer(), tiny_transformer(**other))
    assert all(what in message for what in named)
    assert message.count("instead of") == len(other)


def test_the_softmax_scale_matters_where_there_is_no_qk_norm():
    warm_start(tiny_transformer(softmax_scale=0.5), tiny_transformer())
    pair = (tiny_transformer(qk_norm=False, softmax_scale=s) for s in (1.0, 0.25))
    assert "softmax_scale 0.25 instead of 1.0" in refusal(warm_start, *pair)


def test_a_published_transformer_starts_one_whose_width_follows_from_its_depth():
    source = load_transformer(transformer_state())  # depth 2, heads of 64
    network = tiny_transformer([1, 2, 4], vocab_size=64, code_dim=8, width=None, num_heads=None)
    warm_start(network, source)
    assert torch.equal(network.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert network.position.requires_grad


# -- the tokenizer ------------------------------------------------------------------------

BOOKS = {
    "gradient": {},
    "ema": {"ema": True},
    "per_scale": {"ema": True, "per_scale": True},
    "bitwise": {"implicit": "bitwise"},
    "fsq": {"implicit": "fsq", "per_scale": True},
}


def tokenizer_of(channels: int = 3, **others):
    return stir_all(tiny_tokenizer(tiny_quantizer(**others), channels))


@torch.no_grad()
def stir_all(network: nn.Module) -> nn.Module:
    """Stirred parameters, and buffers of some training."""
    stir(network)
    for name, buffer in network.named_buffers():
        if "average" in name:
            buffer.copy_(buffer + torch.rand_like(buffer))
    network.quantizer.started.fill_(True)
    return network


@pytest.mark.parametrize("book", BOOKS)
def test_between_equal_tokenizers_everything_is_copied(book):
    source = tokenizer_of(**BOOKS[book])
    network = tiny_tokenizer(tiny_quantizer(**BOOKS[book], beta=0.5, quantizer_dropout=0.1))
    warm_start_tokenizer(network, source)
    assert_equal(network.state_dict(), source.state_dict())
    assert network.quantizer.started and network.fingerprint() == source.fingerprint()


def test_the_schedule_may_be_another_where_the_scales_share_their_codes():
    source, network = tokenizer_of(), tokenizer_of(patch_nums=[1, 3, 6])
    warm_start_tokenizer(network, source)
    assert_equal(network.state_dict(), source.state_dict())
    assert [len(codes[0]) for codes in network.encode(torch.rand(1, 3, 12, 12))] == [1, 9, 36]
    pair = tokenizer_of(per_scale=True, patch_nums=[1, 2, 5]), tokenizer_of(per_scale=True)
    message = refusal(warm_start_tokenizer, *pair)
    assert "[1, 2, 3, 4, 5], not [1, 2, 5]" in message and "(scales.patch_nums)" in message


@pytest.mark.parametrize("start", ["data", "kmeans"])
def test_averages_start_from_the_codes_of_a_source_without_them(start):
    """The first batch moves each code towards its vectors, by the decay, and no further."""
    source = tokenizer_of()
    network = tiny_tokenizer(tiny_quantizer(ema=True))
    codebook = network.quantizer.codebook(0)
    codebook.start_from = start
    warm_start_tokenizer(network, source)
    assert torch.equal(codebook.weight, source.quantizer.codebook(0).weight)
    features = 100 + torch.randn(4, 4, 5, 5)  # far from every code
    network.train().quantizer(features)
    assert network.quantizer.started
    mean = codebook.average_sum / codebook.average_count.unsqueeze(1)
    torch.testing.assert_close(codebook.weight, mean)
    chosen = torch.cat(source.quantizer.encode(features), 1).unique()
    stay = [code for code in range(16) if code not in chosen]
    assert stay
    torch.testing.assert_close(codebook.weight[stay], source.quantizer.codebook(0).weight[stay])


@pytest.mark.parametrize("implicit", ["bitwise", "fsq"])
def test_grids_do_not_start_from_data_either(implicit):
    source = tokenizer_of(implicit=implicit)
    network = tiny_tokenizer(tiny_quantizer(implicit=implicit))
    network.quantizer.codebook(0).start_from = "data"
    warm_start_tokenizer(network, source)
    network.train().quantizer(100 * torch.randn(4, 4, 5, 5))
    ours, theirs = (n.quantizer.codebook(0).log_magnitude for n in (network, source))
    assert torch.equal(ours, theirs)


def test_codes_that_were_averages_can_be_learned_by_gradient():
    source, network = tokenizer_of(ema=True), tiny_tokenizer()
    warm_start_tokenizer(network, source)
    assert network.fingerprint() == source.fingerprint()
    assert network.quantizer.codebook(0).weight.requires_grad


@pytest.mark.parametrize(
    "ours, theirs, named",
    [
        ({}, {"cosine": True}, "cosine True instead of False (tokenizer.quantizer.codebook.cosine"),
        ({"cosine": True}, {"ema": True}, "(tokenizer.quantizer.codebook.cosine)"),
        ({}, {"vocab_size": 9}, "9 instead of 16 (tokenizer.quantizer.codebook.vocab_size)"),
        ({}, {"per_scale": True}, "per_scale True instead of False"),
        ({}, {"num_phi": 5}, "num_phi 5 instead of 4 (tokenizer.quantizer.num_phi)"),
        ({}, {"phi_ratio": 0.2}, "phi_ratio 0.2 instead of 0.5 (tokenizer.quantizer.phi_ratio)"),
        ({}, {"channels": 1}, "in_channels 1 instead of 3 (data)"),
        ({"implicit": "fsq"}, {}, "a table of codes instead of var_exp.tokenizer.implicit.FSQ"),
        ({"implicit": "fsq"}, {"implicit": "bitwise"}, "(tokenizer.quantizer.codebook._target_)"),
    ],
)
def test_a_tokenizer_that_differs_in_more_is_refused_by_name(ours, theirs, named):
    assert named in refusal(warm_start_tokenizer, tokenizer_of(**ours), tokenizer_of(**theirs))


def test_a_published_tokenizer_is_refused_where_codes_are_cosine_or_sizes_differ():
    source = load_tokenizer(tokenizer_state())
    cosine = load_tokenizer(tokenizer_state(), cosine_codes=True)
    assert "(tokenizer.quantizer.codebook.cosine)" in refusal(warm_start_tokenizer, cosine, source)
    message = refusal(warm_start_tokenizer, tokenizer_of(), source)
    assert "width 32 instead of 8 (tokenizer.encoder.width)" in message
    assert "[1, 1, 2, 2, 4] instead of [1, 2] (tokenizer.encoder.multipliers)" in message
    assert message.endswith(" more)")


@pytest.mark.parametrize(
    "released, chosen",
    [
        ("var_d16.pth", ["transformer=d16", "scales=var_256"]),
        ("var_d36.pth", ["transformer=d36", "scales=var_512"]),
        ("vae_ch160v4096z32.pth", ["tokenizer=vae_ch160v4096z32", "scales=var_256"]),
    ],
)
def test_the_configured_networks_are_those_of_the_released_files(released, chosen):
    """Names and shapes alone, without memory; for other classes."""
    cfg, state = composed("train", *chosen), meta_state(MANIFESTS[released]["tensors"])
    with torch.device("meta"):
        if released.startswith("vae"):
            network = instantiate(cfg.tokenizer, _convert_="all")
            warm_start_tokenizer(network, load_tokenizer(state, cfg.scales.patch_nums))
        else:
            sizes = {"vocab_size": 4096, "code_dim": 32, "num_classes": 7}
            network = instantiate(cfg.transformer, **sizes, _convert_="all")
            warm_start(network, load_transformer(state))


# -- from a path --------------------------------------------------------------------------


def test_a_path_starts_the_network_that_it_holds_and_says_so(published, capsys):
    network = tiny_transformer([1, 2], vocab_size=64, code_dim=8, width=128)
    path = published / "var_d16.pth"
    warm_start_from(path, network, ["var"])
    assert capsys.readouterr().out == f"init_from: the transformer starts from {path}\n"
    source = load_transformer(transformer_state())
    assert torch.equal(network.head.linear.weight, source.head.linear.weight)


def test_a_network_that_the_path_lacks_stays_as_it_is_if_the_other_is_there(published, capsys):
    network = tiny_transformer()
    before = copy_of(network.state_dict())
    warm_start_from(None, network, ["var"])
    warm_start_from(published / "vae_ch160v4096z32.pth", network, ["tokenizer", "var"])
    assert_equal(network.state_dict(), before)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="expected a transformer.* with a tokenizer only"):
        warm_start_from(published / "vae_ch160v4096z32.pth", network, ["var"])
    with pytest.raises(ValueError, match="expected a tokenizer.* with a transformer only"):
        warm_start_from(published / "var_d16.pth", tiny_tokenizer(), ["tokenizer"])


# -- the program --------------------------------------------------------------------------

GOLDEN_SIZES = ["transformer=d16", "transformer.depth=2", "transformer.width=128"]
STILL = [f"model.{stage}.optimizer.lr=0" for stage in ("tokenizer", "var")]


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder of images of three classes."""
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 3)
    for name in ("apples", "pears", "plums"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (48, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def trained_on(pictures: Path, run_dir: Path, *overrides: str) -> Finished:
    data = ["data=image_folder", f"data.root={pictures}", "data.image_size=48"]
    where = [f"run_dir={run_dir}", f"runs_dir={run_dir.parent}", "datamodule.num_workers=0"]
    short = ["scales.patch_nums=[1,2,3]", "model.var.num_batches=1"]
    done = run("train", *QUICK, *data, *where, *short, *overrides)
    assert done.code == 0, done.err
    return done


def test_a_published_transformer_is_fine_tuned_on_own_classes_and_scales(
    published, pictures, tmp_path
):
    run_dir = tmp_path / "run"
    options = ["stages=[var]", *GOLDEN_SIZES, f"init_from={published}/var_d16.pth"]
    options += [f"tokenizer_ckpt={published}/vae_ch160v4096z32.pth", STILL[1]]
    done = trained_on(pictures, run_dir, *options)
    (line,) = [line for line in done.out.splitlines() if line.startswith("init_from")]
    assert line.endswith(f"the transformer starts from {published}/var_d16.pth")
    networks, source = load_networks(run_dir), load_transformer(transformer_state())
    assert networks.info["class_names"] == ["apples", "pears", "plums"]
    assert networks.transformer.schedule.patch_nums == [1, 2, 3]
    expected = tiny_transformer([1, 2, 3], vocab_size=64, code_dim=8, width=128)
    warm_start(expected, source)  # nothing was learned at a rate of 0
    ours, theirs = networks.transformer.state_dict(), expected.state_dict()
    assert torch.equal(ours["class_embedding.weight"][3], theirs["class_embedding.weight"][3])
    for name in theirs.keys() - {"class_embedding.weight"}:
        torch.testing.assert_close(ours[name], theirs[name])
    tokenizer = load_tokenizer(tokenizer_state(), [1, 2, 3])
    assert networks.tokenizer.fingerprint() == tokenizer.fingerprint()


@pytest.fixture
def again(trained, tmp_path) -> list[str]:
    """A command that trains the digits for a batch, at a rate of 0, with the judge of `trained`."""
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    shutil.copy(trained / "evaluation" / "classifier.pt", tmp_path / "run" / "evaluation")
    short = [f"model.{stage}.num_batches=1" for stage in ("tokenizer", "var")]
    return [*QUICK, *short, *STILL, f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}"]


def test_both_stages_start_from_a_run_of_ours_and_a_finished_run_is_left_as_it_is(
    again, trained, tmp_path
):
    # Codes learn without a rate.
    again += [f"init_from={trained}", "tokenizer.quantizer.codebook.decay=0.99999"]
    done = run("train", *again)
    assert done.code == 0, done.err
    assert done.out.count("init_from: the") == 2
    before, after = load_networks(trained), load_networks(tmp_path / "run")
    for ours, theirs in zip(after[:2], before[:2], strict=True):
        expected = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, expected[name], atol=1e-3, rtol=0)
    done = run("train", *again)
    assert done.code == 0 and "batch" not in done.err, done.err
    last = load_networks(tmp_path / "run")
    assert_equal(last.transformer.state_dict(), after.transformer.state_dict())


def test_the_tokenizer_of_a_path_serves_the_transformer_that_starts_from_it(
    again, trained, tmp_path
):
    VARPipeline.from_checkpoint(trained).save_pretrained(tmp_path / "portable")
    done = run("train", *again, "stages=[var]", f"init_from={tmp_path}/portable")
    assert done.code == 0, done.err
    ours, theirs = load_networks(tmp_path / "run"), load_networks(trained)
    assert ours.info["tokenizer_fingerprint"] == theirs.info["tokenizer_fingerprint"]
    assert_equal(ours.transformer.state_dict(), theirs.transformer.state_dict())
