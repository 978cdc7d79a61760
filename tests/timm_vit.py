"""timm's Vision Transformer, small and with random weights: what most tests of `fuse` and `verify` run on."""

from __future__ import annotations

from typing import Any

import peers
import torch
from torch import Tensor, nn

timm = peers.import_timm()

OPS = {"patch_embed", "linear", "attention_qkv", "add_layer_norm", "mlp"}  # what it runs, fused


def vit(**options: Any) -> nn.Module:
    """A model of two blocks, unless `options` of timm's say otherwise."""
    model = timm.models.VisionTransformer(**{**peers.SIZES, **options})
    peers.stir(model)
    return model


def images(count: int = 3) -> Tensor:
    """Images of the size that `vit` is made for."""
    return torch.randn(count, 3, 32, 32)
