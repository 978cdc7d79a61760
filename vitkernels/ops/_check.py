"""Checks that run before any kernel: one clear sentence that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_tensor(op: str, *, optional: dict[str, Any], **tensors: Any) -> None:
    """Each argument is a tensor, and all are on the first one's device; the optional ones may be None."""
    first_name, first = next(iter(tensors.items()))
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in (tensors | given).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: argument '{name}' got {type(value).__name__}; needs a torch.Tensor")
        if value.device != first.device:
            raise ValueError(
                f"{op}: argument '{name}' is on {value.device} while '{first_name}' is on {first.device}; "
                "needs one device"
            )


def is_floating(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.dtype not in FLOATING:
            raise TypeError(
                f"{op}: argument '{name}' has dtype {value.dtype}; needs one of float32, float64, bfloat16, float16"
            )


def has_rank(op: str, name: str, tensor: Tensor, layout: str, *, at_least: bool = False) -> None:
    """`layout` names the axes, as in "[B, H, N, K]"; its length is the rank that is needed."""
    rank = layout.count(",") + 1
    if tensor.dim() != rank and not (at_least and tensor.dim() > rank):
        more = "at least " if at_least else ""
        raise ValueError(
            f"{op}: argument '{name}' has shape {list(tensor.shape)}; needs {more}{rank} dimension"
            f"{'s' if rank > 1 else ''}, {layout}"
        )


def has_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], because: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: argument '{name}' has shape {list(tensor.shape)}; needs {list(expected)} ({because})")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All that multiply each other have one dtype (autocast makes it so where it is on)."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first_name, first = next(iter(given.items()))
    for name, value in given.items():
        if value.dtype != first.dtype:
            raise TypeError(
                f"{op}: argument '{name}' has dtype {value.dtype} while '{first_name}' has {first.dtype}; "
                "needs one dtype, or autocast"
            )
