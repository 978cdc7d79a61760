"""vk.fuse on timm's blocks whose attention runs its own code, and on NesT's, each held to its own numbers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import fused
import peers
import pytest
import torch
from torch import nn

import vitkernels as vk

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
peers.import_timm()

D, HEADS = 48, 3
AROUND = "0 of 1 blocks fused; 1 of 1 blocks: residual and feed-forward fused, attention its own"
OWN = {"add_layer_norm", "mlp"}


def _made(file: str, cls: str, *sizes: Any, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"timm.models.{file}"), cls)(*sizes, **options)  # type: ignore[no-any-return]


def _maxvit(kind: str) -> nn.Module:
    sizes = {"dim_head": 16, "window_size": (4, 4), "grid_size": (4, 4), "init_values": 0.5}
    config = _made("maxxvit", "MaxxVitTransformerCfg", **sizes)
    return _made("maxxvit", "PartitionAttentionCl", D, kind, config)


Row = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]
IMAGE, TOKENS = (2, 8, 8, D), (2, 16, D)
BLOCKS: dict[str, Row] = {
    "swin": (
        lambda: _made("swin_transformer", "SwinTransformerBlock", D, (8, 8), HEADS, window_size=4, shift_size=2),
        IMAGE,
        {},
    ),
    "maxvit, windows": (lambda: _maxvit("block"), IMAGE, {}),
    "maxvit, grid": (lambda: _maxvit("grid"), IMAGE, {}),
    "xcit": (lambda: _made("xcit", "XCABlock", D, HEADS, 2.0, eta=0.5), TOKENS, {"H": 4, "W": 4}),
    "cait": (lambda: _made("cait", "LayerScaleBlock", D, HEADS, 2.0, init_values=0.5), TOKENS, {}),
    "twins": (lambda: _made("twins", "Block", D, HEADS, 2.0, ws=2), TOKENS, {"size": (4, 4)}),
    "gcvit": (
        lambda: _made("gcvit", "GlobalContextVitBlock", D, (8, 8), HEADS, (4, 4), use_global=False, layer_scale=0.5),
        IMAGE,
        {},
    ),
    "sam": (
        lambda: _made(
            "vision_transformer_sam", "Block", D, HEADS, 2.0, use_rel_pos=True, window_size=3, init_values=0.5
        ),
        IMAGE,
        {},
    ),
    "convit": (lambda: _made("convit", "Block", D, HEADS, 2.0, use_gpsa=True), TOKENS, {}),
    "hiera": (lambda: _made("hiera", "HieraBlock", D, D, HEADS, 2.0, init_values=0.5), TOKENS, {}),
    "nest": (lambda: _made("nest", "TransformerLayer", D, HEADS, 2.0), (2, 4, 9, D), {}),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_every_gradient(name: str, autocast: bool) -> None:
    build, size, keywords = BLOCKS[name]
    torch.manual_seed(0)
    block = build()
    fused.stir(block)
    # batch statistics are rounded by themselves, and parity is the rest's
    block = block.eval() if name == "xcit" else block.train()
    inputs = (torch.randn(size, requires_grad=True),)
    ops = {*OWN, "linear", "attention_qkv"} if name == "nest" else OWN
    explanation = fused.check_parity(
        block, inputs, keywords, ops=ops, autocast=autocast, absolute=4e-3 if autocast else None
    )
    assert explanation.summary == ("1 of 1 blocks fused" if name == "nest" else AROUND)
    assert not explanation.fallbacks


@pytest.mark.parametrize("name", ["swin", "sam", "hiera"])
def test_drop_path_draws_as_ever(name: str) -> None:
    build, size, keywords = BLOCKS[name]
    block = build()
    fused.stir(block)
    for place in ("drop_path1", "drop_path2"):
        setattr(block, place, peers.import_timm().layers.DropPath(0.5))
    inputs, runs = (torch.randn(8, *size[1:], requires_grad=True),), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append((fused.output_and_gradients(block.train(), inputs, keywords), torch.get_rng_state()))
        vk.fuse(block)
    (own, state), (got, after) = runs
    assert torch.equal(state, after)
    fused.check_same(got, own)


def test_a_hook_on_the_feed_forward_is_no_affair_of_the_attentions() -> None:
    block = BLOCKS["cait"][0]()
    block.mlp.register_forward_hook(lambda module, args, output: None)
    explanation = vk.explain(vk.fuse(block))
    assert not explanation.around
    assert (
        explanation.summary
        == "0 of 1 blocks fused; block 0: attn is TalkingHeadAttn, its own: heads that talk to each other"
    )


def test_the_report_says_both_counts() -> None:
    model = nn.ModuleList([BLOCKS["cait"][0](), BLOCKS["nest"][0](), BLOCKS["cait"][0]()])
    explanation = vk.explain(vk.fuse(model))
    assert explanation.summary == (
        "1 of 3 blocks fused; 2 of 3 blocks: residual and feed-forward fused, attention its own"
    )
    assert explanation.to_dict()["around"] == explanation.unfused
    with pytest.raises(RuntimeError, match="heads that talk to each other"):
        vk.fuse(vk.unfuse(model), strict=True)
