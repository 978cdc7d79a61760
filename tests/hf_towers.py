"""Small random vision towers of Hugging Face transformers, and calls of their layers by the names of the arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import fused
import torch
from torch import Tensor, nn

from vitkernels.fuse.swap import Fused
from vitkernels.residual import genuine

D, HEADS, TOKENS = 48, 3, 17
SIZES = {
    "hidden_size": D,
    "embed_dim": D,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "intermediate_size": 96,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "depth": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "layer_scale_init_value": 0.5,
    "layerscale_value": 0.5,
}


def tower(package: str, name: str, **options: Any) -> nn.Module:
    """A tower with its config's own settings but for its sizes, which are small, and the options."""
    file = package.rpartition(".")[2]
    cls = getattr(importlib.import_module(f"transformers.models.{package.split('.')[0]}.modeling_{file}"), name)
    usual = cls.config_class()
    sizes = {key: value for key, value in SIZES.items() if hasattr(usual, key)}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **options}))
    fused.stir(model)
    return model.train()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The first fused block of each class, by the class's name."""
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Fused) and module.is_block:
            found.setdefault(genuine.stock_type(module).__name__, module)
    return found


LENGTHS = ((5, 9, 3), (6, 6), (4, 0, 13), (17,))  # of packed images


def positions(width: int = D // HEADS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """cos and sin, [N, K], as towers hand them to their layers."""
    angles = torch.linspace(0.1, 3, tokens)[:, None] * torch.linspace(0.2, 1, width // 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _packed(lengths: tuple[int, ...]) -> dict[str, Any]:
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return {"cu_seqlens": ends.int(), "position_embeddings": positions(tokens=int(ends[-1]))}


def _turns() -> Tensor:
    cos, sin = positions()
    return torch.complex(cos, sin)[:, None, : D // HEADS // 2].contiguous()


# What layers are called with beside their tokens, by the argument's name.
KEYWORDS: dict[str, Callable[[], Any]] = {
    "attention_mask": lambda: None,
    "freqs_ci": _turns,
    "resolution": lambda: (32, 32),
    "position_embeddings": positions,
    "input_dimensions": lambda: (4, 4),
    "height": lambda: 4,
    "width": lambda: 4,
}


def call_of(layer: nn.Module, lengths: tuple[int, ...] = LENGTHS[0]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tokens and keywords for a layer; for one of packed images these lengths."""
    arguments = list(inspect.signature(genuine.owner(layer).forward).parameters)
    name = genuine.stock_type(layer).__name__
    is_batch_of_one = name.startswith(("MiniCPM", "MiniMax", "HunYuan"))
    if name.startswith("MiniMax"):
        arguments.append("position_embeddings")
    keywords = {key: make() for key, make in KEYWORDS.items() if key in arguments}
    if "cu_seqlens" in arguments or is_batch_of_one:
        packed = _packed(lengths)
        keywords |= {key: value for key, value in packed.items() if key in {*arguments, "cu_seqlens"}}
        tokens = torch.randn(*((1,) if is_batch_of_one else ()), sum(lengths), D)
    elif name.startswith(("Sam", "GotOcr", "VitDet")) and not name.startswith("Sapiens"):
        tokens = torch.randn(2, *((D, 4, 4) if name.startswith("VitDet") else (4, 4, D)))
    else:
        width = next(each for each in layer.modules() if isinstance(each, nn.LayerNorm)).weight.shape[0]
        tokens = torch.randn(4, 16 if {"height", "input_dimensions"} & {*arguments} else TOKENS, width)
    return (tokens.requires_grad_(),), keywords
