"""Hugging Face transformers: layers that spread a sub-layer over several modules (read from transformers 5.23).

DPT, VideoMAE, YOLOS, ViTPose, FLAVA, ViLT, MobileViT, data2vec: the attention and its last projection are two modules
inside a third, and most feed-forwards are two modules of the layer, the second of which adds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, FusedWrittenAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import why_not_inside, written_out
from vitkernels.residual import parts
from vitkernels.residual.genuine import owner_name
from vitkernels.residual.stream import Branch
from vitkernels.residual.sublayers import dropped, mlp_branch

# ------------------------------------------------------------------------------------------------------- attention


class FusedNestedAttention(FusedAttention):
    """DPTViTAttention and its copies."""

    spelling = dataclasses.replace(
        written_out("attention"),
        scale="attention.scaling",
        dropout="attention.dropout_prob",
        is_causal="attention.is_causal",
        config="attention.config",
    )
    returns_weights = False

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedAttention, self).forward(hidden_states, **kwargs)
        return self.attended(hidden_states, **kwargs)


class FusedVideoAttention(FusedNestedAttention):
    """VideoMAEAttention, whose module inside takes no keyword."""

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:
        return next((f"called with {name}" for name in options), None)


class FusedMobileAttention(FusedWrittenAttention):
    """MobileViTAttention."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedAttention, self).forward(hidden_states)
        return self.attended(hidden_states)


class FusedData2VecAttention(FusedWrittenAttention):
    """Data2VecVisionAttention: a bias of relative positions of its own, of the model, or both."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, ...]:
        options = {
            "output_attentions": output_attentions,
            "relative_position_bias": relative_position_bias,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "resolution": resolution,
        }
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return (self.attended(hidden_states, **options), *self.weights())

    def weights(self) -> tuple[None, ...]:
        """What stands beside the tokens in its result."""
        return (None,) if "Sdpa" in owner_name(self.attention) else ()  # type: ignore[arg-type]

    def leaves(self, x: Tensor, **options: Any) -> bool:
        return self.declines(x, lambda: self.why_not_alone() or self.why_not_given(**options))

    def why_not_given(self, resolution: Any = None, **options: Any) -> str | None:
        """`why_not_call`, and whether what a bias needs is there: the module's own error is the one to see."""
        inner: Any = self.attention
        if inner.has_relative_position_bias and resolution is None:
            return "called without a resolution"
        return self.why_not_call(**options)

    def why_not_call(self, attention_mask: Any = None, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else None

    def is_plain(self) -> bool:
        return False

    def attend(
        self,
        packed: Tensor,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **options: Any,
    ) -> Tensor:
        inner: Any = self.attention
        bias = relative_position_bias
        if inner.has_relative_position_bias:
            window = tuple(size // inner.config.patch_size for size in resolution)  # type: ignore[union-attr]
            own = inner.relative_position_bias(window, interpolate_pos_encoding, dim_size=packed.shape[1])
            bias = own if bias is None else own + bias
        return ops.attention_qkv(packed, inner.num_attention_heads, attn_mask=bias)


# ---------------------------------------------------------------------------------------------------------- layers


class FusedSpreadLayer(FusedLayer):
    """What layers share whose feed-forward is `intermediate` and `output`."""

    names = Names(("layernorm_before", "layernorm_after"), "attention", "output")

    def why_not_call(self, **options: Any) -> str | None:
        return self.why_not_spread()

    def why_not_spread(self) -> str | None:
        """Why the modules that hold the feed-forward must be called; the second adds, so the layer is its class's."""
        reasons = (parts.why_not_part(name, getattr(self, name)) for name in ("intermediate", "output"))
        return next((reason for reason in reasons if reason is not None), None)

    def mlp_branch(self) -> Branch:
        layer: Any = self
        first, last, why_not = layer.intermediate, layer.output, self.why_not_spread()
        names = ("intermediate.dense", "output.dense")
        branch = dropped(mlp_branch(first.dense, first.intermediate_act_fn, last.dense, None, names), last.dropout)
        return branch if why_not is None else dataclasses.replace(branch, reason=why_not, otherwise="")


class FusedDptLayer(FusedSpreadLayer):
    """DPTViTLayer and its copies."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, **kwargs)
        return self.run(hidden_states, **kwargs)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(x, **options)


class FusedFlavaLayer(FusedSpreadLayer):
    """FlavaLayer and ViltLayer: a tuple, with the attention's weights where they are asked for."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        options = {"attention_mask": attention_mask, "output_attentions": output_attentions}
        if self.leaves(hidden_states, **options):
            return super(FusedLayer, self).forward(hidden_states, **options)
        return (self.run(hidden_states, **options),)

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else super().why_not_call(**options)


class FusedData2VecLayer(FusedSpreadLayer):
    """Data2VecVisionLayer."""

    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        "output",
        scales=("lambda_1", "lambda_2"),
        drop_paths=("drop_path", "drop_path"),
    )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, ...]:
        attn: Any = self.attention
        options = {
            "output_attentions": output_attentions,
            "relative_position_bias": relative_position_bias,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "resolution": resolution,
        }
        if self.leaves(hidden_states, **options):
            return super(FusedLayer, self).forward(hidden_states, **options)
        return (self.run(hidden_states, **options), *attn.weights())

    def why_not_call(self, **options: Any) -> str | None:
        attn = self.attention
        if not isinstance(attn, FusedData2VecAttention):
            return "its attention may return weights"
        return attn.why_not_given(**options) or super().why_not_call()


class FusedMobileLayer(FusedSpreadLayer):
    """MobileViTTransformerLayer."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states)
        return self.run(hidden_states)

    call = FusedDptLayer.call


class FusedPoseLayer(FusedDptLayer):
    """VitPoseBackboneLayer; one with a feed-forward for each data set is left to its class."""

    names = Names(("layernorm_before", "layernorm_after"), "attention")
    mlp_branch = FusedLayer.mlp_branch
    why_not_call = FusedLayer.why_not_call

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, dataset_index: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self.leaves(hidden_states, **kwargs):
            return super(FusedLayer, self).forward(hidden_states, dataset_index, **kwargs)
        return self.run(hidden_states, **kwargs)


_SELF_OUTPUT = owners(
    """
    dpt.DPTViTSelfOutput flava.FlavaSelfOutput videomae.VideoMAESelfOutput vilt.ViltSelfOutput
    vitpose_backbone.VitPoseBackboneSelfOutput yolos.YolosSelfOutput
    """
)
_INTERMEDIATE = owners(
    """
    dpt.DPTViTIntermediate flava.FlavaIntermediate mobilevit.MobileViTIntermediate videomae.VideoMAEIntermediate
    vilt.ViltIntermediate yolos.YolosIntermediate
    """
)
_OUTPUT = owners(
    """
    dpt.DPTViTOutput flava.FlavaOutput mobilevit.MobileViTOutput videomae.VideoMAEOutput vilt.ViltOutput
    yolos.YolosOutput
    """
)
INSIDE = (_SELF_OUTPUT, _INTERMEDIATE, _OUTPUT)  # each the copies of one text


def _spread(mixin: type[FusedSpreadLayer], names: frozenset[str], arguments: tuple[str, ...]) -> Rule:
    children = mixin.names.children() | {"intermediate"}
    inside = {"intermediate": _INTERMEDIATE, "output": _OUTPUT}
    return Rule(mixin, names, lambda layer: differs(layer, arguments, children) or why_not_inside(layer, inside))


def _nested(mixin: type[FusedAttention], names: str, inner: str, arguments: tuple[str, ...]) -> Rule:
    return attention_rule(mixin, owners(names), arguments, inside={"attention": owners(inner), "output": _SELF_OUTPUT})


_TUPLE = ("hidden_states", "attention_mask", "output_attentions")
_BIASED = ("hidden_states", "output_attentions", "relative_position_bias", "interpolate_pos_encoding", "resolution")
_DATA = "data2vec.data2vec_vision.Data2VecVision"
RULES = (
    _nested(
        FusedNestedAttention,
        "dpt.DPTViTAttention vitpose_backbone.VitPoseBackboneAttention yolos.YolosAttention",
        "dpt.DPTSelfAttention vitpose_backbone.VitPoseBackboneSelfAttention yolos.YolosSelfAttention",
        ("hidden_states", "kwargs"),
    ),
    _nested(
        FusedVideoAttention,
        "videomae.VideoMAEAttention",
        "videomae.VideoMAESelfAttention",
        ("hidden_states", "kwargs"),
    ),
    _nested(FusedWrittenAttention, "flava.FlavaAttention", "flava.FlavaSelfAttention", _TUPLE),
    _nested(FusedWrittenAttention, "vilt.ViltAttention", "vilt.ViltSelfAttention", _TUPLE),
    attention_rule(
        FusedMobileAttention,
        owners("mobilevit.MobileViTAttention"),
        ("hidden_states",),
        inside={
            "attention": owners("mobilevit.MobileViTSelfAttention"),
            "output": owners("mobilevit.MobileViTSelfOutput"),
        },
    ),
    attention_rule(
        FusedData2VecAttention,
        owners(f"{_DATA}Attention"),
        _BIASED,
        inside={
            "attention": owners(f"{_DATA}SelfAttention {_DATA}SdpaSelfAttention"),
            "output": owners(f"{_DATA}SelfOutput"),
        },
    ),
    layer_rule(FusedData2VecLayer, owners(f"{_DATA}Layer"), _BIASED, ("intermediate",)),
    _spread(
        FusedDptLayer, owners("dpt.DPTViTLayer videomae.VideoMAELayer yolos.YolosLayer"), ("hidden_states", "kwargs")
    ),
    _spread(FusedFlavaLayer, owners("flava.FlavaLayer"), _TUPLE),
    _spread(FusedFlavaLayer, owners("vilt.ViltLayer"), _TUPLE),
    _spread(FusedMobileLayer, owners("mobilevit.MobileViTTransformerLayer"), ("hidden_states",)),
    layer_rule(
        FusedPoseLayer,
        owners("vitpose_backbone.VitPoseBackboneLayer"),
        ("hidden_states", "dataset_index", "kwargs"),
    ),
)
