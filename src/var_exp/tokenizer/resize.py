"""Resize maps between the latent grid and the grids of the scales, and assign a phi to each scale.

VAR (arXiv 2404.02905, section 3.2) resizes to a scale by area averaging, and back by bicubic
interpolation and a convolution, phi, which several scales share. Both resizes are linear in each
axis, so each is two small matrices per scale.

    K scales, (h_k, w_k) sides of scale k, (H, W) latent grid, D channels
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.scales import ScaleSchedule


class Resize(nn.Module):
    """Resize maps between the latent grid and scale k; one of the grid's size is not resized."""

    def __init__(self, schedule: ScaleSchedule):
        super().__init__()
        self.schedule, latent = schedule, schedule.latent_size
        for k, size in enumerate(schedule.sizes):
            for axis in range(2):
                down = area_matrix(latent[axis], size[axis])
                up = bicubic_matrix(size[axis], latent[axis])
                self.register_buffer(f"down_{k}_{axis}", down, persistent=False)
                self.register_buffer(f"up_{k}_{axis}", up, persistent=False)

    def down(self, x: Tensor, k: int) -> Tensor:
        """(B, D, H, W) -> (B, D, h_k, w_k), by area."""
        return self._apply_matrices(x, "down", k)

    def up(self, x: Tensor, k: int) -> Tensor:
        """(B, D, h_k, w_k) -> (B, D, H, W), bicubic."""
        return self._apply_matrices(x, "up", k)

    def _apply_matrices(self, x: Tensor, direction: str, k: int) -> Tensor:
        if self.schedule.sizes[k] == self.schedule.latent_size:
            return x
        rows = getattr(self, f"{direction}_{k}_0")  # (out_h, in_h)
        columns = getattr(self, f"{direction}_{k}_1")  # (out_w, in_w)
        return rows @ x @ columns.T  # (B, D, out_h, out_w)


def area_matrix(source: int, target: int) -> Tensor:
    """PyTorch's area resize of one axis as a matrix (target, source), float32."""
    eye = torch.eye(source, dtype=torch.float64).unsqueeze(0)
    return F.adaptive_avg_pool1d(eye, target)[0].T.contiguous().float()


def bicubic_matrix(source: int, target: int) -> Tensor:
    """PyTorch's bicubic resize of one axis (a = -0.75, half-pixel) as a matrix (target, source).

    A matrix product has a deterministic backward on every device; that of `interpolate` is not.
    """
    eye = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)
    up = F.interpolate(eye, size=(target, 1), mode="bicubic", align_corners=False)
    return up[0, :, :, 0].T.contiguous().float()


def assign_phis(num_scales: int, num_phi: int) -> list[int]:
    """Return which phi serves each scale, as the published code assigns them.

    The nearest of evenly spaced ticks in [0, 1], in float64 on purpose: its rounding decides
    the ties at 5 and 10 scales, and the published weights were trained with that decision.
    """
    if num_phi == num_scales:
        return list(range(num_scales))
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    positions = [k / max(num_scales - 1, 1) for k in range(num_scales)]
    return [int(np.argmin(np.abs(ticks - position))) for position in positions]
