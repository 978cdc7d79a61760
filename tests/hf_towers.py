"""Small random vision towers of Hugging Face transformers, and calls of their layers by the names of the arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import fused
import hf_models  # noqa: F401  # skips where transformers is not installed
import torch
from torch import Tensor, nn

from bench import towers
from vitkernels.fuse.swap import Fused
from vitkernels.residual import genuine

D, HEADS, TOKENS = 48, 3, 17
SIZES = {
    "hidden_size": D,
    "embed_dim": D,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "intermediate_size": 96,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "depth": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "layer_scale_init_value": 0.5,
    "layerscale_value": 0.5,
}


# what the kernels of a layer are, by its kind
QKV = {"linear", "attention_qkv", "add_layer_norm", "mlp"}
APART = QKV - {"attention_qkv"} | {"attention"}
ROPED = QKV | {"rotary_qkv"}
ROPED_APART = APART | {"rotary"}  # several heads of q share those of k and v, or the tokens are an image
BARE = QKV - {"attention_qkv"} | {"attention_varlen"}
PACKED = BARE | {"rotary_qkv"}
REL_POS = QKV - {"attention_qkv"} | {"attention_rel_pos"}
OWN = {"add_layer_norm", "mlp"}  # the attention's code is its own


def rms(ops: set[str]) -> set[str]:
    """The same with an RMSNorm."""
    return ops - {"add_layer_norm"} | {"add_rms_norm"}


def gated(ops: set[str]) -> set[str]:
    """The same with a gated feed-forward."""
    return ops - {"mlp"} | {"glu_mlp"}


_RATIO = {"mlp_ratio": 2.0}  # of configs that take no int
_WINDOWS = {**_RATIO, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 96}
_BLOCKS = {"window_size": 2, "window_block_indices": [0]}
_SWIN = {**_RATIO, "window_size": 2, "depths": [2], "num_attention_heads": [3], "num_heads": [3], "drop_path_rate": 0.0}
_PVT = {
    "hidden_sizes": [D],
    "depths": [2],
    "num_attention_heads": [HEADS],
    "num_encoder_blocks": 1,
    "sequence_reduction_ratios": [2],
    "strides": [4],
    "patch_sizes": [7],
    "mlp_ratios": [2],
}
_PVT_V2 = {"num_encoder_blocks": 1, "sr_ratios": [2], "linear_attention": False}
_FLORENCE = {
    "depths": [1],
    "embed_dim": [D],
    "num_heads": [HEADS],
    "num_groups": [HEADS],
    "window_size": 3,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "patch_size": [7],
    "patch_stride": [4],
    "patch_padding": [3],
    "patch_prenorm": [False],
}
_HIERA = {
    **_RATIO,
    "embed_dim": D,
    "depths": [1, 1],
    "num_heads": [HEADS, 2 * HEADS],
    "image_size": (32, 32),
    "patch_size": (7, 7),
    "num_query_pool": 1,
    "masked_unit_size": (2, 2),
    "masked_unit_attention": [True, True],
}
_OCR = {"hidden_size": D, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 96}
_SAM2 = {
    **_RATIO,
    "blocks_per_stage": [1, 1],
    "embed_dim_per_stage": [D, 2 * D],
    "num_attention_heads_per_stage": [HEADS, 2 * HEADS],
    "window_size_per_stage": [2, 2],
    "global_attention_blocks": [],
    "num_query_pool_stages": 1,
    "image_size": [32, 32],
}
_GROUPED = {"hidden_size": 64, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2}
_SQUARE = {"image_size": [32, 32]}
Row = tuple[set[str], dict[str, Any]]
TOWERS: dict[str, Row] = {
    "aimv2": (gated(rms(QKV)), {}),
    "altclip": (QKV, {}),
    "beit": (QKV, {"use_relative_position_bias": True}),
    "blip": (QKV, {}),
    "blip_2": (QKV, {}),
    "bridgetower": (QKV, {"hidden_size": 64}),
    "chinese_clip": (QKV, {}),
    "cohere_compass": (PACKED, {"deepstack_visual_indexes": [0]}),
    "cosmos3_edge": (BARE, {}),
    "data2vec.data2vec_vision": (QKV, {"use_relative_position_bias": True}),
    "deepseek_ocr2": (REL_POS, {"sam_config": _OCR | _WINDOWS, "encoder_config": _OCR | {"num_key_value_heads": 1}}),
    "donut.donut_swin": (QKV, _SWIN),
    "dpt": (QKV, {}),
    "eomt": (QKV, {}),
    "ernie4_5_vl_moe": (PACKED, {}),
    "exaone4_5": (
        gated(rms(BARE | {"rotary"})),
        _GROUPED,
    ),
    "flava": (QKV, {}),
    "florence2": (QKV, _FLORENCE),
    "gemma4": (gated(rms(ROPED_APART)), {"head_dim": 16, "num_key_value_heads": HEADS}),
    "git": (QKV, {}),
    "glm4v": (gated(rms(PACKED)), {}),
    "glm5_next": (rms(PACKED) - {"mlp"}, {}),
    "glm_image": (BARE, {}),
    "glm_ocr": (gated(rms(PACKED)) | {"add_rms_norm"}, {}),
    "glpn": (APART - {"mlp"}, _PVT | {"sr_ratios": [2]}),
    "got_ocr2": (REL_POS, _WINDOWS),
    "hiera": (QKV, _HIERA),
    "hunyuan_vl": (BARE, {}),
    "idefics2": (QKV, {}),
    "inkling2": (PACKED, _RATIO),
    "internvl": (QKV, _SQUARE | {"patch_size": [8, 8]}),
    "janus": (QKV, {}),
    "kimi_k25": (PACKED, {}),
    "kosmos2": (QKV, {}),
    "kosmos2_5": (gated(rms(QKV)), {}),
    "llama4": (ROPED, {"vision_output_dim": 96}),
    "lw_detr": (QKV, {"num_windows": 4, "window_block_indices": [0], "out_features": None}),
    "maskformer.maskformer_swin": (QKV, _SWIN),
    "mgp_str": (OWN, {**_RATIO, **_SQUARE, "drop_path_rate": 0.0}),
    "minicpmv4_6": (BARE, {}),
    "minimax_m3_vl": (BARE | {"rotary"}, {}),
    "mlcd": (ROPED, {}),
    "mllama": (QKV, {"intermediate_layers_indices": [0]}),
    "mobilevit": (QKV, {**_RATIO, "hidden_sizes": [D] * 3, "num_attention_heads": 4, "hidden_dropout_prob": 0.0}),
    "molmo2": (QKV, {**_SQUARE, "num_key_value_heads": HEADS, "head_dim": D // HEADS}),
    "muse_spark": (PACKED, {}),
    "owlvit": (QKV, {}),
    "paddleocr_vl": (PACKED, {}),
    "phi4_multimodal": (QKV, {}),
    "pix2struct": (gated(rms(QKV)), {"vocab_size": 50}),
    "pixio": (QKV, {}),
    "pixtral": (gated(rms(ROPED)), {}),
    "pvt": (APART, _PVT),
    "pvt_v2": (APART - {"mlp"}, _PVT | _PVT_V2),
    "qianfan_ocr": (QKV, {"drop_path_rate": 0.0, **_SQUARE, "patch_size": [8, 8]}),
    "qwen2_5_omni": (gated(rms(PACKED)), {}),
    "qwen2_5_vl": (gated(rms(PACKED)), {}),
    "qwen2_vl": (PACKED, {}),
    "qwen3_vl": (PACKED, {"deepstack_visual_indexes": [0]}),
    "radio": (QKV, _RATIO),
    "rf_detr": (QKV, {"window_block_indexes": [0], "num_windows": 2}),
    "sam": (REL_POS, _WINDOWS),
    "sam2": (QKV, _SAM2),
    "sam3": (ROPED_APART, {"window_size": 2, "global_attn_indexes": [1]}),
    "sapiens2": (gated(rms(ROPED_APART)) | {"add_rms_norm"}, {"num_key_value_heads_per_layer": [1, HEADS]}),
    "segformer": (APART - {"mlp"}, _PVT | {"sr_ratios": [2], "num_hidden_layers": 1}),
    "seggpt": (REL_POS, {**_SQUARE, "mlp_dim": 96, "intermediate_hidden_state_indices": [0, 1], "merge_index": 0}),
    "smolvlm": (QKV, {}),
    "step3p7": (ROPED, _RATIO),
    "swin": (QKV, _SWIN),
    "swin2sr": (APART, {**_SWIN, "embed_dim": D, "image_size": 16, "patch_size": 1, "window_size": 4}),
    "swinv2": (APART, _SWIN),
    "video_llama_3": (PACKED, {}),
    "videomae": (QKV, {}),
    "videomt": (QKV, {}),
    "vilt": (QKV, {}),
    "vitdet": (REL_POS, _BLOCKS | {"use_relative_position_embeddings": True}),
    "vitpose_backbone": (QKV, {**_SQUARE, "patch_size": [8, 8]}),
    "vjepa2": (APART, {"crop_size": 32, "frames_per_clip": 2}),
    "x_clip": (QKV, {"num_frames": 2}),
    "yolos": (QKV, _SQUARE),
}


# layers beside those of their towers' ops
_LAYERS = {"Florence2VisionChannelBlock": OWN, "DeepseekOcr2VisionEncoderLayer": gated(rms(ROPED_APART))}


def ops_of(name: str, layer: nn.Module) -> set[str]:
    """What the kernels of a tower's layer are."""
    return _LAYERS.get(genuine.stock_type(layer).__name__, TOWERS[name][0])


def tower(name: str, **options: Any) -> nn.Module:
    """A tower with its config's own settings but for its sizes, which are small, and the options."""
    cls = towers.tower_class(name)
    usual = cls.config_class()  # type: ignore[attr-defined]
    sizes = {key: value for key, value in SIZES.items() if hasattr(usual, key)}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **TOWERS[name][1], **options}))  # type: ignore[attr-defined]
    fused.stir(model)
    return model.train()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The first fused block of each class, by the class's name."""
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Fused) and module.is_block:
            found.setdefault(genuine.stock_type(module).__name__, module)
    return found


LENGTHS = ((5, 9, 3), (6, 6), (17,))  # of packed images


def positions(width: int = D // HEADS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """cos and sin, [N, K], as towers hand them to their layers."""
    angles = torch.linspace(0.1, 3, tokens)[:, None] * torch.linspace(0.2, 1, width // 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def gemma_positions(batch: int) -> dict[str, Any]:
    """Gemma 4's, in two directions: one half of each head for one, [B, N, K]."""
    directions = zip(positions(D // HEADS // 2), (each.flip(0) for each in positions(D // HEADS // 2)), strict=True)
    cos, sin = (torch.cat(each, dim=-1).expand(batch, -1, -1) for each in directions)
    return {"position_embeddings": (cos, sin), "position_ids": torch.zeros(batch, TOKENS, 2, dtype=torch.long)}


def _packed(lengths: tuple[int, ...]) -> dict[str, Any]:
    ends = torch.tensor((0, *lengths)).cumsum(0).int()
    return {
        "cu_seqlens": ends,
        "max_seqlen": max(lengths),
        "position_embeddings": positions(tokens=sum(lengths)),
    }


def _turns() -> Tensor:
    cos, sin = positions()
    return torch.complex(cos, sin)[:, None, : D // HEADS // 2].contiguous()


# What layers are called with beside their tokens, by the argument's name.
KEYWORDS: dict[str, Callable[[], Any]] = {
    "attention_mask": lambda: None,
    "ensemble_cond": lambda: 1,
    "freqs_ci": _turns,
    "resolution": lambda: (32, 32),
    "position_embeddings": positions,
    "input_dimensions": lambda: (4, 4),
    "height": lambda: 4,
    "width": lambda: 4,
}


def call_of(layer: nn.Module, lengths: tuple[int, ...] = LENGTHS[0]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tokens and keywords for a layer; for one of packed images these lengths."""
    arguments = list(inspect.signature(genuine.owner(layer).forward).parameters)
    name = genuine.stock_type(layer).__name__
    is_batch_of_one = name.startswith(("MiniCPM", "MiniMax", "HunYuan"))
    also = {"cu_seqlens", "position_embeddings"} if name.startswith("MiniMax") else {"cu_seqlens", "max_seqlen"}
    # of a norm of the layer's own
    own = (each for key, each in layer.named_parameters() if key.count(".") == 1 and key.endswith("weight"))
    width = next(each.shape[0] for each in own if each.dim() == 1)
    keywords = {key: make() for key, make in KEYWORDS.items() if key in arguments}
    if name.startswith("Gemma4"):
        keywords |= gemma_positions(4)
    if name.startswith("DeepseekOcr2VisionEncoder"):
        keywords["position_embeddings"] = tuple(each[None] for each in positions())
    if "cu_seqlens" in arguments or is_batch_of_one:
        packed = _packed(lengths)
        keywords |= {key: value for key, value in packed.items() if key in {*arguments, *also}}
        tokens = torch.randn(*((1,) if is_batch_of_one else ()), sum(lengths), width)
    elif name.startswith(("VitDet", "Florence")):
        tokens = torch.randn(2, D, 4, 4)
    elif name.startswith(("Sam", "SegGpt", "GotOcr", "DeepseekOcr2Sam")) and not name.startswith("Sapiens"):
        tokens = torch.randn(2, 4, 4, D)
    else:
        images = {"height", "input_dimensions"} & {*arguments} or name.startswith("Hiera")
        tokens = torch.randn(4, 16 if images else TOKENS, width)
    return (tokens.requires_grad_(),), keywords
