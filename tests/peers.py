"""The libraries that the modules are compared with."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkernels.models import import_torchvision
from vitkernels.nn import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 48, "depth": 2, "num_heads": 3}


def import_timm() -> ModuleType:
    """timm, over a torchvision whose compiled part need not load; a test module skips without them."""
    for package in ("torchvision", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)
    import_torchvision()
    import timm

    return timm


def transformers_vit() -> nn.Module:
    """transformers' ViT of the same size, in training; a test skips without the library."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    stir(model)
    return model.train()


def stir(model: nn.Module) -> None:
    """Move every parameter off its starting value, so that none hides as a 0 or a 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def output_and_gradients(model: nn.Module, image: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """The model's output, and every parameter's gradient of a loss with different weights on all its numbers."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(image)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def build(**options: Any) -> tuple[VisionTransformer, nn.Module]:
    """Our Vision Transformer and timm's, with the same weights."""
    theirs = import_timm().models.VisionTransformer(**{**SIZES, **options})
    stir(theirs)
    options.pop("dynamic_img_size", None)  # ours takes any size
    ours = VisionTransformer(**{**SIZES, **options})
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def image(model: VisionTransformer) -> Tensor:
    """Three images of the size that the model is made for."""
    size = (count * side for count, side in zip(model.grid_size, model.patch_size, strict=True))
    return torch.randn(3, model.patch_embed.proj.in_channels, *size)


def truth(theirs: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output and gradients of timm's model in float64."""
    result = output_and_gradients(theirs.double(), images.double())
    theirs.float()
    return result
