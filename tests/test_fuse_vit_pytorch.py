"""vk.fuse on vit-pytorch: its own files, and what looks like them and is not."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

import fused
import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk

peers.import_timm()  # torchvision's schemas, which vit_pytorch imports ask for
if importlib.util.find_spec("vit_pytorch") is None:
    pytest.skip("vit_pytorch is not installed", allow_module_level=True)
from vit_pytorch import simple_vit  # noqa: E402

OPS = {"linear", "attention_qkv", "add_layer_norm", "mlp"}
WIDTHS = {"num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16, "mlp_dim": 64}
SQUARE = {"image_size": 32, "patch_size": 8, **WIDTHS}
LINE = {"seq_len": 32, "patch_size": 8, **WIDTHS}
VIDEO = {"image_size": 16, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2, **WIDTHS}
IMAGE, SERIES, CLIP = (2, 3, 32, 32), (2, 3, 32), (2, 3, 4, 16, 16)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "vit": ("vit.ViT", SQUARE, IMAGE),
    "vit, mean": ("vit.ViT", {**SQUARE, "pool": "mean"}, IMAGE),
    "vit, one head of the width": ("vit.ViT", {**SQUARE, "heads": 1, "dim_head": 48}, IMAGE),
    "vit, inner width of its own": ("vit.ViT", {**SQUARE, "dim_head": 24}, IMAGE),
    "simple_vit": ("simple_vit.SimpleViT", SQUARE, IMAGE),
    "vit_1d": ("vit_1d.ViT", LINE, SERIES),
    "vit_3d": ("vit_3d.ViT", VIDEO, CLIP),
    "simple_vit_1d": ("simple_vit_1d.SimpleViT", LINE, SERIES),
    "simple_vit_3d": ("simple_vit_3d.SimpleViT", VIDEO, CLIP),
    "patch dropout": ("vit_with_patch_dropout.ViT", {**SQUARE, "patch_dropout": 0.0}, IMAGE),
    "register tokens": ("simple_vit_with_register_tokens.SimpleViT", SQUARE, IMAGE),
}
WHOLE = "2 of 2 blocks fused"


def build(path: str, **options: Any) -> nn.Module:
    module, _, name = path.rpartition(".")
    model = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options)
    fused.stir(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str) -> None:
    path, options, shape = MODELS[name]
    explanation = fused.check_parity(build(path, **options), (torch.randn(shape),), ops=OPS)
    assert explanation.summary == WHOLE
    assert set(explanation.blocks) == {"transformer.layers.0", "transformer.layers.1"}


@pytest.mark.parametrize("name", ["vit", "simple_vit"])
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str) -> None:
    path, options, shape = MODELS[name]
    fused.check_parity(build(path, **options), (torch.randn(shape),), ops=OPS, autocast=True, absolute=2e-3)


def test_the_adds_run_with_the_norms_that_follow_them() -> None:
    model = vk.fuse(build("vit.ViT", **SQUARE))
    with vk.record() as calls:
        model(torch.randn(IMAGE))
    assert sum(call.op == "add_layer_norm" for call in calls) == 1 + 2 * 2, "the first norm, and one for each add"


def test_sublayers_alone() -> None:
    model = build("vit.ViT", **SQUARE)
    attn, ff = model.transformer.layers[0]
    tokens = (torch.randn(2, 5, 48, requires_grad=True),)
    fused.check_parity(attn, tokens, ops={"linear", "attention_qkv", "add_layer_norm"})
    fused.check_parity(ff, tokens, ops={"add_layer_norm", "mlp"})


def test_dropout_in_training_is_the_modules_own() -> None:
    model, images = build("vit.ViT", **SQUARE, dropout=0.2), (torch.randn(IMAGE),)
    torch.manual_seed(1)
    own = fused.output_and_gradients(model, images)
    vk.fuse(model)
    torch.manual_seed(1)
    with vk.record() as calls:
        got = fused.output_and_gradients(model, images)
    assert {call.op for call in calls} == {"add_layer_norm", "linear"}
    fused.check_same(got, own)
    reason = "a dropout of attention's weights"
    assert vk.explain(model).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"
    assert vk.explain(model.eval()).summary == WHOLE


def test_recorder_and_extractor_see_what_they_hook() -> None:
    from vit_pytorch.extractor import Extractor
    from vit_pytorch.recorder import Recorder

    model, images = build("vit.ViT", **SQUARE).eval(), torch.randn(IMAGE)
    recorder = Recorder(model)
    expected = recorder(images)
    recorder.eject()
    vk.fuse(model)
    recorder = Recorder(model)
    for got, own in zip(recorder(images), expected, strict=True):
        torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-5)
    assert vk.explain(model).summary == "0 of 2 blocks fused; block 0: a hook on attend; block 1: a hook on attend"
    recorder.eject()
    _, tokens = Extractor(model)(images)
    assert tokens.shape == (2, 17, 48)
    assert vk.explain(model).summary == WHOLE


def test_layers_that_change() -> None:
    model, tokens = vk.fuse(build("vit.ViT", **SQUARE)).transformer, torch.randn(2, 5, 48)

    def check_as_stock() -> None:
        torch.testing.assert_close(model(tokens), vk.unfuse(copy.deepcopy(model))(tokens), atol=1e-5, rtol=1e-5)

    model.layers.append(build("vit.ViT", **SQUARE).transformer.layers[0])
    check_as_stock()
    assert vk.explain(model).summary == "2 of 3 blocks fused; block 2: attn is Attention, which is not fused"
    model.layers[0][0] = nn.Identity()
    check_as_stock()
    model.layers = model.layers[:0]
    check_as_stock()
    assert vk.explain(model).fallbacks == {"": {"it has no layers": 1}}


def test_compile_and_export() -> None:
    model, x = build("vit.ViT", **SQUARE).eval(), torch.randn(IMAGE)
    expected = model(x)
    vk.fuse(model)
    with vk.record() as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert sum(call.op == "add_layer_norm" for call in calls) == 1 + 2 * 2
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- what looks alike


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("deepvit.DeepViT", "attn: it has no attend"),
        ("vit_for_small_dataset.ViT", "attn: it has the parameters temperature, of which nothing is known"),
        ("simple_vit_with_qk_norm.SimpleViT", "attn: it has k_norm, q_norm, of which nothing is known"),
    ],
)
def test_an_attention_that_differs_is_called_and_named(path: str, reason: str) -> None:
    explanation = fused.check_parity(build(path, **SQUARE), (torch.randn(IMAGE),), ops={"add_layer_norm", "mlp"})
    assert explanation.summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("cait.Transformer", {}, "forward takes (x, context), not (x)"),
        ("vit_nd_rotary.Transformer", {}, "forward takes (x, pos, block_mask, mask_fn), not (x)"),
        ("vit_with_patch_merger.Transformer", {}, "it has patch_merger, of which nothing is known"),
        ("parallel_vit.Transformer", {}, "its layers are Parallel and Parallel, of which nothing is known"),
        ("na_vit_nested_tensor.Transformer", {}, "its layers are Attention and Sequential, of which nothing is known"),
    ],
)
def test_a_loop_that_differs_is_declined(path: str, options: dict[str, Any], reason: str) -> None:
    widths = {key: size for key, size in WIDTHS.items() if key != "num_classes"}
    model = build(path, **widths, **options)
    assert vk.explain(model).summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"


class ScaledResidual(simple_vit.Transformer):
    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + 0.9 * x
            x = ff(x) + x
        return self.norm(x)


class Leaky(simple_vit.Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.to_qkv(x).chunk(3, -1))
        weights = self.attend(q @ k.transpose(-1, -2) * self.scale + 0.1 * torch.eye(x.shape[1]))
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("part", "own"), [("Transformer", ScaledResidual), ("Attention", Leaky)])
def test_the_trial_finds_another_formula_of_the_same_structure(
    part: str, own: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simple_vit, part, own)
    model = build("simple_vit.SimpleViT", **SQUARE)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1e-3)  # the difference hides in weights like these
    found = vk.explain(model)
    why = "its structure is known, but not what it computes"
    if part == "Transformer":
        assert list(found.unfused) == ["transformer.layers.0", "transformer.layers.1"]
        assert all(reason.startswith(why) for reason in found.unfused.values())
    else:
        vk.fuse(model)
        assert vk.explain(model).unfused == dict.fromkeys(
            ["transformer.layers.0", "transformer.layers.1"], "attn is Leaky, which is not fused"
        )


@pytest.mark.parametrize(("part", "own"), [("Transformer", ScaledResidual), ("Attention", Leaky)])
def test_a_forward_put_on_a_class_is_no_trial_matter(
    part: str, own: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getattr(simple_vit, part), "forward", own.forward)
    model, x = build("simple_vit.SimpleViT", **SQUARE), torch.randn(IMAGE)
    expected = fused.output_and_gradients(model, (x,))
    with vk.record() as calls:
        fused.check_same(fused.output_and_gradients(vk.fuse(model), (x,)), expected)
    assert {call.op for call in calls} == (OPS if part == "Transformer" else OPS - {"linear", "attention_qkv"})
    assert len(vk.explain(model).unfused) == 2
