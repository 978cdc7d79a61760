"""vk.fuse on timm's models: small random ones of each family, held to their own numbers."""

from __future__ import annotations

from typing import Any

import fused
import peers
import pytest
import torch

timm = peers.import_timm()

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 48, "depth": 2, "num_heads": 3}
OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}
QK_NORM = OPS - {"attention_qkv"} | {"attention"}
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, OPS),
    "registers": ({"reg_tokens": 3}, OPS),
    "layer scale": ({"init_values": 0.5}, OPS),
    "qk_norm": ({"qk_norm": True}, QK_NORM),
    "average pooling": ({"global_pool": "avg"}, OPS),
    "map pooling": ({"global_pool": "map", "class_token": False}, OPS),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str) -> None:
    options, ops = MODELS[name]
    model = timm.models.VisionTransformer(**{**SMALL, **options})
    fused.stir(model)
    explanation = fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=ops)
    assert explanation.summary == "2 of 2 blocks fused"
