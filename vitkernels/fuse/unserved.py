"""What is different in blocks of timm and transformers that no rule serves, for `explain`."""

from __future__ import annotations

import sys

from torch import nn

from vitkernels.residual.genuine import owner_name

_BATCH_NORM = "normalises by BatchNorm, where the ops need a LayerNorm or an RMSNorm"
_SEPARABLE = "has one score for each token, not one for each pair"
_DIFFERENCE = "subtracts one softmax from another"
_POST_NORM = "norms each sum, and spreads its steps over several modules"
_TIMM = {
    "layers.diff_attention.DiffAttention": _DIFFERENCE,
    "models.coat.ParallelBlock": "has attention that is factorised, at three scales side by side",
    "models.csatv2.TransformerBlock": "adds images, with pooling and convolutions between its norm and its attention",
    "models.levit.LevitBlock": _BATCH_NORM,
    "models.lowformer.LowFormerBlock": _BATCH_NORM,
    "models.maxxvit.ParallelPartitionAttention": "has attention of windows and of a grid side by side",
    "models.mobilevit.LinearTransformerBlock": _SEPARABLE,
    "models.nextvit.NextConvBlock": _BATCH_NORM,
    "models.vision_transformer.DiffParallelScalingBlock": _DIFFERENCE,
    "models.visformer.Block": _BATCH_NORM,
}
_TRANSFORMERS = {
    "cvt.modeling_cvt.CvtLayer": "makes q, k and v by convolutions with BatchNorm",
    "dots3_note.modeling_dots3_note.Dots3NoteVisionMoE": "sends each token to experts of its own",
    "groupvit.modeling_groupvit.GroupViTTokenAssign": "assigns each token to one group",
    "layoutlmv3.modeling_layoutlmv3.LayoutLMv3Layer": _POST_NORM,
    "lfm3_vl.modeling_lfm3_vl.Lfm3VlVisionLayer": "is a gated convolution in some places",
    "mobilevitv2.modeling_mobilevitv2.MobileViTV2TransformerLayer": _SEPARABLE,
    "timesformer.modeling_timesformer.TimesformerLayer": "looks along time, adds, and looks across space",
    "tvp.modeling_tvp.TvpEncodeLayer": _POST_NORM,
    "videoprism.modeling_videoprism.VideoPrismAttention": "bounds its scores by a tanh",
}
REASONS = {f"timm.{name}": reason for name, reason in _TIMM.items()}
REASONS |= {f"transformers.models.{name}": reason for name, reason in _TRANSFORMERS.items()}


def why_not_block(block: nn.Module) -> str:
    """Why a Transformer block that no rule serves stays as it is, and what serves its attention, if anything does."""
    name = owner_name(block)
    file, _, cls = name.rpartition(".")
    reason = f"{cls} {REASONS[name]}" if name in REASONS else f"no rule for {name}"
    alone = hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS")  # transformers' choice by attn_implementation
    return f"{reason}; vk.register_attention() offers its attention alone" if alone else reason


def why_not_child(name: str, child: nn.Module) -> str:
    """Why a block's sub-layer that no rule serves is called as it is; `name` is the block's for it."""
    return f"{name} is {type(child).__name__}, which {REASONS.get(owner_name(child), 'is not fused')}"
