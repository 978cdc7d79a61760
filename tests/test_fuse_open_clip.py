"""vk.fuse on open_clip: whole small models with both towers, and their blocks with masks and other tokens."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import fused
import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk

peers.import_timm()  # torchvision's schemas, which open_clip's imports ask for
if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip is not installed", allow_module_level=True)

coca_model, clip_model, transformer = (
    importlib.import_module(f"open_clip.{name}") for name in ("coca_model", "model", "transformer")
)

WIDTH, HEADS, WORDS, LENGTH = 48, 3, 50, 7
VISION = {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": WIDTH, "heads": HEADS, "layers": 2}
OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}
APART = OPS - {"attention_qkv"} | {"attention"}
WHOLE = "4 of 4 blocks fused"


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A model with two blocks in each tower."""
    model = clip_model.CLIP(
        embed_dim=32,
        vision_cfg=clip_model.CLIPVisionCfg(**{**VISION, **(vision or {})}),
        text_cfg=clip_model.CLIPTextCfg(**{**TEXT, **(text or {})}),
        **options,
    )
    fused.stir(model)
    return model


def custom(**features: bool) -> nn.Module:
    return clip({"block_type": "custom", **features}, {"block_type": "custom", **features})


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randint(1, WORDS, (2, LENGTH))  # 0 is padding


MODELS: dict[str, tuple[Any, set[str]]] = {
    "plain": (lambda: clip(), OPS),
    "quick GELU": (lambda: clip(quick_gelu=True), OPS),
    "LayerScale": (lambda: clip({"ls_init_value": 0.3}, {"ls_init_value": 0.3}), OPS),
    "average pooling": (lambda: clip({"pool_type": "avg"}), OPS),
    "norm after pooling": (lambda: clip({"final_ln_after_pool": True}), OPS),
    "attentional pooling": (lambda: clip({"attentional_pool": True, "attn_pooler_heads": 2}), OPS | {"attention"}),
    "no causal mask": (lambda: clip(text={"no_causal_mask": True}), OPS),
    "custom": (lambda: custom(), OPS),
    "custom, qk norm": (lambda: custom(qk_norm=True), APART),
    "custom, scaled heads": (lambda: custom(scale_heads=True), APART),
    "custom, norm inside": (lambda: custom(scale_attn_inner=True), OPS),
    "custom, norm behind": (lambda: custom(scale_attn=True), OPS),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str) -> None:
    build, ops = MODELS[name]
    explanation = fused.check_parity(build(), inputs(), ops=ops)
    assert explanation.summary == WHOLE


@pytest.mark.parametrize("name", ["plain", "LayerScale", "custom, qk norm"])
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str) -> None:
    build, ops = MODELS[name]
    fused.check_parity(build(), inputs(), ops=ops, autocast=True, absolute=2e-3)


def test_a_norm_in_the_feed_forward_is_named() -> None:
    reason = "a norm between c_fc and c_proj"
    explanation = fused.check_parity(custom(scale_fc=True), inputs(), ops=OPS - {"mlp"})
    assert explanation.unfused == dict.fromkeys(explanation.blocks, reason)


def test_weights_in_bfloat16_and_norms_in_float32() -> None:
    model = clip(cast_dtype=torch.bfloat16)
    exact = clip().double()  # its norms take any dtype
    exact.load_state_dict(model.state_dict())
    clip_model.convert_weights_to_lp(model, dtype=torch.bfloat16)
    image, text = inputs()
    truth = exact(image.double(), text)[:2]
    own = model(image.bfloat16(), text)[:2]
    vk.fuse(model)
    with vk.record() as calls:
        got = model(image.bfloat16(), text)[:2]
    assert {call.op for call in calls} == OPS
    for tower, mine, stock in zip(truth, got, own, strict=True):
        assert mine.dtype == stock.dtype
        assert (mine.double() - tower).norm() <= 2 * (stock.double() - tower).norm()


def test_the_adds_run_with_the_norms_that_follow_them() -> None:
    model = vk.fuse(clip())
    with vk.record() as calls:
        model.encode_text(inputs()[1])
    assert sum(call.op == "add_layer_norm" for call in calls) == 2 * 2, "for each block a norm, and an add with one"
    assert sum(call.op == "linear" for call in calls) == 2 * 2, "one product for q, k and v, one for the heads"


def test_one_product_for_queries_keys_and_values_in_training_and_eval() -> None:
    model, (image, _) = vk.fuse(clip()), inputs()
    trained = model.encode_image(image)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().encode_image(image), trained, atol=1e-5, rtol=1e-5)


def test_patches_are_dropped_as_ever() -> None:
    model, (image, _) = clip({"patch_dropout": 0.5}), inputs()
    torch.manual_seed(3)
    own = model.encode_image(image)
    vk.fuse(model, strict=True)
    torch.manual_seed(3)
    torch.testing.assert_close(model.encode_image(image), own, atol=1e-5, rtol=1e-5)


def test_compile_and_export() -> None:
    model, both = clip().eval(), inputs()
    expected = model(*both)
    vk.fuse(model)
    with vk.record() as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*both)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert sum(call.op == "add_layer_norm" for call in calls) == 2 * 2 * 2
    program = torch.export.export(model, both)
    torch.testing.assert_close(program.module()(*both), expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing() -> None:
    model, both = clip(), inputs()
    expected = fused.output_and_gradients(model, both)
    vk.fuse(model).set_grad_checkpointing()
    got = fused.output_and_gradients(model, both)
    fused.check_same(got, expected)


def test_coca() -> None:
    """Its text has a class token and masks of one for each sample; its decoder looks at the image's tokens."""
    model = coca_model.CoCa(
        embed_dim=WIDTH,
        multimodal_cfg=coca_model.MultimodalCfg(
            **{**TEXT, "heads": HEADS, "layers": 2, "attn_pooler_heads": 2, "mlp_ratio": 2}
        ),
        text_cfg=clip_model.CLIPTextCfg(**{**TEXT, "embed_cls": True, "output_tokens": True}),
        vision_cfg=clip_model.CLIPVisionCfg(
            **VISION, attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5, output_tokens=True
        ),
    )
    torch.nn.init.zeros_(model.text_decoder.text_projection)  # open_clip leaves it as the memory was
    fused.stir(model)
    explanation = fused.check_parity(model, inputs(), {"output_labels": False}, ops=OPS | {"attention"})
    assert explanation.summary == "8 of 8 blocks fused"


# ---------------------------------------------------------------------------------------------------------- blocks


def block(**options: Any) -> nn.Module:
    one = transformer.ResidualAttentionBlock(WIDTH, HEADS, mlp_ratio=2, **options)
    fused.stir(one)
    return one


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, requires_grad=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "causal", "of each head", "bool"])
def test_masks_and_orders_of_axes(kind: str, batch_first: bool) -> None:
    mask = {
        "none": None,
        "causal": torch.full((5, 5), float("-inf")).triu(1),
        "of each head": torch.randn(2 * HEADS, 5, 5),
        "bool": torch.rand(5, 5) > 0.5,  # the block adds it, as the number 1
    }[kind]
    x = tokens(2, 5) if batch_first else tokens(5, 2)
    ops = OPS - {"patch_embed"}
    explanation = fused.check_parity(block(batch_first=batch_first), (x,), {"attn_mask": mask}, ops=ops)
    assert explanation.summary == "1 of 1 blocks fused"


def test_the_custom_block_takes_bool_masks_as_left_out() -> None:
    one = transformer.CustomResidualAttentionBlock(WIDTH, HEADS, mlp_ratio=2)
    fused.stir(one)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    fused.check_parity(one, (tokens(2, 5),), {"attn_mask": mask}, ops=OPS - {"patch_embed"})


def test_tokens_of_the_other_tower() -> None:
    one, x, memory = block(is_cross_attention=True), tokens(2, 5), tokens(2, 9)
    ops = OPS - {"patch_embed", "attention_qkv"} | {"attention"}
    fused.check_parity(one, (x, memory, memory), ops=ops)
    expected = one(x, memory, memory.flip(1))
    got = vk.fuse(one)(x, memory, memory.flip(1))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert vk.explain(one).fallbacks == {"": {"called with other keys than values": 1}}


class Doubling(nn.Module):
    """Somebody's own attention, with no more arguments than a block gives it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, attn_mask: Tensor | None) -> Any:
        return 2 * q, None


class CustomDoubling(nn.Module):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("custom", [False, True])
def test_another_attention_in_its_place_is_called_as_the_block_calls_it(custom: bool) -> None:
    one = transformer.CustomResidualAttentionBlock(WIDTH, HEADS, mlp_ratio=2) if custom else block()
    one.attn = CustomDoubling() if custom else Doubling()
    explanation = fused.check_parity(
        one, (tokens(2, 5),), {"attn_mask": torch.zeros(5, 5)}, ops={"add_layer_norm", "mlp"}
    )
    name = type(one.attn).__name__
    assert explanation.summary == f"0 of 1 blocks fused; block 0: attn is {name}, which is not fused"


def test_scaled_cosine_attention_is_named() -> None:
    attention = transformer.Attention(WIDTH, HEADS, scaled_cosine=True)
    assert vk.explain(vk.fuse(attention)).rows[0].why_not == "scaled cosine attention"
