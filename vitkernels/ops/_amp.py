"""Dtype rules that all ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import noting

# Dtypes as ops' schemas have them, the numbers of c10::ScalarType: AOTInductor of torch 2.11 hands a ScalarType on by
# another table (float32 as float64), and an int as it is.
CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast multiplies in on this tensor's device, or None where autocast is off."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensor, Tensor):  # what is no tensor: checked later
        return None
    kind = tensor.device.type
    if kind == "meta":  # it has no autocast, and asking for its state raises
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast_dtype(tensor: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype in which nn.Linear would get a floating-point tensor; float64 is left alone, as autocast leaves it."""
    return tensor.dtype if autocast is None or tensor.dtype == torch.float64 else autocast


def cast(autocast: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """The floating-point tensors as nn.Linear would get them under autocast."""
    found = [None if tensor is None else tensor.to(cast_dtype(tensor, autocast)) for tensor in tensors]
    note = noting()
    if note is not None:
        for before, after in zip(tensors, found, strict=True):
            if before is not None and after is not None and after is not before:
                note.cast(before, after)
    return found


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that references compute in."""
    return tensor.to(accumulate_dtype(tensor.dtype))


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient that was not asked for: opaque ops return tensors, so it is one of no elements."""
    return like.new_empty(0, dtype=dtype)


def asked_for(needs: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients, or None where `nothing` stands in a place."""
    if all(needs):
        return tuple(gradients)
    return tuple([gradient if needed else None for needed, gradient in zip(needs, gradients, strict=True)])


def given(needed: bool, gradient: Tensor) -> Tensor | None:
    """The gradient, or None where `nothing` stands in its place."""
    return gradient if needed else None
