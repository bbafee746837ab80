"""A folder alone draws the same images, without the training frameworks, and a bad one says why."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.sampling.generate import generate

NAMES = ["cat", "dog", "owl"]


@pytest.fixture
def pipeline(transformer, tokenizer):
    return VARPipeline(transformer, tokenizer, NAMES)


@pytest.fixture
def folder(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# -- images -------------------------------------------------------------------------------


def test_it_draws_what_generate_draws(pipeline, transformer, tokenizer):
    settings = {"seed": 3, "cfg_scale": 2.0, "top_k": 9, "top_p": 0.9, "temperature": 0.8}
    images = pipeline([0, 2, 1], **settings)
    assert images.shape == (3, 3, 10, 10)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, generate(transformer, tokenizer, [0, 2, 1], **settings))
    for name, value in {"seed": 4, "cfg_scale": 9.0, "top_k": 1, "top_p": 0.1}.items():
        assert not torch.equal(images, pipeline([0, 2, 1], **settings | {name: value}))


def test_labels_take_turns_until_there_are_enough_samples(pipeline):
    expected = pipeline([2, 0, 2, 0, 2])
    assert torch.equal(pipeline([2, 0], num_samples=5), expected)
    assert torch.equal(pipeline(torch.tensor([2, 0]), num_samples=5), expected)
    assert torch.equal(pipeline([2, 0, 2, 0, 2], num_samples=3), pipeline([2, 0, 2]))
    assert torch.equal(pipeline(1, num_samples=2), pipeline([1, 1]))


def test_no_labels_are_no_class(pipeline):
    assert torch.equal(pipeline(num_samples=2), pipeline([3, 3]))
    assert len(pipeline()) == 1


def test_the_batch_size_changes_no_image(pipeline):
    whole = pipeline([0, 1], num_samples=7)
    torch.testing.assert_close(pipeline([0, 1], num_samples=7, batch_size=3), whole)
    assert len({image.numpy().tobytes() for image in whole}) == 7


@pytest.mark.parametrize(
    ("labels", "arguments", "named"),
    [
        ([], {}, "got 0 labels"),
        ([0], {"num_samples": 0}, "num_samples=0"),
        ([0], {"batch_size": 0}, "batch_size"),
        ([4], {}, "expected classes in 0..2"),
        ([-1], {}, "got -1"),
        ([0.5], {}, "whole numbers"),
        ([0], {"temperature": 0}, "temperature"),
    ],
)
def test_a_mistake_is_named(pipeline, labels, arguments, named):
    with pytest.raises(ValueError, match=named):
        pipeline(labels, **arguments)


def test_networks_that_do_not_fit_each_other_are_refused(transformer):
    with pytest.raises(ValueError, match="one vocab_size, got 16 and 17"):
        VARPipeline(transformer, tiny_tokenizer(tiny_quantizer(vocab_size=17)))


# -- the folder ---------------------------------------------------------------------------


def test_a_folder_alone_draws_the_same_images(folder, pipeline):
    loaded = VARPipeline.from_pretrained(str(folder))
    assert torch.equal(loaded([0, 1], seed=5), pipeline([0, 1], seed=5))
    assert loaded.class_names == tuple(NAMES)
    for network in (loaded.transformer, loaded.tokenizer):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_folder_holds_one_file_of_weights_for_each_network_and_plain_text(folder):
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files == {
        "config.json",
        "transformer/model.safetensors",
        "tokenizer/model.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["networks"]["transformer"]["patch_nums"] == [1, 2, 3, 4, 5]
    assert "position" in load_file(folder / "transformer" / "model.safetensors")


@pytest.mark.parametrize("block", ["gpt2", "shared_adaln"])
def test_networks_of_any_kind_come_back(tmp_path, block):
    scales = [[1, 2], [2, 4]]
    quantizer = tiny_quantizer(scales, ema=True, per_scale=True, cosine=True, num_phi=2)
    networks = tiny_transformer(scales, block, False), tiny_tokenizer(quantizer)
    VARPipeline(*networks).save_pretrained(tmp_path)
    loaded = VARPipeline.from_pretrained(tmp_path)
    for ours, theirs in zip((loaded.transformer, loaded.tokenizer), networks, strict=True):
        assert ours.config == theirs.config
        state = theirs.state_dict()
        assert all(torch.equal(v, state.pop(k)) for k, v in ours.state_dict().items())
        assert not state


def test_a_folder_may_be_written_over(folder, tokenizer):
    other = VARPipeline(tiny_transformer(depth=1), tokenizer)
    other.save_pretrained(folder)
    loaded = VARPipeline.from_pretrained(folder)
    assert len(loaded.transformer.blocks) == 1 and loaded.class_names == ()
    assert torch.equal(loaded([0]), other([0]))


def test_a_save_that_breaks_off_leaves_no_folder_that_loads(folder, pipeline, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("var_exp.checkpoint.pipeline.save_file", full)
    with pytest.raises(OSError):
        pipeline.save_pretrained(folder)
    with pytest.raises(ValueError, match="config.json' is missing"):
        VARPipeline.from_pretrained(folder)


def test_it_needs_neither_lightning_nor_hydra(folder):
    code = (
        "import sys; from var_exp.checkpoint.pipeline import VARPipeline; "
        "print(VARPipeline.from_pretrained(sys.argv[1])([0], num_samples=2).shape); "
        "assert not {'lightning', 'hydra', 'omegaconf', 'wandb'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "torch.Size([2, 3, 10, 10])\n"


def test_a_run_folder_becomes_a_pipeline(trained, tmp_path):
    pipeline = VARPipeline.from_checkpoint(trained)
    networks = load_networks(trained)
    assert pipeline.class_names == tuple(str(digit) for digit in range(10))
    images = generate(networks.transformer, networks.tokenizer, [3, 7])
    assert torch.equal(pipeline([3, 7]), images)
    raw = VARPipeline.from_checkpoint(trained / "var" / "best.ckpt", weights="raw")
    assert not torch.equal(raw.transformer.position, pipeline.transformer.position)


# -- what is refused ----------------------------------------------------------------------


def refusal(folder):
    """The one line that loading such a folder gives."""
    with pytest.raises(ValueError) as error:
        VARPipeline.from_pretrained(folder)
    message = str(error.value)
    assert message.startswith("pipeline: ") and str(folder) in message
    assert "\n" not in message and len(message) < 1000
    return message


def test_a_checkpoint_without_a_transformer_is_refused(trained):
    with pytest.raises(ValueError, match="tokenizer' holds a tokenizer only"):
        VARPipeline.from_checkpoint(trained / "tokenizer")


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_missing_folder_or_file_is_refused(folder, tmp_path):
    assert "config.json' is missing" in refusal(tmp_path / "nothing")
    (folder / "tokenizer" / "model.safetensors").unlink()
    assert "tokenizer/model.safetensors' is missing" in refusal(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b'{"format": 1'])
def test_a_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    assert "config.json' is damaged" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 2}', '{"model_type": "gpt2"}'])
def test_another_format_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "expected 1" in refusal(folder)


def test_weights_cut_anywhere_are_refused(folder):
    path = folder / "transformer" / "model.safetensors"
    whole = path.read_bytes()
    for share in np.linspace(0, 0.999, 25):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "model.safetensors' is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "tensors", [{"extra": torch.zeros(1)}, {"position": torch.zeros(1, 7, 16)}, {"position": None}]
)
def test_weights_that_do_not_fit_are_refused_with_the_tensor(folder, tensors):
    path = folder / "transformer" / "model.safetensors"
    state = load_file(path) | tensors
    save_file({name: t for name, t in state.items() if t is not None}, path)
    message = refusal(folder)
    assert "does not fit" in message and next(iter(tensors)) in message


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["networks"].pop("tokenizer"), "tokenizer"),
        (lambda c: c.pop("networks"), "networks"),
        (lambda c: c["networks"]["transformer"].update(wings=2), "wings"),
        (lambda c: c["networks"]["transformer"].update(_target_="os.mkdir"), "os.mkdir"),
        (lambda c: c["networks"].update(transformer="mine"), ""),
    ],
)
def test_a_configuration_that_describes_no_network_of_ours_is_refused(folder, edit, named):
    edit_config(folder, edit)
    message = refusal(folder)
    assert "does not fit" in message and named in message


def test_networks_in_each_others_place_are_refused(folder):
    def swap(config):
        networks = config["networks"]
        networks["tokenizer"], networks["transformer"] = networks.values()

    (folder / "tokenizer").rename(folder / "other")
    (folder / "transformer").rename(folder / "tokenizer")
    (folder / "other").rename(folder / "transformer")
    edit_config(folder, swap)
    assert "has a VQVAE as its transformer, expected a VAR" in refusal(folder)
