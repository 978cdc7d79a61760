"""Rotary positions of an image's patches (Su et al. 2021, along rows and columns), as timm's EVA has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rope(NamedTuple):
    """Sines and cosines of the tokens of a call, as `ops.rotary_qkv` takes them.

    Attributes:
        sin, cos: [N, K], or [B, 1, N, K] where images keep patches of their own; float32.
        prefix: so many tokens before them have no position.
    """

    sin: Tensor
    cos: Tensor
    prefix: int = 0

    def kept(self, keep: Tensor | None) -> Rope:
        """Of the patches keep, [B, M], alone."""
        if keep is None:
            return self
        return self._replace(sin=self.sin[keep].unsqueeze(1), cos=self.cos[keep].unsqueeze(1))

    def packed(self, images: int) -> tuple[Tensor, Tensor]:
        """A row for each token of so many images, [images * (prefix + N), K]; those of prefix tokens turn nothing."""
        sin, cos = (
            F.pad(table.reshape(-1, *table.shape[-2:]), (0, 0, self.prefix, 0), value=value)
            for table, value in ((self.sin, 0.0), (self.cos, 1.0))
        )
        return sin.expand(images, -1, -1).flatten(0, 1), cos.expand(images, -1, -1).flatten(0, 1)


def rotary_positions(
    grid: tuple[int, int],
    width: int,
    *,
    usual_grid: tuple[int, int] | None = None,
    temperature: float = 10000.0,
    device: torch.device | None = None,
) -> Rope:
    """The table of a grid of patches, row by row: half of a head's pairs turn by the row, half by the column.

    Args:
        grid: rows and columns.
        width: K, of a head; a multiple of 4.
        usual_grid: the grid that the model is made for; the coordinates of another one are scaled to its range.
        temperature: the slowest pair turns by 1 / temperature ^ (1 - 4 / K) for each patch.
    """
    frequencies = temperature ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4))
    rows, columns = (
        torch.arange(size, dtype=torch.float32, device=device) * (usual / size)
        for size, usual in zip(grid, usual_grid or grid, strict=True)
    )
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
    angles = (places.unsqueeze(-1) * frequencies).flatten(1).repeat_interleave(2, dim=-1)  # [N, K]
    return Rope(angles.sin(), angles.cos())
