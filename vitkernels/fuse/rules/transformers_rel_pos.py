"""Hugging Face transformers: attention with decomposed relative positions (read from 5.23).

SAM's, which OCR models share (GOT-OCR 2, DeepSeek-OCR 2, SLANeXt), and ViTDet's. Their layers are in
`transformers_windows`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_parts import FusedAttention, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling, at
from vitkernels.ops import _rel_pos
from vitkernels.residual import genuine

STEPS = "linear, attention_rel_pos, linear"


class FusedSamAttention(FusedAttention):
    """SamVisionAttention: written out; tokens are [B, height, width, D], an image's or a window's."""

    follows = ("get_decomposed_rel_pos",)
    axes = 4
    steps = STEPS
    has_functions = False
    hears_keywords = False
    spelling = Spelling(("qkv",), "proj", "num_attention_heads", "scale", "dropout", is_causal=False)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states):
            return super(FusedAttention, self).forward(hidden_states, output_attentions)
        return self.attended(hidden_states), None

    def is_plain(self) -> bool:
        return False

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        attn: Any = self
        (height, width), num_heads, scale = packed.shape[1:3], at(self, self.spelling.heads), self.score_factor()
        if not self.has_positions():
            heads = ops.attention_qkv(packed.flatten(1, 2), num_heads, scale=scale)
            return heads.unflatten(1, (height, width))
        in_y, in_x = self.embedded(height, attn.rel_pos_h), self.embedded(width, attn.rel_pos_w)
        return _rel_pos.attention(packed, num_heads, _rel_pos.distances(in_y), _rel_pos.distances(in_x), scale)

    def has_positions(self) -> bool:
        return self.use_rel_pos  # type: ignore[return-value]

    def embedded(self, side: int, table: Tensor) -> Tensor:
        """Of each query and key of a side, [side, side, K]: the table, interpolated where the side is another."""
        return self.get_rel_pos(side, side, table)  # type: ignore[operator]


class FusedSamSdpaAttention(FusedSamAttention):
    """SamVisionSdpaAttention: it returns no weights, drops none, and has torch's scale whatever its own says."""

    spelling = dataclasses.replace(FusedSamAttention.spelling, scale=None)
    returns_weights = False

    def _drops(self) -> bool:
        return False


class FusedVitDetAttention(FusedSamAttention):
    """VitDetAttention: it returns its weights to who asks for them."""

    returns_weights = False
    spelling = Spelling(("qkv",), "proj", "num_heads", "scale", is_causal=False)

    def forward(  # type: ignore[override]
        self, hidden_state: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or self.leaves(hidden_state):
            return super(FusedAttention, self).forward(hidden_state, output_attentions)
        return (self.attended(hidden_state),)

    def _drops(self) -> bool:
        return False

    def has_positions(self) -> bool:
        return self.use_relative_position_embeddings  # type: ignore[return-value]

    def embedded(self, side: int, table: Tensor) -> Tensor:
        own = sys.modules[genuine.owner(self).__module__]
        return own.get_rel_pos(side, side, table)


class FusedSegGptAttention(FusedVitDetAttention):
    """SegGptAttention: two values are returned, weights or none."""

    follows = ("add_decomposed_rel_pos",)
    spelling = Spelling(("qkv",), "proj", "num_attention_heads", "scale", is_causal=False)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions or self.leaves(hidden_states):
            return super(FusedAttention, self).forward(hidden_states, output_attentions)
        return self.attended(hidden_states), None

    embedded = FusedSamAttention.embedded


def _rule(mixin: type[FusedSamAttention], names: str, tokens: str) -> Rule:
    def contract(attn: nn.Module) -> str | None:
        return differs(attn, (tokens, "output_attentions"), ("qkv", "proj"), (), ("rel_pos_h", "rel_pos_w"))

    return Rule(mixin, owners(names), contract)


RULES = (
    _rule(
        FusedSamAttention,
        """
        deepseek_ocr2.DeepseekOcr2SamVisionAttention got_ocr2.GotOcr2VisionAttention
        pp_formulanet.PPFormulaNetVisionAttention sam.SamVisionAttention sam_hq.SamHQVisionAttention
        slanext.SLANeXtVisionAttention unlimited_ocr.UnlimitedOcrSamVisionAttention
        """,
        "hidden_states",
    ),
    _rule(
        FusedSamSdpaAttention,
        """
        deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention sam.SamVisionSdpaAttention sam_hq.SamHQVisionSdpaAttention
        unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention
        """,
        "hidden_states",
    ),
    _rule(FusedSegGptAttention, "seggpt.SegGptAttention", "hidden_states"),
    _rule(FusedVitDetAttention, "vitdet.VitDetAttention", "hidden_state"),
)
