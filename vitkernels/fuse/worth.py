"""Calls that take longer fused than by the module's own code, by measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.ops._amp import autocast_dtype

TOO_SMALL = (
    "fewer than 48 million tokens x features² a thread: in float32 on a CPU, Python between its many small calls takes "
    'longer than its kernels save; after vk.use("ext") it runs fused'
)
_LEAST = 48 * 10**6  # the measure of a block's products, and alike in all stages of a pyramid


def why_not_small(x: Any, axis: int, asked: tuple[str, ...] | None) -> str | None:
    """Why a call in float32 on a CPU is too small for the C++ backend to gain; None where it is not.

    Nobody who named the backends is overruled, and no compiled graph, which follows `vk.use` when it runs.

    Args:
        x: the tokens, [..., D], or their image.
        axis: of the features.
        asked: the order of backends that was given for the module, or None.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype != torch.float32 or not x.is_cpu:
        return None
    if autocast_dtype(x) is not None or asked is not None or dispatch.asked() is not None or x.is_nested:
        return None
    small = x.dim() > max(axis, 0) and x.numel() * x.shape[axis] < _LEAST * torch.get_num_threads()
    return TOO_SMALL if small and dispatch.why_not("ext") is None else None
