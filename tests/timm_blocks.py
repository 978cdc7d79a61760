"""timm's blocks with windows, pooled keys or norms behind branches: a small one of each, and what it runs fused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from torch import nn

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
peers.import_timm()

D, HEADS = 48, 3
OWN = {"add_layer_norm", "mlp"}


def _made(file: str, cls: str, *sizes: Any, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"timm.models.{file}"), cls)(*sizes, **options)  # type: ignore[no-any-return]


def _maxvit(kind: str, **more: Any) -> nn.Module:
    sizes = {"dim_head": 16, "window_size": (4, 4), "grid_size": (4, 4), "init_values": 0.5, **more}
    config = _made("maxxvit", "MaxxVitTransformerCfg", **sizes)
    return _made("maxxvit", "PartitionAttentionCl", D, kind, config)


def _coatnet(stride: int, **more: Any) -> nn.Module:
    sizes = {"dim_head": 16, "init_values": 0.5, "norm_layer": "layernorm2d", "rel_pos_type": "bias", **more}
    bias = functools.partial(_layer, "RelPosBias", window_size=(8, 8))
    config = _made("maxxvit", "MaxxVitTransformerCfg", **sizes)
    return _made("maxxvit", "TransformerBlock2d", D, D, stride, bias, config)


Row = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], set[str]]
IMAGE, TOKENS = (2, 8, 8, D), (2, 16, D)
PACKED = {*OWN, "linear", "attention_qkv"}
REL_POS = {*OWN, "linear", "attention_rel_pos"}
APART = {*OWN, "linear", "attention"}
_RELPOS = {"rel_pos_cls": lambda **options: _layer("RelPosBias", window_size=(4, 4), **options)}


def _layer(cls: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module("timm.layers"), cls)(**options)  # type: ignore[no-any-return]


def _swin(
    version: str = "swin_transformer", cls: str = "SwinTransformerBlock", shift: int = 2, **more: Any
) -> nn.Module:
    return _made(version, cls, D, (8, 8), HEADS, window_size=4, shift_size=shift, **more)


def _swin_v2(shift: int = 2) -> nn.Module:
    return _made("swin_transformer_v2", "SwinTransformerV2Block", D, (8, 8), HEADS, window_size=4, shift_size=shift)


def _swin_cr(**more: Any) -> nn.Module:
    return _made(
        "swin_transformer_v2_cr", "SwinTransformerV2CrBlock", D, HEADS, (8, 8), (4, 4), shift_size=(2, 2), **more
    )


def _hiera(width: int, **more: Any) -> nn.Module:
    units = {"use_mask_unit_attn": True, "window_size": 4, **more}
    return _made("hiera", "HieraBlock", D, width, HEADS, 2.0, **units)


def _hiera_det(width: int, window_size: int = 4, **more: Any) -> nn.Module:
    return _made("hieradet_sam2", "MultiScaleBlock", D, width, HEADS, 2.0, window_size=window_size, **more)


def _class(file: str, cls: str, **more: Any) -> nn.Module:
    return _made(file, cls, D, HEADS, mlp_ratio=2.0, **more)


def _mvit(width: int = D, **more: Any) -> nn.Module:
    pooling = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_kv": (2, 2), "has_cls_token": False, **more}
    return _made("mvitv2", "MultiScaleBlock", D, width, HEADS, (8, 8), 2.0, **pooling)


def _parallel(cls: str, **more: Any) -> nn.Module:
    return _made("vision_transformer", cls, D, HEADS, 2.0, init_values=0.5, **more)


class Tokens(nn.Module):
    """CaiT's block, its class token the first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _class("cait", "LayerScaleBlockClassAttn", init_values=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x[:, 1:], x[:, :1])  # type: ignore[no-any-return]


class Queried(nn.Module):
    """GCViT's block with queries that are the same for all windows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _made("gcvit", "GlobalContextVitBlock", D, (8, 8), HEADS, (4, 4), use_global=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, x[:, :4, ::2].flatten(1, 2))  # type: ignore[no-any-return]


class Placed(nn.Module):
    """Gemma 4's block with the positions of its tokens; some of its projections have limits."""

    def __init__(self, limits: bool = False) -> None:
        super().__init__()
        sizes = {"head_dim": 16, "intermediate_size": 2 * D, "use_clipped_linears": limits}
        self.block = _made("gemma4_vit", "Gemma4Block", D, HEADS, **sizes)
        for name, limit in self.block.named_buffers():
            limit.fill_(-1.5 if name.endswith("min") else 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.linspace(0, 3, x.shape[1])[:, None] * torch.linspace(0.2, 1, 4)
        angles = torch.cat([angles, angles, angles.flip(0), angles.flip(0)], dim=-1).expand(len(x), -1, -1)
        mask = torch.zeros(1, 1, 1, x.shape[1]).masked_fill(torch.arange(x.shape[1]) > 13, -1e9)
        return self.block(x, angles.cos(), angles.sin(), mask)  # type: ignore[no-any-return]


class Pixels(nn.Module):
    """TNT's block; what a patch is made of are its pixels."""

    def __init__(self, legacy: bool) -> None:
        super().__init__()
        self.block = _made("tnt", "Block", D // 4, D, 4, 1, HEADS, legacy=legacy)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block(x[:, 1:].reshape(-1, 4, D // 4), x)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """CoaT's block with the convolutions that it shares with its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        shared = {
            "shared_cpe": _made("coat", "ConvPosEnc", D),
            "shared_crpe": _made("coat", "ConvRelPosEnc", D // HEADS, HEADS, {3: HEADS}),
        }
        self.block = _made("coat", "SerialBlock", D, HEADS, 2.0, **shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, (4, 4))  # type: ignore[no-any-return]


BLOCKS: dict[str, Row] = {
    "swin": (_swin, IMAGE, {}, PACKED),
    "swin, windows that are not shifted": (lambda: _swin(shift=0), IMAGE, {}, PACKED),
    "swin, masks by the call": (lambda: _swin(dynamic_mask=True), IMAGE, {}, PACKED),
    "swin v2": (_swin_v2, IMAGE, {}, APART),
    "swin v2 cr, a norm of the stream": (lambda: _swin_cr(extra_norm=True), IMAGE, {}, APART),
    "maxvit, windows": (lambda: _maxvit("block"), IMAGE, {}, APART),
    "maxvit, grid": (lambda: _maxvit("grid", head_first=False, rel_pos_type="bias_tf"), IMAGE, {}, PACKED),
    "maxvit, a network's bias": (lambda: _maxvit("grid", rel_pos_type="mlp"), IMAGE, {}, APART),
    "coatnet": (lambda: _coatnet(1), (2, D, 8, 8), {}, APART),
    "coatnet, a smaller image": (lambda: _coatnet(2, init_values=None), (2, D, 16, 16), {}, APART),
    "xcit": (lambda: _made("xcit", "XCABlock", D, HEADS, 2.0, eta=0.5), TOKENS, {"H": 4, "W": 4}, OWN),
    "cait": (lambda: _made("cait", "LayerScaleBlock", D, HEADS, 2.0, init_values=0.5), TOKENS, {}, OWN),
    "twins, windows": (lambda: _made("twins", "Block", D, HEADS, 2.0, ws=3), TOKENS, {"size": (4, 4)}, PACKED),
    "twins, a smaller image": (
        lambda: _made("twins", "Block", D, HEADS, 2.0, ws=1, sr_ratio=2),
        TOKENS,
        {"size": (4, 4)},
        APART,
    ),
    "pvt v2": (
        lambda: _made("pvt_v2", "Block", D, HEADS, 2.0, sr_ratio=2),
        TOKENS,
        {"feat_size": [4, 4]},
        APART - {"mlp"},
    ),
    "pvt v2, a pooled image": (
        lambda: _made("pvt_v2", "Block", D, HEADS, 2.0, linear_attn=True),
        TOKENS,
        {"feat_size": [4, 4]},
        APART - {"mlp"},
    ),
    "pvt v2, whole": (lambda: _made("pvt_v2", "Block", D, HEADS, 2.0), TOKENS, {"feat_size": [4, 4]}, APART - {"mlp"}),
    "gcvit": (
        lambda: _made("gcvit", "GlobalContextVitBlock", D, (8, 8), HEADS, (4, 4), use_global=False, layer_scale=0.5),
        IMAGE,
        {},
        PACKED,
    ),
    "gcvit, queries of the image": (lambda: Queried(), IMAGE, {}, APART),
    "sam": (
        lambda: _made(
            "vision_transformer_sam", "Block", D, HEADS, 2.0, use_rel_pos=True, window_size=3, init_values=0.5
        ),
        IMAGE,
        {},
        REL_POS,
    ),
    "sam, whole": (
        lambda: _made("vision_transformer_sam", "Block", D, HEADS, 2.0, use_rel_pos=True, input_size=(8, 8)),
        IMAGE,
        {},
        REL_POS,
    ),
    "sam, other sides": (
        lambda: _made("vision_transformer_sam", "Block", D, HEADS, 2.0, use_rel_pos=True, input_size=(8, 8)),
        (2, 5, 11, D),
        {},
        REL_POS,
    ),
    "sam, no positions": (
        lambda: _made("vision_transformer_sam", "Block", D, HEADS, 2.0, window_size=3),
        IMAGE,
        {},
        PACKED,
    ),
    "convit": (lambda: _made("convit", "Block", D, HEADS, 2.0, use_gpsa=True), TOKENS, {}, OWN),
    "hiera": (lambda: _made("hiera", "HieraBlock", D, D, HEADS, 2.0, init_values=0.5), TOKENS, {}, PACKED),
    "hiera, units": (lambda: _hiera(D), TOKENS, {}, PACKED),
    "hiera, wider": (lambda: _hiera(2 * D, q_stride=4, init_values=0.5), (2, 32, D), {}, APART),
    "hiera, wider by the mean": (lambda: _hiera(2 * D, q_stride=4, use_expand_proj=False), (2, 32, D), {}, APART),
    "sam 2": (lambda: _hiera_det(D), (2, 6, 7, D), {}, PACKED),
    "sam 2, whole": (lambda: _hiera_det(D, window_size=0, init_values=0.5), IMAGE, {}, PACKED),
    "sam 2, wider": (lambda: _hiera_det(2 * D, q_stride=(2, 2)), (2, 6, 10, D), {}, APART),
    "tinyvit": (lambda: _made("tiny_vit", "TinyVitBlock", D, HEADS, 4, 2.0), (2, 6, 7, D), {}, APART),
    "tinyvit, one window": (lambda: _made("tiny_vit", "TinyVitBlock", D, HEADS, 4, 2.0), (2, 4, 4, D), {}, APART),
    "mvit v2": (_mvit, (2, 64, D), {"feat_size": [8, 8]}, REL_POS),
    "mvit v2, a smaller image": (
        lambda: _mvit(2 * D + HEADS * 4, stride_q=(2, 2), stride_kv=(4, 4), expand_attn=True),
        (2, 8 * 6, D),
        {"feat_size": [8, 6]},
        REL_POS,
    ),
    "mvit v2, wider behind": (lambda: _mvit(2 * D, stride_q=(2, 2)), (2, 64, D), {"feat_size": [8, 8]}, REL_POS),
    "mvit v2, class token": (
        lambda: _mvit(2 * D, stride_q=(2, 2), has_cls_token=True, expand_attn=True),
        (2, 65, D),
        {"feat_size": [8, 8]},
        APART,
    ),
    "davit, windows": (lambda: _made("davit", "SpatialBlock", D, HEADS, 4, 2.0), (2, D, 6, 7), {}, PACKED),
    "davit, features": (lambda: _made("davit", "ChannelBlock", D, HEADS, 2.0, v2=True), (2, D, 6, 7), {}, OWN),
    "gemma 4": (Placed, TOKENS, {}, {"add_rms_norm", "linear", "rotary", "attention", "glu_mlp"}),
    "gemma 4, limits": (lambda: Placed(True), TOKENS, {}, {"add_rms_norm", "linear", "rotary", "attention"}),
    "davit, features, first version": (lambda: _made("davit", "ChannelBlock", D, HEADS, 2.0), (2, D, 6, 7), {}, OWN),
    "coat": (Shared, (2, 17, D), {}, OWN),
    "tnt": (lambda: Pixels(False), TOKENS, {}, PACKED),
    "tnt, as it was": (lambda: Pixels(True), TOKENS, {}, PACKED),
    "nest": (lambda: _made("nest", "TransformerLayer", D, HEADS, 2.0), (2, 4, 9, D), {}, PACKED),
    "cait, class token": (Tokens, TOKENS, {}, APART),
    "xcit, class token": (lambda: _class("xcit", "ClassAttentionBlock", eta=0.5), TOKENS, {}, APART),
    "xcit, class token, all normed": (
        lambda: _class("xcit", "ClassAttentionBlock", eta=None, tokens_norm=True),
        TOKENS,
        {},
        APART,
    ),
    "volo, class token": (lambda: _class("volo", "ClassBlock"), TOKENS, {}, APART),
    "volo": (lambda: _made("volo", "Transformer", D, HEADS, 2.0), IMAGE, {}, PACKED),
    "volo, outlook": (lambda: _made("volo", "Outlooker", D, 3, 1, 2, HEADS, 2.0), IMAGE, {}, OWN),
    "side by side": (lambda: _parallel("ParallelScalingBlock"), TOKENS, {}, PACKED - {"mlp"}),
    "side by side, qk-norm, one product behind": (
        lambda: _parallel("ParallelScalingBlock", qk_norm=True, qkv_bias=True, fuse_out_proj=True),
        TOKENS,
        {},
        APART - {"mlp"},
    ),
    "several side by side": (
        lambda: _made("vision_transformer", "ParallelThingsBlock", D, HEADS, init_values=0.5),
        TOKENS,
        {},
        PACKED,
    ),
    "deepseek": (
        lambda: _made("deepseek_vit", "DeepseekVitBlock", D, HEADS),
        TOKENS,
        {},
        {"add_rms_norm", "glu_mlp", "linear", "attention_qkv"},
    ),
    "a norm behind": (lambda: _made("vision_transformer", "ResPostBlock", D, HEADS, 2.0), TOKENS, {}, PACKED),
    "a norm behind, relative bias": (
        lambda: _made("vision_transformer_relpos", "ResPostRelPosBlock", D, HEADS, 2.0, **_RELPOS),
        TOKENS,
        {},
        PACKED,
    ),
    "a norm behind, eva": (lambda: _made("eva", "EvaBlockPostNorm", D, HEADS, mlp_ratio=2.0), TOKENS, {}, PACKED),
}
