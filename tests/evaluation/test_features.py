"""Feature networks: what they let in, and how weights are told apart."""

import pytest
import torch
from torch import nn

from var_exp.evaluation import FeatureNetwork, Features


class Pixels(FeatureNetwork):
    """The features of an image are its pixels. Notes what it was given."""

    def __init__(self, scale=1.0):
        super().__init__("pixels", 4)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.linear = nn.Linear(4, 3, bias=False)
        nn.init.ones_(self.linear.weight)
        self.register_buffer("steps", torch.tensor(0))

    def extract(self, pixels):
        self.seen = pixels
        features = self.scale * pixels.flatten(1).double()
        return Features(features, self.linear(features.float()))


def test_it_sees_8_bit_pixels_rounded_by_one_rule():
    network = Pixels()
    levels = torch.tensor([-0.4, 0.4, 0.6, 255.4]).reshape(1, 1, 2, 2)
    network(levels / 255)
    assert network.seen.dtype == torch.uint8
    assert network.seen.flatten().tolist() == [0, 0, 1, 255]
    network(network.seen)
    assert network.seen.flatten().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("inference", [True, False])
def test_features_are_float32_and_take_no_gradients(inference):
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        seen = Pixels(scale=1.001)(torch.full((2, 1, 2, 2), 200, dtype=torch.uint8))
    assert seen.features.dtype == seen.logits.dtype == torch.float32
    torch.testing.assert_close(seen.features, torch.full((2, 4), 200.2))
    torch.testing.assert_close(seen.logits, torch.full((2, 3), 800.8))
    assert not seen.features.requires_grad and not seen.logits.requires_grad


@pytest.mark.gpu
def test_it_brings_images_to_its_own_device():
    network, images = Pixels().cuda(), torch.rand(2, 1, 2, 2)
    assert network(images).features.device.type == "cuda"
    assert torch.equal(network(images).features.cpu(), Pixels()(images).features)
    assert network.fingerprint == Pixels().fingerprint


def test_a_network_without_weights_is_on_the_cpu():
    assert FeatureNetwork("none", 1).device.type == "cpu"


@pytest.mark.parametrize(
    "images", [torch.rand(2, 1, 2, 2) * 2 - 1, torch.full((2, 1, 2, 2), 255.0)]
)
def test_images_of_another_range_are_refused(images):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got \["):
        Pixels()(images)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_numbers_are_refused(value):
    images = torch.rand(2, 1, 2, 2)
    images[1, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*(nan|inf)"):
        Pixels()(images)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(1, 2, 2),
        torch.rand(2, 2, 2, 2),
        torch.rand(0, 1, 2, 2),
        torch.zeros(2, 1, 2, 2, dtype=torch.int64),
    ],
)
def test_images_of_another_shape_or_type_are_refused(images):
    with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\).* got torch\..*\("):
        Pixels()(images)


def test_it_never_leaves_evaluation_mode():
    network = Pixels()
    holder = nn.ModuleList([network]).train()
    assert holder.training
    assert not any(module.training for module in network.eval().train().modules())


def test_a_fingerprint_tells_any_change_of_weights():
    first, same, scaled, counted, shaped = (Pixels() for _ in range(5))
    with torch.no_grad():
        scaled.scale.add_(1e-7)
        counted.steps.add_(1)
        shaped.linear.weight = nn.Parameter(shaped.linear.weight.reshape(4, 3))
    assert first.fingerprint == same.fingerprint
    others = {n.fingerprint for n in (first, scaled, counted, shaped)}
    assert len(others) == 4
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in others)


def test_a_network_knows_no_classes_unless_it_says_so():
    assert Pixels().classify is None
    assert Pixels().about == {}
