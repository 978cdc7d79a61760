"""Small random models of Hugging Face transformers, one of each family, with inputs for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import fused
import peers
import pytest
import torch
from torch import Tensor, nn

peers.import_timm()  # transformers imports torchvision, whose operators it declares
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
import transformers as hf  # noqa: E402

hf.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}
ROPED = OPS | {"rotary_qkv"}
WHOLE = "2 of 2 blocks fused"
WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
MLP = {"intermediate_size": 96}
IMAGE = {"image_size": 32, "patch_size": 8}
TEXT = {**WIDTHS, **MLP, "vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {f"decoder_{name}": value for name, value in {**WIDTHS, **MLP}.items()}


def vit(kind: str = "ViTModel", config: str = "ViTConfig", **options: Any) -> nn.Module:
    return getattr(hf, kind)(getattr(hf, config)(**{**WIDTHS, **MLP, **IMAGE, **options}))


def dinov2(kind: str = "Dinov2Model", config: str = "Dinov2Config", **options: Any) -> nn.Module:
    sizes = {**WIDTHS, **IMAGE, "mlp_ratio": 2, "layerscale_value": 0.5}
    return getattr(hf, kind)(getattr(hf, config)(**{**sizes, **options}))


def dinov3(**options: Any) -> nn.Module:
    return vit(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        **{"num_register_tokens": 2, "layerscale_value": 0.5, "pos_embed_rescale": None, **options},
    )


def text(kind: str, config: str, **options: Any) -> nn.Module:
    return getattr(hf, kind)(getattr(hf, config)(**TEXT, **options))


def images(*size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, *(size or (32, 32))),)


def words() -> tuple[Tensor, ...]:
    return (torch.randint(3, 50, (2, 9)),)


def patches() -> tuple[Tensor, ...]:
    """SigLIP 2's input: flattened patches, which of them are there, and the grid of each image."""
    return (
        torch.randn(2, 16, 192),
        (torch.arange(16) < torch.tensor([[16], [12]])).long(),
        torch.tensor([[4, 4], [3, 4]]),
    )


PADDING = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
Row = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], dict[str, Any], set[str]]
MODELS: dict[str, Row] = {
    "vit": (vit, images(), {}, OPS),
    "vit, eager": (lambda: vit(attn_implementation="eager"), images(), {}, OPS),
    "vit, no bias, quick GELU": (lambda: vit(qkv_bias=False, hidden_act="quick_gelu"), images(), {}, OPS),
    "vit, other size": (vit, images(48, 32), {"interpolate_pos_encoding": True}, OPS),
    "vit, some tokens hidden": (vit, images(), {"attention_mask": torch.arange(17)[None].repeat(2, 1) < 12}, OPS),
    "vit, masked images": (
        lambda: vit("ViTForMaskedImageModeling", encoder_stride=8),
        images(),
        {"bool_masked_pos": torch.arange(32).view(2, 16) % 3 == 0},
        OPS,
    ),
    "deit": (lambda: vit("DeiTForImageClassificationWithTeacher", "DeiTConfig"), images(), {}, OPS),
    "mae": (
        lambda: vit("ViTMAEForPreTraining", "ViTMAEConfig", **DECODER),
        images(),
        {"noise": torch.linspace(0, 50, 32).sin().view(2, 16)},
        OPS,
    ),
    "msn": (lambda: vit("ViTMSNForImageClassification", "ViTMSNConfig"), images(), {}, OPS),
    "ijepa": (lambda: vit("IJepaModel", "IJepaConfig", hidden_act="gelu_pytorch_tanh"), images(), {}, OPS),
    "vivit": (
        lambda: vit("VivitModel", "VivitConfig", num_frames=2, tubelet_size=[1, 8, 8]),
        lambda: (torch.randn(2, 2, 3, 32, 32),),
        {},
        OPS,
    ),
    "ast": (
        lambda: hf.ASTModel(
            hf.ASTConfig(
                **WIDTHS, **MLP, patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16
            )  # type: ignore[arg-type]
        ),
        lambda: (torch.randn(2, 32, 16),),
        {},
        OPS,
    ),
    "dinov2": (dinov2, images(), {}, OPS),
    "tipsv2": (lambda: dinov2("Tipsv2VisionModel", "Tipsv2VisionConfig"), images(), {}, OPS),
    "dinov2, SwiGLU": (lambda: dinov2(use_swiglu_ffn=True), images(), {}, OPS - {"mlp"} | {"glu_mlp"}),
    "dinov2, backbone": (lambda: dinov2("Dinov2Backbone", out_features=["stage1", "stage2"]), images(), {}, OPS),
    "dinov2, registers": (
        lambda: dinov2("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=3),
        images(),
        {},
        OPS,
    ),
    "dinov3": (dinov3, images(), {}, ROPED),
    "dinov3, eager": (lambda: dinov3(attn_implementation="eager"), images(), {}, ROPED),
    "dinov3, SwiGLU": (
        lambda: dinov3(use_gated_mlp=True, mlp_bias=False),
        images(40, 32),
        {},
        ROPED - {"mlp"} | {"glu_mlp"},
    ),
    "eomt": (
        lambda: vit(
            "EomtDinov3ForUniversalSegmentation",
            "EomtDinov3Config",
            **{"num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1, "pos_embed_rescale": None},
        ),
        images(),
        {},
        ROPED,
    ),
    "clip, images": (lambda: vit("CLIPVisionModelWithProjection", "CLIPVisionConfig"), images(), {}, OPS),
    "clip, text": (lambda: text("CLIPTextModel", "CLIPTextConfig"), words, {}, OPS - {"patch_embed"}),
    "clip, padded text": (
        lambda: text("CLIPTextModel", "CLIPTextConfig"),
        words,
        {"attention_mask": PADDING},
        OPS - {"patch_embed"},
    ),
    "clip, eager text": (
        lambda: text("CLIPTextModel", "CLIPTextConfig", attn_implementation="eager"),
        words,
        {"attention_mask": PADDING},
        OPS - {"patch_embed"},
    ),
    "metaclip2": (lambda: vit("MetaClip2VisionModel", "MetaClip2VisionConfig"), images(), {}, OPS),
    "altclip": (lambda: vit("AltCLIPVisionModel", "AltCLIPVisionConfig"), images(), {}, OPS),
    "clipseg": (lambda: vit("CLIPSegVisionModel", "CLIPSegVisionConfig"), images(), {}, OPS),
    "xclip, text": (lambda: text("XCLIPTextModel", "XCLIPTextConfig"), words, {}, OPS - {"patch_embed"}),
    "siglip, images": (
        lambda: vit("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
        images(),
        {},
        OPS,
    ),
    "siglip, text": (
        lambda: text("SiglipTextModel", "SiglipTextConfig"),
        words,
        {"attention_mask": PADDING},
        OPS - {"patch_embed"},
    ),
    "siglip2": (
        lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(**WIDTHS, **MLP, patch_size=8, num_patches=16, vision_use_head=False)  # type: ignore[arg-type]
        ),
        patches,
        {},
        OPS - {"patch_embed"},
    ),
}


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], set[str]]:
    build, inputs, keywords, ops = MODELS[name]
    torch.manual_seed(0)
    model = build()
    fused.stir(model)
    return model.train(), inputs(), keywords, ops


def close(got: dict[str, Tensor], own: dict[str, Tensor], relative: float) -> None:
    """Hold numbers to the stock model's; not a bias on k, whose gradient is 0 and made of rounding alone."""
    assert got.keys() == own.keys()
    for key, tensor in own.items():
        if not key.endswith("k_proj.bias"):
            assert (got[key] - tensor).norm() <= relative * tensor.norm(), key
