"""Resizes are torch's own as matrices, and phis serve the scales as in the published code."""

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny import tiny_quantizer
from var_exp.tokenizer.resize import area_matrix, assign_phis, bicubic_matrix


@pytest.mark.parametrize(
    ("num_scales", "expected"),
    [
        (1, [0]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 2, 3]),
        (6, [0, 0, 1, 2, 3, 3]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_four_phis_serve_the_scales_as_in_the_published_code(num_scales, expected):
    assert assign_phis(num_scales, 4) == expected
    assert tiny_quantizer(list(range(1, num_scales + 1)), num_phi=4).phi_of_scale == expected


@pytest.mark.parametrize("num_scales", range(1, 15))
def test_one_phi_serves_all_scales_and_k_phis_one_each(num_scales):
    assert assign_phis(num_scales, 1) == [0] * num_scales
    assert assign_phis(num_scales, num_scales) == list(range(num_scales))


@pytest.mark.parametrize("source", [1, 2, 5, 13, 16])
@pytest.mark.parametrize("target", [1, 2, 3, 5, 8, 13, 16])
def test_the_resizes_are_torchs_area_and_bicubic_as_matrices(source, target):
    x = torch.randn(2, 3, source, source, dtype=torch.float64)
    for make, mode in ((area_matrix, "area"), (bicubic_matrix, "bicubic")):
        if mode == "area" and target > source:
            continue
        matrix = make(source, target).double()
        assert matrix.shape == (target, source)
        expected = F.interpolate(x, size=(target, target), mode=mode)
        torch.testing.assert_close(matrix @ x @ matrix.T, expected, atol=1e-6, rtol=0)
