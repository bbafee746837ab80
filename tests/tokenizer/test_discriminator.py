"""Discriminators judge each image alone, in float32, and train only what they should."""

import pytest
import torch
from torch import nn

from tests.tokenizer.test_dino import published_state
from var_exp.tokenizer.discriminator import (
    DinoDiscriminator,
    PatchGAN,
    SpectralNorm,
    leading_vectors,
)


@pytest.fixture
def dino_file(tmp_path):
    torch.save(published_state(), tmp_path / "dino.pth")
    return str(tmp_path / "dino.pth")


@pytest.fixture(params=["patchgan", "dino"])
def discriminator(request, dino_file):
    if request.param == "patchgan":
        return PatchGAN(width=8, num_layers=2)
    return DinoDiscriminator(dino_file, image_size=16, depths=(0, 2), kernel_size=5)


def test_every_image_is_judged_alone_and_always_the_same(discriminator):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    logits = discriminator(images)
    one_by_one = torch.cat([discriminator(image) for image in images.split(1)])
    torch.testing.assert_close(one_by_one, logits, rtol=1e-4, atol=1e-5)
    assert logits.std(dim=0).min() > 0


def test_logits_are_float32_under_autocast_too(discriminator):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(images.bfloat16())
    assert logits.dtype == torch.float32
    expected = discriminator(images)
    assert (logits - expected).abs().max() < 0.2 * expected.abs().max()


def test_gradients_reach_the_image_and_all_that_is_trained(discriminator):
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    discriminator(images).square().sum().backward()
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(p.grad.abs().max() > 0 for p in discriminator.parameters())


def test_a_step_along_the_gradient_tells_two_kinds_of_images_apart(discriminator):
    images = torch.cat([torch.rand(4, 3, 16, 16) - 1, torch.rand(4, 3, 16, 16)])
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4).unsqueeze(1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for _ in range(20):
        loss = (1 - sign * discriminator(images)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (sign * discriminator(images)).mean() > 0.3


# -- PatchGAN -----------------------------------------------------------------------------


def test_the_patchgan_of_pix2pix_has_30_by_30_patches_at_256_pixels():
    network = PatchGAN(width=1)
    assert network(torch.rand(1, 1, 256, 256)).shape == (1, 900)
    convs = [m for m in PatchGAN().modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_patchgan_takes_the_smallest_image_that_leaves_a_patch(num_layers):
    network, side = PatchGAN(width=4, num_layers=num_layers), 3 * 2**num_layers
    assert network(torch.rand(2, 3, side, side)).shape == (2, 1)
    with pytest.raises(ValueError, match=f"at least {side} .*discriminator.num_layers"):
        network(torch.rand(2, 3, side, side - 1))


def test_a_patchgan_without_layers_is_refused():
    with pytest.raises(ValueError, match="num_layers: expected a number >= 1, got 0"):
        PatchGAN(num_layers=0)


# -- DINO ---------------------------------------------------------------------------------


def test_a_head_judges_every_patch_at_its_depth(dino_file):
    network = DinoDiscriminator(dino_file, image_size=20, depths=(0, 1, 2))
    assert network(torch.rand(2, 1, 16, 12)).shape == (2, 3 * 25)
    assert len(network.heads) == 3


def test_only_heads_are_trained_and_saved(dino_file):
    network = DinoDiscriminator(dino_file, image_size=16, depths=(0, 2))
    assert {name.split(".")[0] for name in network.state_dict()} == {"heads"}
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"heads"}
    network(torch.rand(1, 3, 16, 16, requires_grad=True)).sum().backward()
    assert all(p.grad is None for p in network.features.network.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 18}, r"multiple of the 4 pixels of a patch, got 18 \(.*image_size\)"),
        ({"image_size": 0}, "image_size: expected a number > 0, got 0"),
        ({"depths": (0, 3)}, r"must lie in 0..2, got \[0, 3\] \(.*depths\)"),
        ({"depths": ()}, r"got \[\] \(.*depths\)"),
    ],
)
def test_what_does_not_fit_the_transformer_is_refused(dino_file, wrong, message):
    with pytest.raises(ValueError, match=message):
        DinoDiscriminator(dino_file, **{"image_size": 16, "depths": (0, 2)} | wrong)


def test_without_dinos_file_the_message_says_what_to_do(tmp_path):
    with pytest.raises(ValueError) as error:
        DinoDiscriminator(str(tmp_path / "none.pth"))
    message = str(error.value)
    assert "none.pth is missing" in message and "dino_deitsmall16_pretrain.pth" in message
    assert "adversary.discriminator.weights=PATH" in message and "adversary=patchgan" in message


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="linear.pth holds something else"):
        DinoDiscriminator(str(tmp_path / "linear.pth"))


# -- spectral norm ------------------------------------------------------------------------


def test_weights_of_heads_have_largest_singular_value_one(dino_file):
    network = DinoDiscriminator(dino_file, image_size=16, depths=(0,))
    convs = [m for m in network.modules() if isinstance(m, nn.Conv1d)]
    assert len(convs) == 3
    for conv in convs:
        conv.parametrizations.weight.original.data *= 7
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert 1 - 1e-5 <= largest <= 1.03


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (1, 6)])
def test_leading_vectors_are_those_of_the_decomposition(shape):
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values[1:] *= 0.8  # a clear lead
    u, v = leading_vectors(left * values @ right)
    assert abs(u @ left[:, 0]) > 0.999 and abs(v @ right[0]) > 0.999
    torch.testing.assert_close(u @ (left * values @ right) @ v, values[0], rtol=1e-3, atol=0)


def test_the_gradient_through_the_spectral_norm_is_that_of_the_singular_value():
    weight = torch.randn(4, 3, 2, dtype=torch.float64)
    weight[0] *= 3  # a clear lead
    direction = torch.randn_like(weight)

    def exact(w):
        return w / torch.linalg.matrix_norm(w.flatten(1), 2)

    expected, found = (
        torch.autograd.functional.vjp(f, weight, direction)[1] for f in (exact, SpectralNorm())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
