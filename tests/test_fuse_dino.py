"""vk.fuse on the blocks of DINOv2 and DINOv3, known by their structure; the copies are in `dino_blocks`."""

from __future__ import annotations

from typing import Any

import dino_blocks as dino
import fused
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk

DIM, HEADS = 48, 3
OPS = {"linear", "attention_qkv", "add_layer_norm", "mlp"}
ROPED = OPS | {"rotary_qkv"}
WHOLE = "2 of 2 blocks fused"


def encoder(block: type[nn.Module] = dino.Block, **options: Any) -> nn.Module:
    model = dino.Encoder([block(DIM, HEADS, mlp_ratio=2, **options) for _ in range(2)], DIM)
    fused.stir(model)
    return model


def dinov3(**options: Any) -> nn.Module:
    """With weights: the mask of k's bias is there."""
    model = dino.Encoder([dino.SelfAttentionBlock(DIM, HEADS, ffn_ratio=2, **options) for _ in range(2)], DIM)
    fused.stir(model)
    return load(model)


def load(model: nn.Module) -> nn.Module:
    for name, buffer in model.named_buffers():
        assert name.endswith("qkv.bias_mask")
        buffer.copy_(torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(DIM))
    return model


def tokens(batch: int = 2, count: int = 10) -> Tensor:
    return torch.randn(batch, count, DIM, requires_grad=True)


def rope(side: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return dino.rope_of(side, side, DIM // HEADS, dtype)


V2: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, OPS),
    "LayerScale": ({"init_values": 0.3}, OPS),
    "later attention": ({"attn_class": dino.CausalAttention}, OPS),
    "memory-efficient attention": ({"attn_class": dino.MemEffAttention}, OPS),
    "SwiGLU": ({"ffn_layer": dino.SwiGLUFFN}, OPS - {"mlp"} | {"glu_mlp"}),
    "eps 1e-6": ({"norm_layer": lambda dim: nn.LayerNorm(dim, eps=1e-6)}, OPS),
    "list block": ({"block": dino.NestedTensorBlock, "attn_class": dino.MemEffAttention, "init_values": 0.3}, OPS),
}
V3: dict[str, tuple[dict[str, Any], bool, set[str]]] = {
    "plain": ({}, False, OPS),
    "rope": ({}, True, ROPED),
    "LayerScale, rope": ({"init_values": 0.3}, True, ROPED),
    "no mask, rope": ({"mask_k_bias": False}, True, ROPED),
    "SwiGLU, rope": ({"ffn_layer": dino.ThreeSwiGLUFFN}, True, ROPED - {"mlp"} | {"glu_mlp"}),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", V2)
def test_dinov2(name: str, autocast: bool) -> None:
    options, ops = V2[name]
    absolute = 2e-3 if autocast else None
    explanation = fused.check_parity(encoder(**options), (tokens(),), ops=ops, autocast=autocast, absolute=absolute)
    assert explanation.summary == WHOLE
    assert {row.part for row in explanation.rows} == {"attn", "attn residual", "mlp", "mlp residual"}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", V3)
def test_dinov3(name: str, autocast: bool) -> None:
    options, with_rope, ops = V3[name]
    absolute = 2e-3 if autocast else None
    keywords = {"ropes": rope(3)} if with_rope else {}  # a class token, and nine patches
    explanation = fused.check_parity(
        dinov3(**options), (tokens(),), keywords, ops=ops, autocast=autocast, absolute=absolute
    )
    assert explanation.summary == WHOLE


def test_positions_are_turned_in_their_own_dtype() -> None:
    model, x, ropes = dinov3(), tokens(), rope(3, torch.bfloat16)
    own = fused.output_and_gradients(model, (x,), {"ropes": ropes})
    exact = fused.output_and_gradients(model, (x,), {"ropes": rope(3)})
    got = fused.output_and_gradients(vk.fuse(model), (x,), {"ropes": ropes})
    for name, tensor in own.items():
        rounding = (tensor - exact[name]).norm()
        assert (got[name] - tensor).norm() <= 0.1 * rounding + 1e-5, name


@pytest.mark.parametrize("version", [2, 3])
def test_a_list_of_crops(version: int) -> None:
    crops = (tokens(2, 10), tokens(3, 5))
    if version == 2:
        model, keywords, ops = encoder(dino.NestedTensorBlock, attn_class=dino.MemEffAttention), {}, OPS
    else:
        model, keywords, ops = dinov3(), {"ropes": [rope(3), rope(2)]}, ROPED
    explanation = fused.check_parity(model, crops, keywords, ops=ops)
    assert explanation.summary == WHOLE
    assert explanation.fallbacks == {}


def test_adds_within_a_block_run_with_the_norms_that_follow_them() -> None:
    model = vk.fuse(encoder(dino.NestedTensorBlock, attn_class=dino.MemEffAttention))
    with vk.record() as calls:
        model(tokens(2, 10), tokens(3, 5))
    assert sum(call.op == "add_layer_norm" for call in calls) == 2 * 2 * 2, "a norm, and an add with one"
    with vk.record() as compiled:
        torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(2, 10), tokens(3, 5))
    assert [call.op for call in compiled] == [call.op for call in calls]


def test_weights_may_come_after_fuse() -> None:
    torch.manual_seed(0)
    own = dinov3()
    model = dino.Encoder([dino.SelfAttentionBlock(DIM, HEADS, ffn_ratio=2) for _ in range(2)], DIM)
    assert model.blocks[0].attn.qkv.bias_mask.isnan().all()
    vk.fuse(model, strict=True)
    x = tokens()
    assert model(x).isnan().any(), "as the block's own code answers before its weights are there"
    model.load_state_dict(own.state_dict())
    with vk.record() as calls:
        got = model(x, ropes=rope(3))
    torch.testing.assert_close(got, own(x, ropes=rope(3)), atol=1e-5, rtol=1e-5)
    assert {call.op for call in calls} == ROPED


@pytest.mark.parametrize("version", [2, 3])
def test_compile_and_export(version: int) -> None:
    x, keywords = tokens().detach(), {} if version == 2 else {"ropes": rope(3)}
    model = encoder(init_values=0.3) if version == 2 else dinov3(init_values=0.3)
    expected = model.eval()(x, **keywords)
    vk.fuse(model)
    with vk.record() as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x, **keywords)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert sum(call.op == "add_layer_norm" for call in calls) == 2 * 2
    program = torch.export.export(model, (x,), keywords)
    torch.testing.assert_close(program.module()(x, **keywords), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ random in training


def test_the_same_seed_drops_the_same_paths() -> None:
    model, x = encoder(drop_path=0.1, init_values=0.3), (tokens(8),)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append((fused.output_and_gradients(model, x), torch.get_rng_state()))
        vk.fuse(model)
    (own, state), (got, after) = runs
    assert torch.equal(state, after)
    fused.check_same(got, own)
    model.eval()
    assert (model(*x) - own["output 0"]).norm() > 0.01 * own["output 0"].norm(), "paths were dropped"
    assert vk.explain(model).summary == WHOLE


SUBSET = "drop_path 0.3 in training: it runs a subset of the samples"


@pytest.mark.parametrize("version", [2, 3])
def test_a_subset_of_the_samples_is_the_blocks_own_code(version: int) -> None:
    model = encoder(drop_path=0.3) if version == 2 else dinov3(drop_path=0.3)
    keywords = {} if version == 2 else {"ropes": rope(3)}
    x = (tokens(8),)
    torch.manual_seed(4)
    own = fused.output_and_gradients(model, x, keywords)
    vk.fuse(model)
    torch.manual_seed(4)
    with vk.record() as calls:
        got = fused.output_and_gradients(model, x, keywords)
    heads = {"linear", "attention_qkv"} if version == 2 else {"rotary_qkv", "attention_qkv"}
    assert {call.op for call in calls} == heads | {"mlp"}
    fused.check_same(got, own)
    explanation = vk.explain(model)
    assert explanation.summary == f"0 of 2 blocks fused; block 0: {SUBSET}; block 1: {SUBSET}"
    assert explanation.fallbacks["blocks.0"] == {SUBSET: 1}
    assert vk.explain(model.eval()).summary == WHOLE


def test_a_list_in_training_with_drop_path_is_the_blocks_own_code() -> None:
    model = encoder(dino.NestedTensorBlock, attn_class=dino.MemEffAttention, drop_path=0.05)
    crops = (tokens(4, 10), tokens(4, 5))
    torch.manual_seed(4)
    own = model(*crops)
    vk.fuse(model)
    torch.manual_seed(4)
    for got, expected in zip(model(*crops), own, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert list(vk.explain(model).fallbacks["blocks.0"]) == [
        "called with a list in training with drop_path: it runs subsets of the samples"
    ]


@pytest.mark.parametrize("attention", [dino.Attention, dino.CausalAttention])
def test_dropout_in_training_is_the_modules_own(attention: type[nn.Module]) -> None:
    model, x = encoder(attn_class=attention, attn_drop=0.2, drop=0.1), (tokens(),)
    torch.manual_seed(4)
    own = fused.output_and_gradients(model, x)
    vk.fuse(model)
    torch.manual_seed(4)
    got = fused.output_and_gradients(model, x)
    fused.check_same(got, own)
    reason = "a dropout of attention's weights"
    assert vk.explain(model).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"


# ------------------------------------------------------------------------------------------------- what looks alike


class PostNormBlock(dino.Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.ls1(self.attn(x)))
        return self.norm2(x + self.ls2(self.mlp(x)))


class MaskedBlock(dino.Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Interleaved(dino.SelfAttention):
    """Another convention of rotary positions."""

    def apply_rope(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        sin, cos = rope
        prefix = q.shape[-2] - sin.shape[-2]
        turned = []
        for each in (q, k):
            patches = each[:, :, prefix:]
            pairs = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
            turned.append(torch.cat([each[:, :, :prefix], patches * cos + pairs * sin], dim=-2))
        return turned

    def forward(self, x: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        return super().forward(x, attn_bias, rope)


def test_another_formula_of_the_same_structure_is_declined() -> None:
    model = encoder(PostNormBlock, init_values=1e-5)
    vk.fuse(model)  # attention and feed-forward
    assert all("not what it computes" in reason for reason in vk.explain(model).unfused.values())
    assert len(vk.explain(model).unfused) == 2


def test_another_argument_is_named() -> None:
    reason = "forward takes (x, mask), not (x)"
    assert vk.explain(encoder(MaskedBlock)).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"


def test_another_convention_of_positions_is_declined() -> None:
    attn = load(Interleaved(DIM, HEADS))
    with pytest.raises(ValueError, match="not what it computes"):
        vk.fuse(attn)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "meta"])
def test_the_trial_leaves_the_model_alone(kind: str) -> None:
    seen: list[Tensor] = []
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = encoder(dino.NestedTensorBlock, init_values=1e-5)
    model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert vk.explain(vk.fuse(model)).summary == WHOLE
    assert torch.equal(state, torch.get_rng_state())
    assert not seen
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, weights[name])


def test_a_wrapped_projection_is_called() -> None:
    """It has no weight to ask for a dtype."""

    class Wrapped(nn.Sequential):
        pass

    model, x = dinov3(), torch.randn(2, 6, DIM)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.proj = Wrapped(block.attn.proj)  # type: ignore[union-attr]
    ropes = {"ropes": dino.rope_of(1, 5, DIM // HEADS)}
    expected = fused.output_and_gradients(model, (x,), ropes)
    vk.fuse(model)
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(model, (x,), ropes), expected)
    assert "attention" in {call.op for call in calls}
