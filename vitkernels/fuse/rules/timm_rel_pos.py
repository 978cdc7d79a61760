"""timm: attention with decomposed relative positions (Li et al. 2022): SAM's, of an image or a window.

Its block is in `timm_windows`. Read from timm 1.0.31.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm_window_attention import FusedPlainAttention
from vitkernels.ops import _rel_pos
from vitkernels.residual import genuine


class FusedSamAttention(FusedPlainAttention):
    """SAM's Attention: tokens are [B, height, width, D]."""

    axes = 4
    steps = "linear, attention_rel_pos, linear"

    def why_not_now(self) -> str | None:
        return super().why_not_now() or (None if self.is_plain() else "norms of q and k")

    def run(self, x: Tensor, **options: Any) -> Tensor:
        with self.backend():
            rows = x.flatten(1, 2)  # as the projections' own modules get them
            heads = self.attend(self.project(rows).unflatten(1, x.shape[1:3]))
            return self.output(rows, heads.flatten(1, 2), False)[0].unflatten(1, x.shape[1:3])

    def attend(self, qkv: Tensor) -> Tensor:  # type: ignore[override]
        attn: Any = self
        height, width = qkv.shape[1:3]
        if not attn.use_rel_pos:
            return ops.attention_qkv(qkv.flatten(1, 2), attn.num_heads).unflatten(1, (height, width))
        get_rel_pos = sys.modules[genuine.owner(self).__module__].get_rel_pos
        in_y = _rel_pos.distances(get_rel_pos(height, height, attn.rel_pos_h))
        in_x = _rel_pos.distances(get_rel_pos(width, width, attn.rel_pos_w))
        return _rel_pos.attention(qkv, attn.num_heads, in_y, in_x)


RULES = (
    Rule(
        FusedSamAttention,
        frozenset({"timm.models.vision_transformer_sam.Attention"}),
        lambda attn: differs(
            attn,
            ("x",),
            ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"),
            (),
            ("rel_pos_h", "rel_pos_w"),
        ),
    ),
)
