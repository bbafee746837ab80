"""The tokenizer's losses are what their names say."""

import math

import pytest
import torch
from torch import nn

from var_exp.tokenizer.losses import ReconstructionLoss, edge_difference, psnr
from var_exp.tokenizer.vqvae import Reconstruction


def pair():
    return torch.rand(2, 3, 4, 5) * 2 - 1, torch.rand(2, 3, 4, 5) * 2 - 1


def test_the_edge_term_compares_neighbouring_differences_pixel_by_pixel():
    a, b = pair()
    down, across = [], []
    for i in range(4):
        for j in range(5):
            if i:
                mine, theirs = a[:, :, i, j] - a[:, :, i - 1, j], b[:, :, i, j] - b[:, :, i - 1, j]
                down.append((mine - theirs).abs())
            if j:
                mine, theirs = a[:, :, i, j] - a[:, :, i, j - 1], b[:, :, i, j] - b[:, :, i, j - 1]
                across.append((mine - theirs).abs())
    expected = (torch.stack(down).mean() + torch.stack(across).mean()) / 2
    torch.testing.assert_close(edge_difference(a, b), expected)


def test_the_edge_term_is_blind_to_brightness_and_sees_an_outline():
    a, _ = pair()
    assert edge_difference(a + 0.3, a) < 1e-6
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    torch.testing.assert_close(edge_difference(step, torch.zeros_like(step)), torch.tensor(1 / 6))


def test_the_loss_is_the_weighted_sum_of_its_named_terms():
    a, b = pair()
    output = Reconstruction(a, [], torch.tensor(0.7))
    terms = ReconstructionLoss(l1=0.2, l2=1.5, edge=0.3, codebook=0.5)(output, b)
    assert set(terms) == {"l1", "l2", "edge", "codebook", "loss"}
    torch.testing.assert_close(terms["l1"], (a - b).abs().mean())
    torch.testing.assert_close(terms["l2"], (a - b).square().mean())
    torch.testing.assert_close(terms["edge"], edge_difference(a, b))
    expected = 0.2 * terms["l1"] + 1.5 * terms["l2"] + 0.3 * terms["edge"] + 0.5 * 0.7
    torch.testing.assert_close(terms["loss"], expected)


def test_a_term_of_weight_zero_does_not_move_the_loss():
    a, b = pair()
    loss = ReconstructionLoss(l1=0, l2=1, edge=0, codebook=0)
    terms = loss(Reconstruction(a, [], torch.tensor(9.0)), b)
    torch.testing.assert_close(terms["loss"], (a - b).square().mean())


@pytest.mark.parametrize(("error", "decibel"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0)])
def test_psnr_of_a_constant_error_is_known(error, decibel):
    a = torch.zeros(2, 1, 3, 3)
    torch.testing.assert_close(psnr(a, a + error), torch.tensor([decibel] * 2), atol=1e-4, rtol=0)


def test_psnr_is_of_each_image_alone_and_finite_for_equal_ones():
    a, b = pair()
    values = psnr(a, b)
    for i in range(2):
        pixels = zip(a[i].flatten().tolist(), b[i].flatten().tolist(), strict=True)
        mse = sum((x - y) ** 2 for x, y in pixels) / 60
        assert abs(values[i] - 10 * math.log10(4 / mse)) < 1e-4
    assert torch.isfinite(psnr(a, a)).all() and psnr(a, a).min() > 100


class MeanColour(nn.Module):
    """A perceptual distance that is easy to compute."""

    def forward(self, a, b):
        return (a.mean(dim=(1, 2, 3)) - b.mean(dim=(1, 2, 3))).abs()


def test_the_perceptual_term_is_the_weighted_mean_of_distances():
    a, b = pair()
    loss = ReconstructionLoss(l1=0, l2=1, edge=0, lpips=0.5, codebook=0, perceptual=MeanColour())
    terms = loss(Reconstruction(a, [], torch.tensor(0.7)), b)
    torch.testing.assert_close(terms["lpips"], MeanColour()(a, b).mean())
    torch.testing.assert_close(terms["loss"], terms["l2"] + 0.5 * terms["lpips"])


def test_a_perceptual_term_of_weight_zero_is_not_computed():
    a, b = pair()
    loss = ReconstructionLoss(lpips=0, perceptual=nn.Linear(1, 1))  # cannot take two arguments
    assert "lpips" not in loss(Reconstruction(a, [], torch.tensor(0.7)), b)


def test_a_perceptual_term_without_a_network_is_refused():
    with pytest.raises(ValueError, match=r"weight 0.5 needs a network.*loss.perceptual"):
        ReconstructionLoss(lpips=0.5)
