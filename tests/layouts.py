"""The layouts in which torch can hand a tensor over: the same numbers, other strides.

What lies between the elements is NaN, so that a kernel which reads there shows. "expanded" and "grey" have stride 0, so
the numbers repeat along that axis. A layout that the rank has no room for leaves the tensor contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _place(tensor: Tensor, buffer: Sequence[int], cut: tuple[Any, ...]) -> Tensor:
    """The tensor's numbers in a cut of a larger buffer."""
    view = tensor.new_full(buffer, math.nan if tensor.is_floating_point() else 0)[cut]
    return view.copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _sliced(tensor: Tensor) -> Tensor:
    """Every second element of the last axis."""
    *rest, last = tensor.shape
    return _place(tensor, (*rest, 2 * last), (..., slice(None, None, 2)))


def _every_second_row(tensor: Tensor) -> Tensor:
    first, *rest = tensor.shape
    return _place(tensor, (2 * first, *rest), (slice(None, None, 2),))


def _columns(tensor: Tensor) -> Tensor:
    """A part of the last axis of a wider tensor: a weight cut from a packed one, the gradient of a cat."""
    *rest, last = tensor.shape
    return _place(tensor, (*rest, last + 5), (..., slice(3, 3 + last)))


def _rows(tensor: Tensor) -> Tensor:
    """A part of the second last axis: the gradient of a cat along the tokens."""
    if tensor.dim() < 2:
        return tensor
    *rest, rows, last = tensor.shape
    return _place(tensor, (*rest, rows + 3, last), (..., slice(2, 2 + rows), slice(None)))


def _offset(tensor: Tensor) -> Tensor:
    """Contiguous, and one element past where the storage begins: not aligned to vectors."""
    return _place(tensor.flatten(), (tensor.numel() + 1,), (slice(1, None),)).view(tensor.shape)


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


def _expanded_rows(tensor: Tensor) -> Tensor:
    """Stride 0 along the second last axis: a mask of keys shown to every query."""
    return tensor[..., :1, :].expand_as(tensor) if tensor.dim() > 1 else tensor


def _expanded_everywhere(tensor: Tensor) -> Tensor:
    """One number for all: the gradient of a sum."""
    return tensor.flatten()[:1].squeeze().expand_as(tensor) if tensor.numel() else tensor


def _grey(tensor: Tensor) -> Tensor:
    """One channel shown as several."""
    return tensor[:, :1].expand_as(tensor)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _heads_last(tensor: Tensor) -> Tensor:
    """[B, H, N, K] kept as [B, N, H, K], as a projection split into heads."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(tensor: Tensor) -> Tensor:
    """[B, H, N, K] as the first third of a projection [B, N, 3, H, K]."""
    batch, heads, tokens, width = tensor.shape
    return _place(
        tensor.permute(0, 2, 1, 3), (batch, tokens, 3, heads, width), (slice(None), slice(None), 0)
    ).transpose(1, 2)


def _negated(tensor: Tensor) -> Tensor:
    """Memory holds the negative, as of the imaginary part of a conjugate."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
    "sliced": _sliced,
    "every second row": _every_second_row,
    "columns": _columns,
    "rows": _rows,
    "offset": _offset,
    "expanded": _expanded,
    "expanded rows": _expanded_rows,
    "expanded everywhere": _expanded_everywhere,
    "grey": _grey,
    "channels_last": _channels_last,
    "heads last": _heads_last,
    "packed": _packed,
    "negated": _negated,
}
