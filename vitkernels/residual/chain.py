"""Blocks that are run by one call, and when their borders may be crossed.

From block to block, the add at the end and the norm at the beginning can be one pass over memory where nobody comes
between them: the loop over the blocks is the package's own, and each block would be called plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.residual.genuine import why_not_read
from vitkernels.residual.stream import Sublayer, pre_norm


def why_not_joined(block: nn.Module, x: Tensor) -> str | None:
    """Why a block that knows its residual steps must be called by itself all the same; None where it need not be."""
    if block._compiled_call_impl is not None:
        return "it is compiled by itself"
    weight = next(block.parameters(), x)
    if weight.device != x.device:
        return f"its weights are in {weight.device}"
    reason = why_not_read(block)
    return None if reason is None else f"it has {reason}"


class Chain:
    """Blocks that are run as one residual stream, or one of them by itself; the options are of their `sublayers`."""

    def __init__(self, blocks: Sequence[Any], **options: Any) -> None:
        self.sublayers: list[Sublayer] = []
        for block in blocks:
            self.sublayers += block.sublayers(**options)
            self.sublayers[-1].ends = True  # gradients of a block's parameters do not wait for those of others
        self._weights = [next(block.parameters()) for block in blocks if any(True for _ in block.parameters())]

    def fits(self, x: Tensor) -> bool:
        """Whether all blocks are still where the tokens are: one that is moved stays the module it was."""
        return all(weight.device == x.device for weight in self._weights)

    def run(
        self,
        x: Tensor,
        dtype: torch.dtype | None = None,
        last_norm: nn.Module | None = None,
        again: bool | None = None,
    ) -> Tensor:
        """The blocks on their tokens, [B, N, D] to the same; arguments as `pre_norm` has them."""
        return pre_norm(x, self.sublayers, dtype, last_norm, again)
