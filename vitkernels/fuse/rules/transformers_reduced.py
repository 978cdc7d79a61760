"""Hugging Face transformers: SegFormer, GLPN and both PVTs, with keys of an image that a convolution makes smaller.

But in the first PVT, a convolution stands between the products of the feed-forward. Read from transformers 5.23.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling, at, written_out
from vitkernels.fuse.swap import Fused, branch_of
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch, Part, Sublayer
from vitkernels.residual.sublayers import dropped, join_heads, joined, linear_step, projected, why_not_linears

# ------------------------------------------------------------------------------------------------------- attention


class FusedReducedAttention(FusedAttention):
    """SegformerAttention."""

    loses_small: ClassVar[int | None] = -1
    sees_all = True

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, height: int, width: int, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        options = {"attention_mask": attention_mask, **kwargs}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, height, width, **options)
        return self.attended(hidden_states, height=height, width=width, **options), None

    def why_not_call(self, attention_mask: Any = None, height: int = 0, width: int = 0, **options: Any) -> str | None:
        return super().why_not_call(attention_mask, **options)

    def smaller(self, x: Tensor, height: int, width: int) -> Tensor:
        """The tokens that are the keys, [B, M, D]."""
        attn: Any = self
        return attn.sequence_reduction(x, height, width) if attn.sequence_reduction_ratio > 1 else x

    def branch(self, height: int = 0, width: int = 0, **options: Any) -> Branch:
        spelling = self.spelling
        linears = {name: at(self, name) for name in (*spelling.inputs, spelling.out)}
        query, key, value, out = linears.values()

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            keys = self.smaller(x, height, width)
            q, kv = parts.linear(query, x), projected(keys, key, value)
            heads = at(self, spelling.heads)
            q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, *kv.chunk(2, dim=-1)))
            scale = None if spelling.scale is None else at(self, spelling.scale)
            found = ops.attention(q, k, v, attn_mask=options.get("attention_mask"), scale=scale)
            return parts.last_linear(out, join_heads(found), bias_apart)

        last = None if spelling.last is None else at(self, spelling.last)
        return dropped(Branch(run, self.steps, None, why_not_linears(**linears)), last)


class FusedPvtAttention(FusedReducedAttention):
    """GLPNAttention and PvtAttention: written out, in two modules inside, and a tuple returned."""

    spelling = written_out("self")
    has_functions = False
    returns_weights = False
    loses_small: ClassVar[int | None] = None
    reduction: ClassVar[tuple[str, str]] = ("self.sequences_reduction_ratio", "self.sequence_reduction")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedAttention, self).forward(hidden_states, height, width, output_attentions)
        return (self.attended(hidden_states, height=height, width=width),)

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:  # type: ignore[override]
        return "called with output_attentions" if output_attentions else None

    def smaller(self, x: Tensor, height: int, width: int) -> Tensor:
        ratio, convolution = self.reduction
        if at(self, ratio) <= 1:
            return x
        tokens = at(self, convolution)(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
        return parts.layer_norm(at(self, "self.layer_norm"), tokens, parts.operand_dtype(None, tokens))


class FusedGlpnAttention(FusedPvtAttention):
    """GLPNAttention."""

    loses_small = -1
    reduction = ("self.sr_ratio", "self.sr")


class FusedPvtV2Attention(FusedPvtAttention):
    """PvtV2SelfAttention: in one module, and, where it says so, of a pooled image."""

    loses_small = -1
    spelling = Spelling(("query", "key", "value"), "proj", "num_attention_heads", None, "attn_drop", last="proj_drop")

    def smaller(self, x: Tensor, height: int, width: int) -> Tensor:
        attn: Any = self
        if not attn.linear_attention and attn.spatial_reduction_ratio <= 1:
            return x
        image = x.transpose(1, 2).unflatten(2, (height, width))
        image = attn.spatial_reduction(attn.pool(image) if attn.linear_attention else image)
        tokens = image.flatten(2).transpose(1, 2)
        tokens = parts.layer_norm(attn.layer_norm, tokens, parts.operand_dtype(None, tokens))
        return attn.act(tokens) if attn.linear_attention else tokens


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedConvFeed(Fused):
    """GLPNMixFFN and PvtV2ConvFeedForwardNetwork."""

    loses_small = -1
    linears: ClassVar[tuple[str, str]] = ("dense1", "dense2")
    act: ClassVar[str] = "intermediate_act_fn"

    def reader(self) -> object:
        return getattr(self, self.linears[0])

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        if self.declines(hidden_states):
            return super().forward(hidden_states, height, width)
        with self.backend():
            return self.branch(height, width).run(hidden_states, False)[0]

    def branch(self, height: int = 0, width: int = 0, **options: Any) -> Branch:
        mlp: Any = self
        first, last = (getattr(self, name) for name in self.linears)
        act, relu = getattr(self, self.act), self._modules.get("relu")

        def finish(hidden: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            hidden = act(mlp.dwconv(hidden if relu is None else relu(hidden), height, width))
            return parts.last_linear(last, mlp.dropout(hidden), bias_apart)

        why_not = why_not_linears(**dict(zip(self.linears, (first, last), strict=True)))
        branch = Branch(
            lambda x, bias_apart: finish(parts.linear(first, x), bias_apart),
            "linear, convolution of torch, linear",
            first,
            why_not,
            step=linear_step(lambda: joined(first), finish) if why_not is None else None,
        )
        return dropped(branch, mlp.dropout)

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedMixMlp(FusedConvFeed):
    """SegformerMixMLP."""

    linears = ("fc1", "fc2")
    act = "activation_fn"


# ---------------------------------------------------------------------------------------------------------- layers


class FusedPvtLayer(FusedLayer):
    """PvtLayer."""

    names = Names(("layer_norm_1", "layer_norm_2"), "attention", drop_paths=("drop_path", "drop_path"))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedLayer, self).forward(hidden_states, height, width, output_attentions)
        return (self.run(hidden_states, height=height, width=width),)

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else None

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]


class FusedPvtV2Layer(FusedPvtLayer):
    """PvtV2BlockLayer."""

    loses_small = -1

    def sublayers(self, height: int = 0, width: int = 0, **options: Any) -> list[Sublayer]:
        mlp: Any = self.mlp
        steps = super().sublayers(height=height, width=width, **options)
        steps[1].branch = branch_of("mlp", mlp, lambda x: mlp(x, height, width), height=height, width=width)
        return steps


class FusedGlpnLayer(FusedPvtV2Layer):
    """GLPNLayer."""

    def call(self, attn: nn.Module, x: Tensor, height: int = 0, width: int = 0, **options: Any) -> Tensor:
        return attn(x, height, width, **options)[0]


class FusedSegformerLayer(FusedGlpnLayer):
    """SegformerLayer."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        drop_paths=("drop_path", "drop_path"),
        dropouts=("hidden_dropout", None),
    )

    def forward(self, hidden_states: Tensor, height: int, width: int, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, height, width, **kwargs)
        return self.run(hidden_states, height=height, width=width, **kwargs)

    def why_not_call(self, **options: Any) -> str | None:  # type: ignore[override]
        return None


_SIZES = ("hidden_states", "height", "width")
_TUPLE = (*_SIZES, "output_attentions")
_FEED = ("dense1", "dwconv", "intermediate_act_fn", "dense2", "dropout")


def _nested(mixin: type[FusedPvtAttention], name: str) -> Rule:
    inside = {"self": owners(f"{name}EfficientSelfAttention"), "output": owners(f"{name}SelfOutput")}
    return attention_rule(mixin, owners(f"{name}Attention"), _TUPLE, inside=inside)


RULES = (
    attention_rule(
        FusedReducedAttention,
        owners("segformer.SegformerAttention"),
        (*_SIZES, "attention_mask", "kwargs"),
        ("sequence_reduction",),
    ),
    _nested(FusedPvtAttention, "pvt.Pvt"),
    _nested(FusedGlpnAttention, "glpn.GLPN"),
    attention_rule(
        FusedPvtV2Attention,
        owners("pvt_v2.PvtV2SelfAttention"),
        _TUPLE,
        ("attn_drop", "pool", "spatial_reduction", "layer_norm", "act"),
    ),
    Rule(FusedConvFeed, owners("glpn.GLPNMixFFN"), lambda mlp: differs(mlp, _SIZES, _FEED)),
    Rule(
        FusedConvFeed,
        owners("pvt_v2.PvtV2ConvFeedForwardNetwork"),
        lambda mlp: differs(mlp, _SIZES, _FEED, ("relu",)),
    ),
    Rule(
        FusedMixMlp,
        owners("segformer.SegformerMixMLP"),
        lambda mlp: differs(mlp, _SIZES, ("fc1", "dwconv", "activation_fn", "fc2", "dropout")),
    ),
    layer_rule(FusedPvtLayer, owners("pvt.PvtLayer"), _TUPLE),
    layer_rule(FusedPvtV2Layer, owners("pvt_v2.PvtV2BlockLayer"), _TUPLE),
    layer_rule(FusedGlpnLayer, owners("glpn.GLPNLayer"), _TUPLE),
    layer_rule(FusedSegformerLayer, owners("segformer.SegformerLayer"), (*_SIZES, "kwargs")),
)
