"""DropPath, or stochastic depth: whole samples skip a sub-layer at random (Huang et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkernels.nn import _check


class DropPath(nn.Module):
    """Zero a sample's branch with probability `drop_prob`, and divide the others by the probability to stay.

    Args:
        drop_prob: 0 to below 1.

    Raises:
        ValueError: drop_prob out of range.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        _check.rate("DropPath", "drop_prob", drop_prob)
        self.drop_prob = drop_prob

    def factor(self, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """The factor of each sample, [B], 0 or 1 / keep, in branch's dtype or another; None where none is dropped.

        One draw a sample from the device's generator, in that dtype, as timm draws: the same seed drops the same.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1 - self.drop_prob
        return branch.new_empty(branch.shape[0], dtype=dtype or branch.dtype).bernoulli_(keep).div_(keep)

    def subset(self, samples: int, device: torch.device) -> Tensor:
        """So many samples as stay on average, rounded down and 1 at least, [s] int64: drawn as DINOv2 draws them."""
        return torch.randperm(samples, device=device)[: max(int(samples * (1 - self.drop_prob)), 1)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the same."""
        factor = self.factor(x)
        return x if factor is None else x * factor.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"
