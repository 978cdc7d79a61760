"""The ops: functions over tensors, each with its reference beside it. Fused modules stand in `vitkernels.nn`."""

from vitkernels.ops.add_layer_norm import add_layer_norm, add_rms_norm
from vitkernels.ops.attention import attention, attention_qkv
from vitkernels.ops.attention_rel_pos import attention_rel_pos
from vitkernels.ops.attention_varlen import attention_varlen
from vitkernels.ops.glu_mlp import glu_mlp
from vitkernels.ops.linear import linear
from vitkernels.ops.mlp import mlp
from vitkernels.ops.patch_embed import patch_embed
from vitkernels.ops.rotary import rotary
from vitkernels.ops.rotary_qkv import rotary_qkv

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_qkv",
    "attention_rel_pos",
    "attention_varlen",
    "glu_mlp",
    "linear",
    "mlp",
    "patch_embed",
    "rotary",
    "rotary_qkv",
]
