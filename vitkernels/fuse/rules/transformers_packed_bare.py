"""Hugging Face transformers: packed images whose tokens have their positions in them (read from 5.23).

GLM-Image, Cosmos 3, HunYuan-VL, MiniCPM-V: as `transformers_packed`, and nothing is turned.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_packed import FusedPackedAttention, FusedPackedLayer
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling


class FusedBareAttention(FusedPackedAttention):
    """GlmImageVisionAttention: positions are in the tokens."""

    steps = FusedAttention.steps
    needs = ("cu_seqlens",)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: Any = None, **kwargs: Any
    ) -> Any:
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.returned(self.attended(hidden_states, **options))


class FusedCosmosAttention(FusedBareAttention):
    """Cosmos3EdgeVisionAttention."""

    spelling = Spelling(out="out_proj", heads="num_heads", scale="scale", dropout="dropout", is_causal=False)


class FusedHunyuanAttention(FusedBareAttention):
    """HunYuanVLVisionAttention: tokens as a batch of one, and no dropout."""

    axes = 3
    spelling = Spelling(heads="num_heads", is_causal=False)
    returns_weights = True

    def _drops(self) -> bool:
        return False


class FusedMiniCpmAttention(FusedBareAttention):
    """MiniCPMV4_6VisionAttention and its copies: tokens as a batch of one; a mask is not looked at."""

    axes = 3
    spelling = Spelling(out="out_proj", heads="num_heads", is_causal=False)

    def returned(self, out: Tensor) -> Any:
        return out, None


class FusedBareLayer(FusedPackedLayer):
    """GlmImageVisionBlock."""

    needs = ("cu_seqlens",)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, cu_seqlens=cu_seqlens, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, cu_seqlens=cu_seqlens, **kwargs)
        return self.run(hidden_states, cu_seqlens=cu_seqlens, **kwargs)


class FusedCosmosLayer(FusedBareLayer):
    """Cosmos3EdgeVisionEncoderLayer."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn")

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)


_BARE = ("hidden_states", "cu_seqlens", "max_seqlen", "kwargs")
RULES = (
    attention_rule(FusedBareAttention, owners("glm_image.GlmImageVisionAttention"), _BARE),
    attention_rule(FusedCosmosAttention, owners("cosmos3_edge.Cosmos3EdgeVisionAttention"), _BARE),
    attention_rule(FusedHunyuanAttention, owners("hunyuan_vl.HunYuanVLVisionAttention"), _BARE),
    attention_rule(
        FusedMiniCpmAttention,
        owners(
            """
            minicpm_ocr.MiniCPMOcrVisionAttention minicpmv4_6.MiniCPMV4_6VisionAttention
            minicpmv4_7.MiniCPMV4_7VisionAttention
            """
        ),
        ("hidden_states", "cu_seqlens", "max_seqlen", "attention_mask", "kwargs"),
    ),
    layer_rule(FusedBareLayer, owners("glm_image.GlmImageVisionBlock"), ("hidden_states", "cu_seqlens", "kwargs")),
    layer_rule(
        FusedCosmosLayer,
        owners("cosmos3_edge.Cosmos3EdgeVisionEncoderLayer"),
        ("hidden_states", "cu_seqlens", "kwargs"),
    ),
)
