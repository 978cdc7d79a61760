"""Hugging Face transformers: the layers of ViT, DINOv2, DINOv3, CLIP and SigLIP (read from transformers 5.23).

The library writes each model out in full, so that one text stands in many files: a mixin serves a text, and its rule
lists the classes that hold it. The modules inside the layers are in `transformers_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_parts import (
    CLIP,
    DINOV2,
    DINOV3,
    SIGLIP,
    VIT,
    FusedAttention,
    owners,
    without_positions,
)
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import known
from vitkernels.residual.stream import Branch, Sublayer
from vitkernels.residual.sublayers import dropped

known.DROP_PATHS.update(
    dict.fromkeys(owners("DropPath", DINOV2 | DINOV3 | {"dinov3_vit": "Dinov3ViT"}), known.draw_uniform)
)
known.LAYER_SCALES.update(dict.fromkeys(owners("LayerScale", DINOV2 | DINOV3), "lambda1"))


def _attention(
    name: str, attn: nn.Module, mask: Tensor | None, options: Mapping[str, Any], call: Callable[[Tensor], Tensor]
) -> Branch:
    """The attention as a branch: by its parts where they serve this call, else by `call`, as the layer itself does."""
    why_not = attn.why_not_call(mask, options) if isinstance(attn, FusedAttention) else None
    if why_not is not None:
        return Branch(lambda x, bias_apart: (call(x), None), "", None, why_not)
    return branch_of(name, attn, call, attention_mask=mask, **options)


_NO_OPTIONS: Mapping[str, Any] = {}


class FusedLayer(PreNormBlock):
    """What the layers share: pre-norm, attention, feed-forward."""

    reads = ("layernorm_before", "norm1", "layer_norm1")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.declines(hidden_states, mask=attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.run(hidden_states, mask=attention_mask, options=kwargs)

    def sublayers(  # type: ignore[override]
        self, mask: Tensor | None = None, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> list[Sublayer]:
        """The residual steps of a call with this mask and these keywords."""
        raise NotImplementedError


class FusedViTLayer(FusedLayer):
    """ViTLayer and its copies: a dropout after each sub-layer."""

    def sublayers(  # type: ignore[override]
        self, mask: Tensor | None = None, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> list[Sublayer]:
        layer: Any = self
        attention = _attention(
            "attention", layer.attention, mask, options, lambda x: layer.attention(x, mask, **options)[0]
        )
        return [
            Sublayer("attention", layer.layernorm_before, dropped(attention, layer.dropout)),
            Sublayer("mlp", layer.layernorm_after, dropped(branch_of("mlp", layer.mlp), layer.dropout)),
        ]


class FusedDinoLayer(FusedLayer):
    """Dinov2Layer and its copy: LayerScale, and one DropPath for both sub-layers."""

    def sublayers(  # type: ignore[override]
        self, mask: Tensor | None = None, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> list[Sublayer]:
        layer: Any = self
        attention = _attention(
            "attention", layer.attention, mask, options, lambda x: layer.attention(x, attention_mask=mask, **options)[0]
        )
        return [
            Sublayer("attention", layer.norm1, attention, layer.layer_scale1, layer.drop_path),
            Sublayer("mlp", layer.norm2, branch_of("mlp", layer.mlp), layer.layer_scale2, layer.drop_path),
        ]


class FusedRopeLayer(FusedDinoLayer):
    """DINOv3ViTLayer: DINOv2's, with rotary positions."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {"position_embeddings": position_embeddings, **kwargs}
        if self.declines(hidden_states, lambda: without_positions(position_embeddings), attention_mask):
            return super(FusedLayer, self).forward(hidden_states, attention_mask, **options)
        return self.run(hidden_states, mask=attention_mask, options=options)


class FusedClipLayer(FusedLayer):
    """CLIPEncoderLayer and its copies, of the image's tower and of the text's."""

    def sublayers(  # type: ignore[override]
        self, mask: Tensor | None = None, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> list[Sublayer]:
        layer: Any = self
        attention = _attention(
            "self_attn",
            layer.self_attn,
            mask,
            options,
            lambda x: layer.self_attn(hidden_states=x, attention_mask=mask, **options)[0],
        )
        return [
            Sublayer("self_attn", layer.layer_norm1, attention),
            Sublayer("mlp", layer.layer_norm2, branch_of("mlp", layer.mlp)),
        ]


_ARGUMENTS = ("hidden_states", "attention_mask", "kwargs")
_ROPE_ARGUMENTS = ("hidden_states", "attention_mask", "position_embeddings", "kwargs")
_VIT = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
_DINO = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
_CLIP = ("self_attn", "layer_norm1", "mlp", "layer_norm2")
RULES = (
    Rule(FusedViTLayer, owners("Layer", VIT), lambda layer: differs(layer, _ARGUMENTS, _VIT)),
    Rule(FusedDinoLayer, owners("Layer", DINOV2), lambda layer: differs(layer, _ARGUMENTS, _DINO)),
    Rule(FusedRopeLayer, owners("Layer", DINOV3), lambda layer: differs(layer, _ROPE_ARGUMENTS, _DINO)),
    Rule(FusedClipLayer, owners("EncoderLayer", CLIP | SIGLIP), lambda layer: differs(layer, _ARGUMENTS, _CLIP)),
)
