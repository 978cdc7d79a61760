"""Blocks that leave fewer tokens than they were given, or wider ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitkernels.fuse.swap import PreNormBlock
from vitkernels.residual import parts
from vitkernels.residual.stream import Part, Sublayer, added_now, pre_norm


class PooledBlock(PreNormBlock):
    """A block whose first step may change the number and the width of its tokens; the sum is torch's there."""

    def changes(self) -> bool:
        """Whether the first step does."""
        raise NotImplementedError

    def shortcut(self, x: Tensor, normed: Tensor, **options: Any) -> Tensor:
        """What the attention of the normed tokens is added to."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        steps = self.sublayers()
        if self.changes():
            steps[0].scale = None  # of the features behind, where the norm has those before
        return [part for step in steps for part in step.parts()]

    def run(self, x: Tensor, **options: Any) -> Tensor:
        if not self.changes():
            return super().run(x, **options)
        state = self._vitkernels
        with self.backend():
            attention, feed_forward = self.sublayers(**options)
            x = self.attended(x, attention, **options)
            return pre_norm(x, [feed_forward], state.residual_dtype, again=state.recompute_norms)

    def attended(self, x: Tensor, attention: Sublayer, **options: Any) -> Tensor:
        """The stream behind the first step."""
        normed = parts.layer_norm(attention.norm, x, parts.operand_dtype(None, x))
        out, _ = attention.branch.run(normed, False)
        x = self.shortcut(x, normed, **options)
        return added_now(x, attention, out, widen=self._vitkernels.residual_dtype is None)
