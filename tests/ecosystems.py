"""One small model of each ecosystem that `fuse` serves, with the places of the parts of its first block."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dino_blocks as dino
import fused
import peers
import pytest
import torch
from torch import Tensor, nn

import vitkernels as vk

D, HEADS = 48, 3


@dataclass(frozen=True)
class Ecosystem:
    """How to build a model, and where its first block has what.

    Attributes:
        build: a model of two blocks, weights stirred.
        inputs: what it is called with.
        package: that must be installed.
        parts: by what they are ("norm", "activation", "scale", "drop_path", "linear", "attention"), their names.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    package: str
    parts: dict[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        if importlib.util.find_spec(self.package) is None:
            pytest.skip(f"{self.package} is not installed")
        peers.import_timm()  # torchvision's schemas
        model = self.build()
        fused.stir(model)
        return model

    def put(self, model: nn.Module, part: str, module: nn.Module) -> None:
        """Put a module in the place of the first block's part."""
        model.set_submodule(self.parts[part], module)


def _timm() -> nn.Module:
    import timm_vit

    return timm_vit.vit(init_values=0.5, drop_path_rate=0.2)


def _dinov2() -> nn.Module:
    blocks = [dino.Block(D, HEADS, mlp_ratio=2, init_values=0.5, drop_path=0.05) for _ in range(2)]
    return dino.Encoder(blocks, D)


def _dinov3() -> nn.Module:
    blocks = [dino.SelfAttentionBlock(D, HEADS, 2, init_values=0.5, mask_k_bias=False) for _ in range(2)]
    return dino.Encoder(blocks, D)


def _transformers() -> nn.Module:
    return importlib.import_module("hf_models").dinov2(drop_path_rate=0.2)  # type: ignore[no-any-return]


def _torchvision() -> nn.Module:
    return importlib.import_module("torchvision").models.VisionTransformer(32, 8, 2, HEADS, D, 2 * D)  # type: ignore[no-any-return]


def _torch_nn() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, 0.0, nn.GELU(), batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _open_clip() -> nn.Module:
    transformer = importlib.import_module("open_clip.transformer")
    return transformer.Transformer(D, 2, HEADS, mlp_ratio=2.0, ls_init_value=0.5)  # type: ignore[no-any-return]


def _vit_pytorch() -> nn.Module:
    return importlib.import_module("vit_pytorch.vit").Transformer(D, 2, HEADS, 16, 2 * D)  # type: ignore[no-any-return]


def _images() -> tuple[Tensor]:
    return (torch.randn(4, 3, 32, 32),)


def _tokens() -> tuple[Tensor]:
    return (torch.randn(4, 7, D),)


_DINO = {
    "norm": "blocks.0.norm2",
    "activation": "blocks.0.mlp.act",
    "scale": "blocks.0.ls1",
    "linear": "blocks.0.mlp.fc1",
    "attention": "blocks.0.attn",
}
ECOSYSTEMS: dict[str, Ecosystem] = {
    "timm": Ecosystem(_timm, _images, "timm", {**_DINO, "drop_path": "blocks.1.drop_path1"}),
    "dinov2": Ecosystem(_dinov2, _tokens, "torch", {**_DINO, "drop_path": "blocks.0.drop_path1"}),
    "dinov3": Ecosystem(_dinov3, _tokens, "torch", _DINO),
    "transformers": Ecosystem(
        _transformers,
        _images,
        "transformers",
        {
            "norm": "encoder.layer.0.norm2",
            "activation": "encoder.layer.0.mlp.activation_fn",
            "scale": "encoder.layer.0.layer_scale1",
            "drop_path": "encoder.layer.1.drop_path",
            "linear": "encoder.layer.0.mlp.fc1",
            "attention": "encoder.layer.0.attention",
        },
    ),
    "torchvision": Ecosystem(
        _torchvision,
        _images,
        "torchvision",
        {
            "norm": "encoder.layers.encoder_layer_0.ln_2",
            "activation": "encoder.layers.encoder_layer_0.mlp.1",
            "linear": "encoder.layers.encoder_layer_0.mlp.0",
            "attention": "encoder.layers.encoder_layer_0.self_attention",
        },
    ),
    "torch.nn": Ecosystem(
        _torch_nn,
        _tokens,
        "torch",
        {
            "norm": "layers.0.norm2",
            "activation": "layers.0.activation",
            "linear": "layers.0.linear1",
            "attention": "layers.0.self_attn",
        },
    ),
    "open_clip": Ecosystem(
        _open_clip,
        _tokens,
        "open_clip",
        {
            "norm": "resblocks.0.ln_2",
            "activation": "resblocks.0.mlp.gelu",
            "scale": "resblocks.0.ls_1",
            "linear": "resblocks.0.mlp.c_fc",
            "attention": "resblocks.0.attn",
        },
    ),
    "vit_pytorch": Ecosystem(
        _vit_pytorch,
        _tokens,
        "vit_pytorch",
        {
            "norm": "layers.0.1.net.0",
            "activation": "layers.0.1.net.2",
            "linear": "layers.0.1.net.1",
            "attention": "layers.0.0",
        },
    ),
}


def having(part: str) -> Any:
    """Parametrize a test by the ecosystems whose blocks have such a part."""
    return pytest.mark.parametrize("name", [name for name, each in ECOSYSTEMS.items() if part in each.parts])


def numbers(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Outputs and gradients from one random state."""
    torch.manual_seed(3)
    return fused.output_and_gradients(model, inputs)


def check_as_stock(
    model: nn.Module, inputs: tuple[Any, ...], prepare: Callable[[nn.Module], Any] = vk.fuse
) -> list[vk.Call]:
    """Fuse a model and hold it to its own numbers; a gradient that stock has not is missing too; returns the calls."""
    expected = numbers(model, inputs)
    prepare(model)
    with vk.record() as calls:
        got = numbers(model, inputs)
    fused.check_same(got, expected)
    return calls
