"""Blocks that are run by one call, and when their borders may be crossed.

From block to block, the add at the end and the norm at the beginning can be one pass over memory where nobody comes
between them: the loop over the blocks is the package's own, and each block would be called plainly.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.residual.genuine import why_not_read


def why_not_joined(block: nn.Module, x: Tensor) -> str | None:
    """Why a block that knows its residual steps must be called by itself all the same; None where it need not be."""
    if block._compiled_call_impl is not None:
        return "it is compiled by itself"
    weight = next(block.parameters(), x)
    if weight.device != x.device:
        return f"its weights are in {weight.device}"
    reason = why_not_read(block)
    return None if reason is None else f"it has {reason}"
