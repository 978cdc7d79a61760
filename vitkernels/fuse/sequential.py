"""nn.Sequential around fused blocks: its loop is the package's, so that borders between blocks are crossed there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.swap import Fused, PreNormBlock, is_swapped
from vitkernels.residual.chain import why_not_joined
from vitkernels.residual.stream import Part, Sublayer, pre_norm


class FusedSequential(Fused):
    """Runs neighbours that are fused pre-norm blocks as one residual stream, and calls everything else.

    A hook or a wrapper on a block, a block compiled, moved to another device or with other options by itself is called.
    """

    axes = None

    def forward(self, input: Any) -> Any:
        if self.declines(input):
            return super().forward(input)
        for blocks in _runs(self, input):
            first = blocks[0]
            if len(blocks) == 1:
                input = first(input)
                continue
            assert isinstance(first, PreNormBlock)
            with first.backend():
                state = first._vitkernels
                input = pre_norm(input, _sublayers(blocks), state.residual_dtype, again=state.recompute_norms)
        return input

    def parts(self) -> list[Part]:
        blocks: Any = self
        weight = next(self.parameters(), torch.empty(0, device="cpu"))  # none where a wrapper has taken them
        reasons = [_why_not(block, weight) for block in blocks]
        apart = [f"block {index} is called by itself: {reason}" for index, reason in enumerate(reasons) if reason]
        return [Part("borders", "add_layer_norm", "; ".join(apart) or None)]


def _runs(blocks: Any, x: Any) -> Iterator[list[nn.Module]]:
    """The modules in order, neighbours that may be run as one stream together."""
    together: list[nn.Module] = []
    for block in blocks:
        joins = isinstance(x, Tensor) and _why_not(block, x) is None
        if together and not (joins and _same_options(together[-1], block)):
            yield together
            together = []
        together.append(block)
        if not joins:
            yield together
            together = []
    if together:
        yield together


def _why_not(block: nn.Module, x: Tensor) -> str | None:
    """Why a module is called by itself, or None where it may be run with its neighbours."""
    if not isinstance(block, PreNormBlock) or not is_swapped(block):
        return "it is not fused"
    return block.why_not_joined() or block.why_not_now() or why_not_joined(block, x)


def _same_options(one: Any, other: Any) -> bool:
    mine, others = (
        (state.residual_dtype, state.recompute_norms, state.backends) for state in (one._vitkernels, other._vitkernels)
    )
    return mine == others


def _sublayers(blocks: list[nn.Module]) -> list[Sublayer]:
    return [sublayer for block in blocks for sublayer in block.sublayers()]  # type: ignore[operator]
