"""nn.Sequential around fused blocks: its loop is the package's, so that borders between blocks are crossed there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.swap import Fused, PreNormBlock, is_swapped
from vitkernels.residual.chain import Chain, why_not_joined
from vitkernels.residual.stream import Part


class FusedSequential(Fused):
    """Runs neighbours that are fused pre-norm blocks as one residual stream, and calls everything else.

    A hook or a wrapper on a block, a block compiled, moved to another device or with other options by itself is called.
    """

    axes = None

    def forward(self, input: Any) -> Any:
        if self.declines(input):
            return super().forward(input)
        if torch.compiler.is_compiling():
            runs = _runs(self, input)
        else:
            runs = self._vitkernels.kept.get(self, input.device, lambda: _runs(self, input))
            if not all(run.chain is None or run.chain.fits(input) for run in runs):
                runs = _runs(self, input)
        for run in runs:
            input = run(input)
        return input

    def parts(self) -> list[Part]:
        blocks: Any = self
        weight = next(self.parameters(), torch.empty(0, device="cpu"))  # none where a wrapper has taken them
        reasons = [_why_not(block, weight) for block in blocks]
        apart = [f"block {index} is called by itself: {reason}" for index, reason in enumerate(reasons) if reason]
        return [Part("borders", "add_layer_norm", "; ".join(apart) or None)]


class _Run:
    """Neighbours that are run as one stream; or one module, which is called."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.first: Any = blocks[0]
        self.chain = Chain(blocks) if len(blocks) > 1 else None

    def __call__(self, x: Any) -> Any:
        if self.chain is None:
            return self.first(x)
        with self.first.backend():
            state = self.first._vitkernels
            return self.chain.run(x, state.residual_dtype, again=state.recompute_norms)


def _runs(blocks: Any, x: Tensor) -> list[_Run]:
    """The modules in order, neighbours that may be run as one stream together."""
    found: list[list[nn.Module]] = []
    open_ = False  # whether the last run may go on
    for block in blocks:
        joins = _why_not(block, x) is None
        if joins and open_ and _same_options(found[-1][-1], block):
            found[-1].append(block)
        else:
            found.append([block])
        open_ = joins
    return [_Run(each) for each in found]


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
