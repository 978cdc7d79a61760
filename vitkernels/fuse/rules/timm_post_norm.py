"""timm: blocks whose norm comes behind their branch, x + norm(branch(x)): no op adds there, so the norm runs by itself.

Swin v2 (Liu et al. 2022) and its CR form, the post-norm blocks of ViT, EVA and relpos. Read from timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.fuse.around import attention_of, attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import why_not_two_masks
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual.stream import Sublayer, added_norms, rows_behind


class FusedResPostBlock(PreNormBlock):
    """ResPostBlock."""

    passes: ClassVar[dict[str, Any]] = {"attn_mask": None, "is_causal": False}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run(x, attn_mask=attn_mask, is_causal=is_causal)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        with self.backend():
            return self.steps(x, self.sublayers(**options))

    def steps(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        return added_norms(x, sublayers, self._vitkernels.residual_dtype)

    def why_not_joined(self) -> str | None:
        return "its norms come behind its branches"

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_of("attn", block.attn, **(self.passes | options))
        return [
            Sublayer("attn", block.norm1, attention, None, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), None, block.drop_path2),
        ]


class FusedRelPosResPostBlock(FusedResPostBlock):
    """ResPostRelPosBlock."""

    passes: ClassVar[dict[str, Any]] = {"shared_rel_pos": None}

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedResPostBlock, self).forward(x, shared_rel_pos=shared_rel_pos)
        return self.run(x, shared_rel_pos=shared_rel_pos)


class FusedEvaPostBlock(FusedResPostBlock):
    """EvaBlockPostNorm."""

    passes: ClassVar[dict[str, Any]] = {"rope": None, "attn_mask": None, "is_causal": False}

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        options = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
        if self.declines(x, lambda: why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super(FusedResPostBlock, self).forward(x, **options)
        return self.run(x, **options)


class FusedSwinV2Block(FusedResPostBlock):
    """SwinTransformerV2Block: tokens as [B, H, W, D]."""

    axes = 4

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedResPostBlock, self).forward(x)
        return self.run(x)

    def steps(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        return rows_behind(x, sublayers, super().steps, None)

    def windows(self, x: Tensor) -> Tensor:
        """The attention with its windows."""
        block: Any = self
        return block._attn(x)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_within("attn", block.attn, self.windows, "a relative bias on its scores")
        return [
            Sublayer("attn", block.norm1, attention, None, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), None, block.drop_path2),
        ]


class FusedSwinV2CrBlock(FusedSwinV2Block):
    """SwinTransformerV2CrBlock: some have a norm of the stream behind the block."""

    def windows(self, x: Tensor) -> Tensor:
        block: Any = self
        return block._shifted_window_attn(x)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        return block.norm3(super().run(x).flatten(1, 2)).unflatten(1, x.shape[1:3])


_STEPS = ("attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2")


def _rule(
    mixin: type[FusedResPostBlock], owner: str, arguments: tuple[str, ...], children: tuple[str, ...] = ()
) -> Rule:
    def contract(block: nn.Module) -> str | None:
        return differs(block, arguments, (*_STEPS, *children))

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


RULES = (
    _rule(FusedResPostBlock, "vision_transformer.ResPostBlock", ("x", "attn_mask", "is_causal")),
    _rule(FusedRelPosResPostBlock, "vision_transformer_relpos.ResPostRelPosBlock", ("x", "shared_rel_pos")),
    _rule(FusedEvaPostBlock, "eva.EvaBlockPostNorm", ("x", "rope", "attn_mask", "is_causal")),
    _rule(FusedSwinV2Block, "swin_transformer_v2.SwinTransformerV2Block", ("x",)),
    _rule(FusedSwinV2CrBlock, "swin_transformer_v2_cr.SwinTransformerV2CrBlock", ("x",), ("norm3",)),
)
