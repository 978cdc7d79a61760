"""Position tables for another grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefixes: int = 0) -> Tensor:
    """Interpolate a position table to another grid, bicubic with antialias, as timm does; differentiable.

    Args:
        table: [1, R + N, D], prefix tokens first, patches row by row; float16 and bfloat16 are interpolated in float32.
        old_grid, new_grid: (rows, columns) of patches now and then.
        prefixes: R, rows that stay as they are.

    Returns:
        [1, R + N', D] in table's dtype; the table itself where the grids are equal.

    Raises:
        ValueError: a table whose rows are not R + the old grid's.
    """
    rows, columns = old_grid
    if table.dim() != 3 or table.shape[:2] != (1, prefixes + rows * columns):
        raise ValueError(
            f"resize_pos_embed: argument 'table' has shape {list(table.shape)}; "
            f"needs [1, {prefixes + rows * columns}, D] ({prefixes} prefix tokens, {rows} x {columns} patches)"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    patches = table[:, prefixes:].to(torch.promote_types(table.dtype, torch.float32))
    image = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefixes], patches], dim=1)
