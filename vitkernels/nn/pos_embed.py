"""Position tables for another grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.ops._check import integer


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
    rows, columns, new_rows, new_columns, prefixes = map(integer, (*old_grid, *new_grid, prefixes))
    if table.dim() != 3 or table.shape[:2] != (1, prefixes + rows * columns):
        raise ValueError(
            f"resize_pos_embed: argument 'table' has shape {list(table.shape)}; "
            f"needs [1, {prefixes + rows * columns}, D] ({prefixes} prefix tokens, {rows} x {columns} patches)"
        )
    if (rows, columns) == (new_rows, new_columns):
        return table
    patches = table[:, prefixes:].to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, (rows, columns))[0]
    down, across = _weights(rows, new_rows, patches), _weights(columns, new_columns, patches)
    with torch.autocast(table.device.type, enabled=False):
        patches = torch.einsum("rcd,rm,cn->mnd", patches, down, across)
    return torch.cat([table[:, :prefixes], patches.flatten(0, 1).unsqueeze(0).to(table.dtype)], dim=1)


def _weights(old: int, new: int, like: Tensor) -> Tensor:
    """[old, new]: what each old row gives each new one, read off by interpolating unit vectors.

    Two products with these are the interpolation; their backward, other than `F.interpolate`'s, is repeatable on a GPU
    and compiles with sizes that are symbols.
    """
    units = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(units[None, None], size=(old, new), mode="bicubic", antialias=True)[0, 0]
