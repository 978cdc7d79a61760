"""Drop-in modules on the fused ops, ready-made Vision Transformers, and the naive one that they are compared with."""

from vitkernels.nn.attention import Attention
from vitkernels.nn.block import Block
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.layer_scale import LayerScale
from vitkernels.nn.masking import Masking, random_masking, unshuffle
from vitkernels.nn.mlp import GluMlp, Mlp
from vitkernels.nn.naive import NaiveVisionTransformer
from vitkernels.nn.patch_embed import PatchEmbed
from vitkernels.nn.pos_embed import resize_pos_embed
from vitkernels.nn.presets import PRESETS, create_model
from vitkernels.nn.transformer import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from vitkernels.nn.vision_transformer import VisionTransformer

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "DropPath",
    "GluMlp",
    "LayerScale",
    "Masking",
    "Mlp",
    "MultiheadAttention",
    "NaiveVisionTransformer",
    "PatchEmbed",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "VisionTransformer",
    "create_model",
    "random_masking",
    "resize_pos_embed",
    "unshuffle",
]
