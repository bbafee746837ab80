"""Published networks are read with care, and stay out of the way of training."""

import copy
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from var_exp.io.pretrained import Frozen, Published, as_rgb, fill, load

LINEAR = Published("part", "a layer", "https://example.org/layer-0123abcd.pth", "a.key", "leave it")


def assemble(state):
    with torch.device("meta"):
        return fill(nn.Linear(2, 3), state)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    def no_network(*_args, **_others):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "layer.pth"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    return path


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.eyes = nn.Linear(2, 1), Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))

    def forward(self, x):
        return self.head(self.eyes(x))


def test_a_frozen_network_is_no_part_of_its_owner():
    owner = Owner()
    assert set(owner.state_dict()) == set(dict(owner.named_parameters()))
    assert set(owner.state_dict()) == {"head.weight", "head.bias"}
    owner.train().double()
    assert next(owner.eyes.network.parameters()).dtype == torch.float32
    assert not owner.eyes.network[1].training


def test_a_frozen_network_passes_gradients_on_and_takes_none():
    owner, x = Owner(), torch.randn(4, 2, requires_grad=True)
    owner(x).sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in owner.eyes.network.parameters())


def test_copies_of_the_owner_share_a_frozen_network():
    owner = Owner()
    other = copy.deepcopy(owner)
    assert other.eyes is owner.eyes and other.head is not owner.head


def test_a_frozen_network_follows_its_input_and_can_serve_training_after_inference():
    owner = Owner()
    with torch.inference_mode():
        owner.eyes(torch.zeros(1, 2, device="meta"))
    weight = owner.eyes.network[0].weight
    assert weight.device.type == "meta" and not weight.is_inference()


def test_a_published_file_is_read_from_its_path(file):
    expected = torch.load(file, weights_only=True)
    torch.testing.assert_close(dict(load(LINEAR, file, assemble).state_dict()), dict(expected))


def test_weights_of_half_precision_become_float32(file):
    torch.save(nn.Linear(2, 3).half().state_dict(), file)
    assert load(LINEAR, str(file), assemble).weight.dtype == torch.float32


def refusal(path) -> str:
    with pytest.raises(ValueError) as error:
        load(LINEAR, path, assemble)
    message = str(error.value)
    assert "\n" not in message and "layer-0123abcd.pth" in message
    assert "(a.key=PATH)" in message and message.endswith("or leave it")
    return message


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "none.pth"
    assert refusal(path).startswith(f"part: {path} is missing; put a layer")


def test_without_a_path_and_a_network_the_place_in_the_cache_is_named(tmp_path, capfd):
    place = tmp_path / "torch" / "hub" / "checkpoints" / "layer-0123abcd.pth"
    assert f"{place} is missing and could not be fetched (URLError)" in refusal(None)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_fetched_once_and_checked_by_the_hash_in_its_name(tmp_path, monkeypatch, file):
    calls = []

    def fetch(url, place, hash_prefix, progress):
        calls.append((url, hash_prefix, progress))
        Path(place).write_bytes(file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first, second = load(LINEAR, None, assemble), load(LINEAR, None, assemble)
    assert calls == [(LINEAR.url, "0123abcd", False)]
    torch.testing.assert_close(first.weight, second.weight)


def test_a_truncated_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:-200])
    assert "is damaged" in refusal(file)


def test_a_file_that_holds_code_is_refused(file):
    torch.save(Path, file)
    assert "holds code" in refusal(file)


def test_a_file_of_something_else_is_refused(file):
    torch.save({"epoch": 3, "model": nn.Linear(2, 3).state_dict()}, file)
    assert "holds something else (not a state dict)" in refusal(file)
    torch.save(nn.Linear(2, 4).state_dict(), file)
    assert "the shape of weight is (4, 2), expected (3, 2)" in refusal(file)
    torch.save(nn.Linear(2, 3, bias=False).state_dict(), file)
    assert "the shape of bias is None, expected (3,)" in refusal(file)
    torch.save(nn.Linear(2, 3).state_dict() | {"more": torch.zeros(1)}, file)
    assert "the shape of more is (1,), expected None" in refusal(file)


def test_grey_images_are_repeated_and_colours_kept():
    grey, colour = torch.rand(2, 1, 3, 4), torch.rand(2, 3, 3, 4)
    torch.testing.assert_close(as_rgb(grey), torch.cat([grey] * 3, dim=1))
    torch.testing.assert_close(as_rgb(colour), colour)
