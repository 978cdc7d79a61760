"""LayerScale: a learned factor on each channel of a sub-layer's branch (Touvron et al. 2021, CaiT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkernels.nn import _check


class LayerScale(nn.Module):
    """x * gamma.

    Args:
        dim: D, channels.
        init_values: where every gamma starts.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        (dim,) = _check.positive("LayerScale", dim=dim)
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same, in the wider dtype of x and gamma."""
        return x * self.gamma
