"""LPIPS is the published distance, and leaves no trace in training."""

import copy
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from var_exp.tokenizer.lpips import LPIPS


@pytest.fixture(scope="module")
def vgg16():
    """The features of a VGG16 with random weights that keep the scale of what they see."""
    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in features.parameters():
            std = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
            parameter.normal_(std=std, generator=generator)
    return features


@pytest.fixture(scope="module")
def file(vgg16, tmp_path_factory):
    """As torchvision publishes it, but for the size of the classifier."""
    state = {f"features.{name}": tensor for name, tensor in vgg16.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture
def lpips(file):
    return LPIPS(str(file))


def pair(side=32, channels=3):
    return torch.rand(2, channels, side, side) * 2 - 1, torch.rand(2, channels, side, side) * 2 - 1


def test_distances_and_their_gradients_are_torchmetrics_own(lpips, vgg16, monkeypatch):
    a, b = pair()
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: vgg16)
    theirs = torchmetrics_lpips._LPIPS(net="vgg", pnet_rand=True)
    a.requires_grad_()
    expected = theirs(a, b).flatten()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), a)
    distances = lpips(a, b)
    (gradient,) = torch.autograd.grad(distances.sum(), a)
    assert expected.min() > 0.05
    torch.testing.assert_close(distances, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_only_the_image_gets_a_gradient(lpips):
    a, b = pair(side=16)
    lpips(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None for p in lpips.network.network.parameters())


def test_equal_images_have_distance_zero_and_a_finite_gradient(lpips):
    a = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = lpips(a, torch.zeros_like(a))
    distance.sum().backward()
    assert distance.item() == 0 and a.grad.isfinite().all()


def test_grey_images_count_as_colourless_ones(lpips):
    a, b = pair(side=16, channels=1)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_it_is_no_part_of_checkpoints_optimizers_or_copies(lpips):
    assert not lpips.state_dict() and not list(lpips.parameters()) and not list(lpips.buffers())
    a, b = pair(side=16)
    torch.testing.assert_close(copy.deepcopy(lpips)(a, b), lpips(a, b))


def test_under_autocast_distances_are_float32_and_nearly_the_same(lpips):
    a, b = pair(side=16)
    expected = lpips(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        distances = lpips(a.bfloat16(), b)
        assert lpips(b, b).abs().max() == 0
        seen = [list(lpips.network.network.see(x)) for x in (a.bfloat16(), b)]
    assert distances.dtype == torch.float32
    by_hand = torch.zeros(2)
    for x, y, weight in zip(*seen, lpips.network.network.channel_weights, strict=True):
        assert x.dtype == y.dtype == torch.bfloat16
        x, y = (t.float() / t.float().norm(dim=1, keepdim=True) for t in (x, y))
        by_hand += ((x - y) ** 2 * weight).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(distances, by_hand)
    torch.testing.assert_close(distances, expected, rtol=0.05, atol=0)


def test_16_pixels_a_side_are_enough_and_15_are_not(lpips):
    assert lpips(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)) > 0
    with pytest.raises(ValueError, match=r"at least 16 .* \(16, 15\) .*loss.lpips=0"):
        lpips(torch.zeros(1, 3, 16, 15), torch.zeros(1, 3, 16, 15))


def test_without_the_file_the_message_says_where_to_put_it_and_how_to_do_without(
    tmp_path, monkeypatch
):
    def no_network(*_args, **_others):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError) as error:
        LPIPS()
    message = str(error.value)
    assert f"{tmp_path}/hub/checkpoints/vgg16-397923af.pth is missing" in message
    assert "model.tokenizer.loss.perceptual.weights=PATH" in message
    assert "model.tokenizer.loss.lpips=0" in message and "\n" not in message


def test_a_file_of_another_network_is_refused(tmp_path):
    with torch.device("meta"):
        other = torchvision.models.vgg11().features
    state = {f"features.{k}": torch.zeros(v.shape) for k, v in other.state_dict().items()}
    torch.save(state, tmp_path / "vgg11.pth")
    with pytest.raises(ValueError, match="vgg11.pth holds something else .*torchvision's VGG16"):
        LPIPS(str(tmp_path / "vgg11.pth"))


def test_a_truncated_file_is_refused(file, tmp_path):
    damaged = tmp_path / "vgg16.pth"
    damaged.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="vgg16.pth is damaged"):
        LPIPS(str(damaged))
