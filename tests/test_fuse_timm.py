"""vk.fuse on timm's models: small random ones of each family, held to their own numbers."""

from __future__ import annotations

import functools
from typing import Any

import fused
import peers
import pytest
import torch
from timm_vit import OPS, timm, vit
from torch import nn
from torch_layers import Adds

import vitkernels as vk

APART = OPS - {"attention_qkv"} | {"attention"}
TURNED = OPS | {"rotary_qkv"}  # rotary positions, or norms of q and k
WHOLE = "2 of 2 blocks fused"


def named(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**peers.SIZES, **options})


MODELS: dict[str, tuple[Any, set[str]]] = {
    "plain": (lambda: vit(), OPS),
    "registers": (lambda: vit(reg_tokens=3), OPS),
    "layer scale": (lambda: vit(init_values=0.5), OPS),
    "registers, no_embed_class": (lambda: vit(reg_tokens=2, no_embed_class=True), OPS),
    "qk_norm": (lambda: vit(qk_norm=True), TURNED),
    "qk_norm, scale_attn_norm": (lambda: vit(qk_norm=True, scale_attn_norm=True), TURNED),
    "no class token": (lambda: vit(class_token=False, global_pool="avg"), OPS),
    "average pooling": (lambda: vit(global_pool="avg"), OPS),
    "map pooling": (lambda: vit(global_pool="map", class_token=False), OPS),
    "every token": (lambda: vit(global_pool="", num_classes=0), OPS),
    "no qkv bias": (lambda: vit(qkv_bias=False), OPS),
    "no biases": (lambda: vit(qkv_bias=False, proj_bias=False), OPS),
    "tanh GELU": (lambda: vit(act_layer="gelu_tanh"), OPS),
    "quick GELU": (lambda: vit(act_layer="quick_gelu"), OPS),
    "SiLU": (lambda: vit(act_layer="silu"), OPS),
    "ReLU": (lambda: vit(act_layer="relu"), OPS),
    "SwiGLU": (lambda: vit(mlp_layer=timm.layers.SwiGLU), OPS - {"mlp"} | {"glu_mlp"}),
    "scale_mlp_norm": (lambda: vit(scale_mlp_norm=True), OPS - {"mlp"}),
    "packed SwiGLU": (lambda: vit(mlp_layer=timm.layers.SwiGLUPacked), OPS - {"mlp"} | {"glu_mlp"}),
    "GEGLU, gate last": (lambda: vit(mlp_layer=timm.layers.GluMlp), OPS - {"mlp"} | {"glu_mlp"}),
    "head width 72": (lambda: vit(embed_dim=144, num_heads=2), OPS),
    "head width 80": (lambda: vit(embed_dim=160, num_heads=2), OPS),
    "head width 88": (lambda: vit(embed_dim=176, num_heads=2), OPS),
    "dynamic_img_size": (lambda: vit(img_size=24, dynamic_img_size=True), OPS),
    "dynamic_img_pad": (lambda: vit(img_size=30, dynamic_img_size=True, dynamic_img_pad=True, patch_size=8), OPS),
    "pre_norm": (lambda: vit(pre_norm=True), OPS),
    "fc_norm": (lambda: vit(fc_norm=True, global_pool="avg"), OPS),
    "eps 1e-5": (lambda: vit(norm_layer=lambda *args, **keywords: nn.LayerNorm(*args, eps=1e-5, **keywords)), OPS),
    "RMSNorm": (lambda: vit(norm_layer=timm.layers.RmsNorm), OPS - {"add_layer_norm"} | {"add_rms_norm"}),
    "torch's RMSNorm": (
        lambda: vit(norm_layer=functools.partial(nn.RMSNorm, eps=1e-5)),
        OPS - {"add_layer_norm"} | {"add_rms_norm"},
    ),
    "deit": (lambda: named("deit_tiny_patch16_224"), OPS),
    "deit, distilled": (lambda: named("deit_tiny_distilled_patch16_224"), OPS),
    "deit3": (lambda: named("deit3_small_patch16_224"), OPS),
    "clip": (lambda: named("vit_base_patch32_clip_224", pre_norm=True), OPS),
    "clip, quick GELU": (lambda: named("vit_base_patch32_clip_quickgelu_224"), OPS),
    "siglip": (lambda: named("vit_base_patch16_siglip_224"), OPS),
    "dinov2": (lambda: named("vit_small_patch14_dinov2"), OPS),
    "dinov2, registers": (lambda: named("vit_small_patch14_reg4_dinov2"), OPS),
    "dinov3": (lambda: named("vit_small_patch16_dinov3"), TURNED),
    "eva02": (
        lambda: named("eva02_tiny_patch14_224", num_heads=3, mlp_ratio=4 * 2 / 3),
        TURNED - {"mlp"} | {"glu_mlp"},
    ),
    # its frequencies are learned
    "rope, mixed": (lambda: named("vit_small_patch16_rope_mixed_224"), APART),
    "perception encoder": (lambda: named("vit_pe_core_tiny_patch16_384"), TURNED),
    "beit": (lambda: named("beit_base_patch16_224"), OPS),
    "beitv2": (lambda: named("beitv2_base_patch16_224"), OPS),
    "relpos": (lambda: named("vit_relpos_small_patch16_224", rel_pos_type="bias", init_values=0.5), OPS),
    "relpos, qk_norm": (
        lambda: named("vit_relpos_small_patch16_224", rel_pos_type="bias", qk_norm=True, init_values=None),
        TURNED,
    ),
    "GeGLU": (lambda: vit(mlp_layer=timm.models.vitamin.GeGluMlp), OPS - {"mlp"} | {"glu_mlp"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str) -> None:
    build, ops = MODELS[name]
    torch.manual_seed(0)
    model = build()
    fused.stir(model)
    explanation = fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=ops)
    assert explanation.summary == WHOLE


@pytest.mark.parametrize("name", ["plain", "layer scale", "qk_norm", "average pooling", "dinov3", "beit", "SwiGLU"])
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str) -> None:
    build, ops = MODELS[name]
    torch.manual_seed(0)
    model = build()
    fused.stir(model)
    # the gradient of a bias on k is 0: what comes out is rounding alone, beside other gradients of about 1
    fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=ops, autocast=True, absolute=2e-3)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["vit", "layer scale", "eva", "beit"])
def test_the_same_seed_drops_the_same_paths(name: str, autocast: bool) -> None:
    rate = {"drop_path_rate": 0.5}
    build = {
        "vit": lambda: vit(depth=3, **rate),
        "layer scale": lambda: vit(depth=3, init_values=0.5, **rate),
        "eva": lambda: named("eva02_tiny_patch14_224", depth=3, mlp_ratio=4 * 2 / 3, **rate),
        "beit": lambda: named("beit_base_patch16_224", depth=3, **rate),
    }[name]
    model, images = build(), torch.randn(6, 3, 32, 32)
    fused.stir(model)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append((fused.output_and_gradients(model, (images,), autocast=autocast), torch.get_rng_state()))
        vk.fuse(model)
    (own, state), (got, after) = runs
    assert torch.equal(state, after)
    for key, tensor in own.items():
        assert (got[key] - tensor).norm() <= (0.03 if autocast else 1e-5) * tensor.norm() + 1e-5, key
    torch.manual_seed(4)
    other = fused.output_and_gradients(model, (images,), autocast=autocast)
    assert (other["output 0"] - own["output 0"]).norm() > 0.1 * own["output 0"].norm()


@pytest.mark.parametrize(
    ("rates", "reason", "ran"),
    [
        ({"attn_drop_rate": 0.2}, "a dropout of attention's weights", {"patch_embed", "add_layer_norm", "mlp"}),
        ({"proj_drop_rate": 0.2}, "a dropout after the activation", OPS - {"mlp"}),
    ],
    ids=["attention", "projections"],
)
def test_dropout_in_training_is_the_modules_own(rates: dict[str, float], reason: str, ran: set[str]) -> None:
    model, images = vit(**rates), (torch.randn(4, 3, 32, 32),)
    fused.stir(model)
    torch.manual_seed(1)
    own = fused.output_and_gradients(model, images)
    vk.fuse(model)
    torch.manual_seed(1)
    with vk.record() as calls:
        got = fused.output_and_gradients(model, images)
    assert {call.op for call in calls} == ran
    fused.check_same(got, own)
    assert vk.explain(model).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"
    assert vk.explain(model.eval()).summary == WHOLE


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_masks(kind: str) -> None:
    model = vit(class_token=False, global_pool="avg")
    fused.stir(model)
    mask = torch.rand(2, 1, 16, 16) > 0.3 if kind == "bool" else torch.randn(2, 3, 16, 16)
    keywords = {"is_causal": True} if kind == "causal" else {"attn_mask": mask | mask.mT if kind == "bool" else mask}
    fused.check_parity(model, (torch.randn(2, 3, 32, 32),), keywords, ops=OPS)


def test_the_residual_add_runs_with_the_next_norm_from_block_to_block() -> None:
    model, images = vit(depth=3), torch.randn(2, 3, 32, 32)
    vk.fuse(model)
    with vk.record() as calls, Adds() as adds:
        model(images)
    # the first norm alone, then one for each of the six residual adds but the last, which is torch's
    assert [call.op for call in calls].count("add_layer_norm") == 1 + 5
    assert adds.count == 2, "the last one, and that of the positions"


def test_blocks_that_no_rule_knows_are_named() -> None:
    class Bare(nn.Module):
        def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
            super().__init__()
            block = timm.models.vision_transformer.Block(dim, num_heads)
            self.attn, self.mlp = block.attn, block.mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.attn(x))  # type: ignore[no-any-return]

    model = timm.models.VisionTransformer(**peers.SIZES, block_fn=Bare)
    explanation = vk.explain(vk.fuse(model))
    reason = f"no rule for {Bare.__module__}.{Bare.__qualname__}"
    assert explanation.summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"
    served = {row.module for row in explanation.rows if row.ops}
    assert {"blocks.0.attn", "blocks.0.mlp", "patch_embed.proj"} <= served


def test_a_rms_norm_is_fused_too() -> None:
    model = vit(norm_layer=timm.layers.RmsNorm)
    fused.stir(model)
    ops = OPS - {"add_layer_norm"} | {"add_rms_norm"}
    explanation = fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=ops)
    assert not explanation.unfused


def test_another_norm_is_said_and_runs_as_it_is() -> None:
    model = vit(norm_layer=timm.layers.SimpleNorm)
    fused.stir(model)
    explanation = fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=OPS - {"add_layer_norm"})
    assert explanation.unfused["blocks.1"] == "the norm of attn is SimpleNorm, not LayerNorm"


def test_learned_positions_are_turned_without_their_kernels() -> None:
    """Kernels have no gradients of sines and cosines; without gradients there is nothing to decline."""
    model, images = named("vit_small_patch16_rope_mixed_224"), torch.randn(2, 3, 32, 32)
    vk.fuse(model)
    for grad, wanted in ((True, APART), (False, TURNED)):
        with torch.set_grad_enabled(grad), vk.record() as calls:
            model(images)
        assert {call.op for call in calls} == wanted
        assert not any(call.declined for call in calls)
    attention = {row.ops for row in vk.explain(model).rows if row.module == "blocks.0" and row.part == "attn"}
    assert attention == {"linear, rotary, attention, linear"}
