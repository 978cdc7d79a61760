"""Dropouts and DropPaths together: a fused model draws what the stock one draws, in its order and for the same numbers.

In float64, where nothing else tells the two apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from timm_blocks import BLOCKS
from timm_vit import timm, vit
from torch import nn

import vitkernels as vk


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 32, "depth": 2, "num_classes": 10, "drop_path_rate": 0.4}
    return lambda: timm.create_model(name, **{**sizes, **options})


def of_transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"image_size": 32, "drop_path_rate": 0.4}
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**{**sizes, **options}))

    return build


_WINDOWS = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_TOWER = {"patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm's ViT": lambda: vit(init_values=0.5, drop_path_rate=0.4, qk_norm=True),
    "no class token": lambda: vit(class_token=False, global_pool="avg", pos_drop_rate=0.2, drop_path_rate=0.4),
    "CaiT": of_timm("cait_xxs24_224"),
    "attentions side by side": of_timm("vit_small_patch16_18x2_224"),
    "a network of positions, which drops too": of_timm("vit_relpos_small_patch16_224"),
    "one for all blocks": of_timm("vit_srelpos_small_patch16_224"),
    "EVA": of_timm("eva02_tiny_patch14_224", img_size=28, embed_dim=48, num_heads=3),
    "timm's Swin": of_timm("swin_tiny_patch4_window7_224", depth=None, **_WINDOWS),
    "timm's Swin v2": of_timm("swinv2_tiny_window8_256", depth=None, **_WINDOWS),
    "Swin": of_transformers("Swin", patch_size=4, **_WINDOWS),
    "Swin v2": of_transformers("Swinv2", patch_size=4, **_WINDOWS),
    "Donut": of_transformers("DonutSwin", patch_size=4, **_WINDOWS),
    "BEiT": of_transformers("Beit", **_TOWER),
    "DeiT": of_transformers("DeiT", **{**_TOWER, "drop_path_rate": None}),
}


def is_of_weights(name: str) -> bool:
    """Whether a dropout is of an attention's weights, which are the stock attention's then."""
    return name.endswith(("attn_drop", "self.dropout"))


@pytest.mark.parametrize("dropouts", [True, False], ids=["dropouts everywhere", "its own"])
@pytest.mark.parametrize("name", MODELS)
def test_dropouts_and_drop_paths_draw_as_ever(name: str, dropouts: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    peers.stir(model)
    rates = [0, 0]
    for part, module in model.named_modules():
        if dropouts and isinstance(module, nn.Dropout) and not is_of_weights(part):
            module.p, rates[0] = 0.2, rates[0] + 1
        rates[1] += bool(getattr(module, "drop_prob", None))
    assert rates[0] > 2 or not dropouts
    assert rates[1] or name == "DeiT"
    size = 28 if name == "EVA" else 32
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    found = []
    with vk.record() as calls:
        for each in (model, vk.fuse(copy.deepcopy(model))):
            torch.manual_seed(5)
            for _ in range(3):
                outputs = each(images)
            tokens = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            found.append((tokens, torch.get_rng_state()))
    assert {"add_layer_norm", "mlp"} & {call.op for call in calls}
    torch.testing.assert_close(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


@pytest.mark.parametrize("weight", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("image", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_dropout_behind_patches_draws_in_the_convolutions_order(
    image: torch.memory_format, weight: torch.memory_format
) -> None:
    """Nothing between the two copies the tokens; the rate may change at any time."""
    model = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.Flatten(2), nn.Dropout(0.0)).to(memory_format=weight)
    images = torch.randn(2, 3, 32, 48).to(memory_format=image)
    twin = vk.fuse(copy.deepcopy(model))
    again = copy.deepcopy(twin)
    for rate in (0.0, 0.5, 0.5, 0.0):
        found = []
        with vk.record() as calls:
            for each in (model, twin, again):
                each[2].p = rate
                torch.manual_seed(5)
                found.append(each(images))
        assert [call.op for call in calls] == 2 * ["patch_embed"]
        for each in found[1:]:
            torch.testing.assert_close(each, found[0])
            assert rate == 0.0 or each.stride() == found[0].stride()


@pytest.mark.parametrize("name", BLOCKS)
def test_dropouts_of_timms_blocks_draw_as_ever(name: str) -> None:
    build, size, keywords, _ = BLOCKS[name]
    torch.manual_seed(0)
    block = build().double().train()
    peers.stir(block)
    for part, module in block.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if is_of_weights(part) else 0.2
    given = {key: each.double() if isinstance(each, torch.Tensor) else each for key, each in keywords.items()}
    tokens, found = torch.randn(size, dtype=torch.float64), []
    with vk.record() as calls:
        for each in (block, vk.fuse(copy.deepcopy(block))):
            torch.manual_seed(5)
            outputs = each(tokens, **given)
            found.append((outputs[0] if isinstance(outputs, tuple) else outputs, torch.get_rng_state()))
    assert calls
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)  # some compute in float32 within
    assert torch.equal(found[1][1], found[0][1])
