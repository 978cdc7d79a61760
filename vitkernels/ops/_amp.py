"""Dtype rules that all ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast multiplies in on this tensor's device, or None where autocast is off."""
    kind = tensor.device.type
    if kind == "meta":  # it has no autocast, and asking for its state raises
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in autocast's dtype, as nn.Linear would get them; float64 is left alone, as autocast leaves it."""
    dtype = next((autocast_dtype(tensor) for tensor in tensors if tensor is not None), None)
    if dtype is None:
        return list(tensors)
    return [
        tensor
        if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point()
        else tensor.to(dtype)
        for tensor in tensors
    ]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that references compute in."""
    return tensor.to(accumulate_dtype(tensor.dtype))


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient that was not asked for: opaque ops return tensors, so it is one of no elements."""
    return like.new_empty(0, dtype=dtype)


def given(needed: bool, gradient: Tensor) -> Tensor | None:
    """The gradient, or None where `nothing` stands in its place."""
    return gradient if needed else None
