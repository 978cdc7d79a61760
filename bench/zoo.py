"""The Vision Transformers that are timed: ours, the tutorial's and the libraries', all with the same weights."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peers as libraries
import torch
from torch import Tensor, nn

import vitkernels as vk
from bench.measure import OURS
from vitkernels.nn import VisionTransformer
from vitkernels.nn.naive import from_fused, parameter_names


@dataclass(frozen=True)
class Model:
    """A model with our model's weights.

    Args:
        module: takes images, or tokens where it is a block.
        names: our parameters' names -> theirs, which hold ours in that order along the first axis.
        block: where its first block is.
        output: what is wanted of what it returns.
    """

    module: nn.Module
    names: Mapping[str, tuple[str, ...]]
    block: str
    output: Callable[[Any], Tensor] = lambda output: output

    def load(self, ours: VisionTransformer) -> Model:
        weights = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, weight in ours.named_parameters():
                theirs = self.names[name]
                for part, target in zip(weight.chunk(len(theirs)), theirs, strict=True):
                    weights[target].copy_(part.reshape(weights[target].shape))
        return self

    def first_block(self) -> Model:
        inner = f"{self.block}."
        names = {
            name.removeprefix("blocks.0."): tuple(each.removeprefix(inner) for each in theirs)
            for name, theirs in self.names.items()
            if name.startswith("blocks.0.")
        }
        return Model(self.module.get_submodule(self.block), names, "")


def _same_names(module: nn.Module) -> Model:
    return Model(module, {name: (name,) for name, _ in module.named_parameters()}, "blocks.0")


def _ours(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    return _same_names(vit)


def _naive(vit: VisionTransformer, arguments: Mapping[str, Any], embedding: str = "dnn") -> Model:
    names = {ours: (naive,) for naive, ours in parameter_names(vit).items()}
    return Model(from_fused(vit, embedding), names, "encoder.layers.0")


def _conv2d(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    return _naive(vit, arguments, "cnn")


def _timm(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    return _same_names(libraries.import_timm().models.VisionTransformer(**arguments)).load(vit)


def _fused_timm(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    model = _timm(vit, arguments)
    vk.fuse(model.module)  # type: ignore[attr-defined]  # in place, same names
    return model


def hidden(arguments: Mapping[str, Any]) -> int:
    """The width of the feed-forward."""
    return int(arguments["embed_dim"] * arguments.get("mlp_ratio", 4.0))


_TRANSFORMERS = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def _transformers(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    _needs_class_token(vit)
    libraries.import_timm()  # it declares what transformers' import of torchvision asks for, too
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=hidden(arguments),
        image_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        layer_norm_eps=1e-6,
        num_labels=arguments["num_classes"],  # type: ignore[call-arg]  # of its base class
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    names = {
        "cls_token": ("vit.embeddings.cls_token",),
        "pos_embed": ("vit.embeddings.position_embeddings",),
    } | _renamed(
        {
            "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection",),
            "norm": ("vit.layernorm",),
            "head": ("classifier",),
            **_blocks(vit, "vit.layers.{}.{}", _TRANSFORMERS),
        },
    )
    model = Model(ViTForImageClassification(config), names, "vit.layers.0", lambda output: output.logits)
    return model.load(vit)


_TORCHVISION = {
    "norm1": ("ln_1",),
    "attn.qkv": ("self_attention.in_proj_",),
    "attn.proj": ("self_attention.out_proj",),
    "norm2": ("ln_2",),
    "mlp.fc1": ("mlp.0",),
    "mlp.fc2": ("mlp.3",),
}


def _torchvision(vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    _needs_class_token(vit)
    libraries.import_timm()
    from torchvision.models import VisionTransformer as Torchvision

    module = Torchvision(
        image_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        num_layers=arguments["depth"],
        num_heads=arguments["num_heads"],
        hidden_dim=arguments["embed_dim"],
        mlp_dim=hidden(arguments),
        num_classes=arguments["num_classes"],
    )
    names = {"cls_token": ("class_token",), "pos_embed": ("encoder.pos_embedding",)} | _renamed(
        {
            "patch_embed.proj": ("conv_proj",),
            "norm": ("encoder.ln",),
            "head": ("heads.head",),
            **_blocks(vit, "encoder.layers.encoder_layer_{}.{}", _TORCHVISION),
        },
    )
    return Model(module, names, "encoder.layers.encoder_layer_0").load(vit)


def _needs_class_token(vit: VisionTransformer) -> None:
    if vit.cls_token is None:
        raise ValueError("this library's Vision Transformer always has a class token")


def _blocks(vit: VisionTransformer, path: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"blocks.{index}.{ours}": tuple(path.format(index, each) for each in theirs)
        for index in range(len(vit.blocks))
        for ours, theirs in names.items()
    }


def _renamed(modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of weights and biases, of names of modules; "in_proj_" has them without a dot."""
    return {
        f"{ours}.{kind}": tuple(f"{each}{'' if each.endswith('_') else '.'}{kind}" for each in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


MAKERS: dict[str, Callable[[VisionTransformer, Mapping[str, Any]], Model]] = {
    OURS: _ours,
    "vk.fuse(timm)": _fused_timm,
    "naive": _naive,
    "naive, conv2d": _conv2d,
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
}
COMPILED: dict[str, tuple[str, str | None]] = {
    f"{OURS}, compiled": (OURS, None),
    "vk.fuse(timm), compiled": ("vk.fuse(timm)", None),
    "timm, compiled": ("timm", None),
    "timm, max-autotune": ("timm", "max-autotune"),
}
RECOMPUTED = {f"{name}, recompute": name for name in (OURS, "vk.fuse(timm)", "timm")}  # each block again in backward
_NEEDS = {name: (name, "timm", "torchvision") for name in ("timm", "transformers", "torchvision")}
_NEEDS["vk.fuse(timm)"] = _NEEDS["timm"]


def _base(name: str) -> str:
    """The lane whose model it is, compiled or recomputed or not."""
    return COMPILED.get(name, (RECOMPUTED.get(name, name), None))[0]


def build(name: str, vit: VisionTransformer, arguments: Mapping[str, Any]) -> Model:
    """The model of a lane with the weights of `vit`, which was made with these arguments."""
    model = MAKERS[_base(name)](vit, arguments)
    device = next(vit.parameters()).device
    if name in RECOMPUTED:  # a copy: `vit` is every lane's
        model = dataclasses.replace(model, module=copy.deepcopy(model.module))
        model.module.set_grad_checkpointing()  # type: ignore[operator]
    return dataclasses.replace(model, module=model.module.to(device).train())


def available(name: str) -> bool:
    """Whether a lane's packages are installed here and, of `vk.fuse`, whether this version has it."""
    base = _base(name)
    if base == "vk.fuse(timm)" and not hasattr(vk, "fuse"):
        return False
    return all(importlib.util.find_spec(package) is not None for package in _NEEDS.get(base, ()))
