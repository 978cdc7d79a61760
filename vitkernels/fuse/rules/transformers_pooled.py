"""Hugging Face transformers: attention whose queries are the largest of several tokens, where a layer leaves fewer:
Hiera (Ryali et al. 2023), and SAM 2's, whose tokens are an image. Read from transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.pooled import PooledBlock
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm_pooled import unit_attention
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_mlp import FusedMlp
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import Branch
from vitkernels.residual.sublayers import join_heads, why_not_linears

# ----------------------------------------------------------------------------------------------------------- Hiera


class FusedUnitAttention(FusedAttention):
    """HieraMaskUnitAttention: written out."""

    has_functions = False
    returns_weights = False
    spelling = Spelling(("qkv",), "proj", "num_heads", "scale", is_causal=False)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedAttention, self).forward(hidden_states, output_attentions)
        return self.attended(hidden_states), None

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:  # type: ignore[override]
        return "called with output_attentions" if output_attentions else None

    def _drops(self) -> bool:
        return False

    def branch(self, **options: Any) -> Branch:
        attn: Any = self

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, None]:
            units = x.shape[1] // (attn.query_stride * attn.window_size) if attn.use_mask_unit_attn else 1
            shape = (attn.num_heads, units, attn.query_stride)
            out = unit_attention(x, attn.qkv, attn.proj, *shape, lambda q: q.max(dim=2).values, attn.scale)
            return out, None

        return Branch(run, self.steps, attn.qkv, why_not_linears(qkv=attn.qkv, proj=attn.proj))


class FusedPoolingLayer(PooledBlock, FusedLayer):
    """What both layers share."""

    def changes(self) -> bool:
        return "proj" in self._modules


class FusedHieraLayer(FusedPoolingLayer):
    """HieraLayer, which returns the attention's weights beside its tokens."""

    names = Names(("layernorm_before", "layernorm_after"), "attn", drop_paths=("drop_path", "drop_path"))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedLayer, self).forward(hidden_states, output_attentions)
        return self.run(hidden_states), None

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else None

    def shortcut(self, x: Tensor, normed: Tensor, **options: Any) -> Tensor:
        layer: Any = self
        return parts.linear(layer.proj, normed).unflatten(1, (layer.query_stride, -1)).max(dim=1).values


# ----------------------------------------------------------------------------------------------------------- SAM 2


def _functions(module: nn.Module) -> Any:
    """The file in which the module's own class stands."""
    return sys.modules[genuine.owner(module).__module__]


class FusedScaleAttention(FusedAttention):
    """Sam2MultiScaleAttention: [B, H, W, D] of an image or a window."""

    axes = 4
    sees_all = True
    returns_weights = False
    spelling = Spelling(("qkv",), "proj", "num_attention_heads", "scale", is_causal=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedAttention, self).forward(hidden_states, **kwargs)
        return self.attended(hidden_states, **kwargs)

    def _drops(self) -> bool:
        return False

    def is_plain(self) -> bool:
        return False

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        attn: Any = self
        heads, sides = attn.num_attention_heads, packed.shape[1:3]
        if not attn.query_stride:
            return ops.attention_qkv(packed.flatten(1, 2), heads, scale=attn.scale).unflatten(1, sides)
        q, k, v = packed.chunk(3, dim=-1)
        q = _functions(self).do_pool(q, attn.query_stride)
        sides = q.shape[1:3]
        q, k, v = (each.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        return join_heads(ops.attention(q, k, v, scale=attn.scale)).unflatten(1, sides)


class FusedSam2Mlp(FusedMlp):
    """Sam2FeedForward of two products."""

    names = ("proj_in", "activation", "proj_out")


class FusedScaleLayer(FusedPoolingLayer):
    """Sam2MultiScaleBlock: [B, H, W, D] in windows or whole."""

    axes = 4
    names = Names(("layer_norm1", "layer_norm2"), "attn")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, **kwargs)
        return self.run(hidden_states, **kwargs)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)

    def attention_branch(self, **options: Any) -> Branch:
        layer: Any = self
        whole = super().attention_branch(**options)
        if layer.window_size <= 0:
            return whole

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            own, size = _functions(self), layer.window_size
            sides = list(x.shape[1:3])
            windows, padded = own.window_partition(x, size)
            out, bias = whole.run(windows, bias_apart)
            if layer.query_stride:
                size //= layer.query_stride[0]
                sides = [side // stride for side, stride in zip(sides, layer.query_stride, strict=True)]
                padded = [side + -side % size for side in sides]
            return own.window_unpartition(out, size, padded, sides), bias

        return dataclasses.replace(whole, run=run, step=None)

    def shortcut(self, x: Tensor, normed: Tensor, **options: Any) -> Tensor:
        layer: Any = self
        return _functions(self).do_pool(parts.linear(layer.proj, normed), layer.query_stride)


def _why_not_two_products(mlp: Any) -> str | None:
    return "it has more than two products, or a sigmoid" if len(mlp.layers) or mlp.sigmoid_output else None


def _why_not_stride(layer: Any) -> str | None:
    """Its own class has no result for a layer that pools its queries alone, or without windows."""
    usual = "proj" in layer._modules and layer.window_size > 0
    return "it pools its queries alone, or without windows" if layer.query_stride and not usual else None


_SCALE = layer_rule(FusedScaleLayer, owners("sam2.Sam2MultiScaleBlock"), ("hidden_states", "kwargs"), ("proj",))
RULES = (
    attention_rule(FusedUnitAttention, owners("hiera.HieraMaskUnitAttention"), ("hidden_states", "output_attentions")),
    layer_rule(FusedHieraLayer, owners("hiera.HieraLayer"), ("hidden_states", "output_attentions"), ("proj",)),
    attention_rule(FusedScaleAttention, owners("sam2.Sam2MultiScaleAttention"), ("hidden_states", "kwargs")),
    Rule(
        FusedSam2Mlp,
        owners("sam2.Sam2FeedForward"),
        lambda mlp: differs(mlp, ("hidden_states",), (*FusedSam2Mlp.names, "layers")) or _why_not_two_products(mlp),
        is_common=True,
    ),
    dataclasses.replace(_SCALE, contract=lambda layer: _SCALE.contract(layer) or _why_not_stride(layer)),
)
