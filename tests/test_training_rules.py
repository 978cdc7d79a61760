"""One model of every rule of `vk.fuse`, trained for twenty steps: the losses are the stock model's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import dino_blocks as dino
import fused
import hf_models
import hf_towers
import pytest
import torch
import torch_layers
from ecosystems import ECOSYSTEMS, HEADS, D
from test_fuse_timm import MODELS
from timm_blocks import BLOCKS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.fuse import rules
from vitkernels.fuse.swap import Fused

STEPS = 20
Trained = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # and what it is called with


def _tower(name: str, place: int = 0) -> Trained:
    """A layer of a tower of transformers, the one of its class at this place."""
    model = vk.fuse(hf_towers.tower(name))
    layer = list(hf_towers.layers(model).values())[place]
    vk.unfuse(model)
    return layer, *hf_towers.call_of(layer)


def _transformers(name: str) -> Trained:
    return hf_models.built(name)[:3]


def _block(name: str) -> Trained:
    """A block of timm's."""
    build, size, keywords, _ = BLOCKS[name]
    block = build()
    fused.stir(block)
    return block.train("network" not in name and "cr" not in name), (torch.randn(size),), keywords


def _timm(name: str) -> Trained:
    model = MODELS[name][0]()
    fused.stir(model)
    return model.train(), (torch.randn(2, 3, 32, 32),), {}


def _ecosystem(name: str) -> Trained:
    each = ECOSYSTEMS[name]
    return each.model().train(), each.inputs(), {}


def _dino(kind: type[nn.Module], **options: Any) -> Trained:
    model = dino.Encoder([kind(D, HEADS, **options) for _ in range(2)], D)
    fused.stir(model)
    return model, (torch.randn(2, 7, D),), {}


def _of(build: Callable[[], nn.Module], *sizes: tuple[int, ...]) -> Trained:
    model = build()
    fused.stir(model)
    return model, tuple(map(torch.randn, sizes)), {}


def _custom() -> nn.Module:
    transformer = importlib.import_module("open_clip.transformer")
    return transformer.CustomResidualAttentionBlock(D, HEADS, mlp_ratio=2)  # type: ignore[no-any-return]


def _swin(kind: str) -> nn.Module:
    swin = importlib.import_module("torchvision.models.swin_transformer")
    return getattr(swin, kind)(D, HEADS, [4, 3], [2, 1], 2.0)  # type: ignore[no-any-return]


_KINDS: dict[str, tuple[Callable[[str], Trained], Sequence[str]]] = {
    "": (_ecosystem, list(ECOSYSTEMS)),
    "tower": (_tower, list(hf_towers.TOWERS)),
    "transformers": (_transformers, ("vit", "dinov3", "dinov3, SwiGLU")),
    "block": (_block, list(BLOCKS)),
    "timm": (_timm, ("SwiGLU", "GeGLU", "beit", "eva02", "relpos")),
}
ROWS: dict[str, Callable[[], Trained]] = {
    f"{kind} {name}".strip(): functools.partial(build, name)
    for kind, (build, names) in _KINDS.items()
    for name in names
}
ROWS |= {
    "dinov2, nested": lambda: _dino(dino.NestedTensorBlock, attn_class=dino.MemEffAttention),
    "dinov2, causal, SwiGLU": lambda: _dino(dino.Block, attn_class=dino.CausalAttention, ffn_layer=dino.SwiGLUFFN),
    "dinov3, SwiGLU": lambda: _dino(dino.SelfAttentionBlock, mask_k_bias=False, ffn_layer=dino.ThreeSwiGLUFFN),
    "torch.nn, decoder": lambda: _of(torch_layers.decoder, (2, 5, D), (2, 7, D)),
    "open_clip, custom": lambda: _of(_custom, (2, 7, D)),
    "torchvision, swin": lambda: _of(lambda: _swin("SwinTransformerBlock"), (2, 8, 6, D)),
    "torchvision, swin v2": lambda: _of(lambda: _swin("SwinTransformerBlockV2"), (2, 8, 6, D)),
    "tower florence2, features": lambda: _tower("florence2", 1),
    "tower deepseek_ocr2, encoder": lambda: _tower("deepseek_ocr2", 1),
    "a smaller image of keys": lambda: _of(lambda: nn.Sequential(nn.Conv2d(D, D, 8, 8)), (2, D, 16, 16)),
    "videos": lambda: _of(lambda: nn.Sequential(nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))), (2, 3, 4, 16, 16)),
}


def _losses(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> list[float]:
    """Of steps towards outputs of a fixed direction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of what is dropped
        outputs = [each for each in tree_leaves(model(*inputs, **keywords)) if isinstance(each, Tensor)]
        loss = torch.stack([(each - each.numel() ** -0.5).square().mean() for each in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


_served: dict[str, set[type]] = {}  # mixins in a row's model, fused


def _mixins(name: str, model: nn.Module) -> set[type]:
    if name not in _served:
        _served[name] = {type(each).__bases__[0] for each in model.modules() if isinstance(each, Fused)}
    return _served[name]


@pytest.mark.parametrize("name", ROWS)
def test_the_losses_are_the_stock_models(name: str) -> None:
    found = []
    for prepare in (lambda model: model, vk.fuse):
        torch.manual_seed(0)
        model, inputs, keywords = ROWS[name]()
        prepare(model)
        with vk.use(*dispatch.order("cpu")):  # named, the backends serve calls too that are too small to gain
            found.append(_losses(model, inputs, keywords))
    own, got = found
    assert got == pytest.approx(own, rel=1e-3)
    assert own[-1] < own[0]
    assert _mixins(name, model)
    explanation = vk.explain(model)
    assert not explanation.unfused.keys() - explanation.around.keys()
    assert not explanation.fallbacks


def test_every_rule_is_among_them() -> None:
    served: set[type] = set()
    for name, build in ROWS.items():
        served |= _served[name] if name in _served else _mixins(name, vk.fuse(build()[0]))
    assert [each for each in rules.all_rules() if each.mixin not in served] == []
