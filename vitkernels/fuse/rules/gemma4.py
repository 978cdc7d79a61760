"""Gemma 4's vision tower, timm's and transformers': norms before and behind both branches, norms of q, k and v,
positions in two directions, and, in some of its checkpoints, limits to what a projection reads and writes.

Read from timm 1.0.31 and transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs, timm
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_parts import FusedAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling
from vitkernels.fuse.swap import Fused, branch_of
from vitkernels.residual import known, parts
from vitkernels.residual.genuine import owner_name
from vitkernels.residual.stream import Branch, Part, Sublayer
from vitkernels.residual.sublayers import (
    ROTARY,
    dropped,
    followed,
    gated_branch,
    join_heads,
    joined,
    linear_step,
    projected,
    rotary,
    why_not_linears,
)

Three = Sequence[Tensor]
_INPUTS = ("q_proj", "k_proj", "v_proj")
_TIMM = "timm.models.gemma4_vit.Gemma4"
_PROJECTION = {f"{_TIMM}ClippableLinear", *owners("gemma4.Gemma4ClippableLinear")}
known.RMS_NORMS.update(dict.fromkeys(owners("gemma4.Gemma4RMSNorm"), lambda norm: norm.eps))


# ----------------------------------------------------------------------------------------------------- projections


def _limits(module: Any) -> bool:
    """Whether a projection has limits."""
    return bool(getattr(module, "use_clipped_linears", False) or getattr(module, "use_clipped", False))


def _why_not_projections(**modules: Any) -> str | None:
    """Which projection must be called as it is, and why; None when all may be read."""
    for name, module in modules.items():
        if owner_name(module) not in _PROJECTION:
            return parts.why_not_part(name, module, nn.Linear) or f"{name} is Linear, not Gemma4ClippableLinear"
        if (reason := parts.why_not_part(name, module)) is not None:
            return reason
    return why_not_linears(**{f"{name}.linear": module.linear for name, module in modules.items()})


def _projected(module: Any, x: Tensor) -> Tensor:
    """module(x), of one that may be read."""
    if not _limits(module):
        return parts.linear(module.linear, x)
    out = parts.linear(module.linear, x.clamp(module.input_min, module.input_max))
    return out.clamp(module.output_min, module.output_max)


def _inside(modules: dict[str, Any]) -> dict[str, nn.Module]:
    return {f"{name}.linear": module.linear for name, module in modules.items()}


# ------------------------------------------------------------------------------------------------------- attention


def _bare(norm: Any, x: Tensor) -> Tensor:
    """An RMSNorm without a weight, in x's dtype."""
    eps = known.RMS_NORMS.get(owner_name(norm), lambda norm: "")(norm)
    if isinstance(eps, str) or parts.why_not_part("", norm) is not None or getattr(norm, "weight", None) is not None:
        return norm(x).to(x.dtype)
    return ops.add_rms_norm(x, None, None, eps)[1]


def _by_halves(x: Tensor) -> Tensor:
    """Each direction's pairs, (x[i], x[i + K / 4]) in its half, as pairs (x[i], x[i + K / 2]) of the whole."""
    return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def _attended(attn: Any, three: Three, cos: Tensor, sin: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
    """q, k and v, [B, N, H * K] each (of k and v there may be fewer heads), to [B, N, H * K].

    q and k have their elements in another order, the same in both: scores are sums over them.
    """
    q, k, v = (each.unflatten(-1, (-1, attn.head_dim)) for each in three)
    cos, sin = (_by_halves(each)[:, None] for each in (cos, sin))
    q, k = (
        rotary(_by_halves(parts.layer_norm(norm, each).to(v.dtype)).transpose(1, 2), sin, cos, half=True)
        for norm, each in ((attn.q_norm, q), (attn.k_norm, k))
    )
    return join_heads(ops.attention(q, k, _bare(attn.v_norm, v).transpose(1, 2), attn_mask=mask, scale=scale))


def _attention_branch(attn: Any, attend: Callable[[Three], Tensor]) -> Branch:
    modules = {name: getattr(attn, name) for name in _INPUTS}
    why_not = _why_not_projections(**modules, o_proj=attn.o_proj)
    if why_not is not None or any(map(_limits, (*modules.values(), attn.o_proj))):
        call = (lambda module, x: module(x)) if why_not is not None else _projected

        def apart(x: Tensor, bias_apart: bool) -> tuple[Tensor, None]:
            return call(attn.o_proj, attend([call(module, x) for module in modules.values()])), None

        return Branch(apart, "linear, limits of torch, rotary, attention, linear", None, why_not, "rotary, attention")
    linears: Any = tuple(_inside(modules).values())

    def finish(packed: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        three = packed.split([each.out_features for each in linears], dim=-1)
        return parts.last_linear(attn.o_proj.linear, attend(three), bias_apart)

    return Branch(
        lambda x, bias_apart: finish(projected(x, *linears), bias_apart),
        ROTARY,
        linears[0],
        step=linear_step(lambda: joined(*linears), finish),
    )


def _why_not_width(attn: Any) -> str | None:
    return "heads whose width is no multiple of 4" if attn.head_dim % 4 else None


class FusedGemmaAttention(FusedAttention):
    """transformers' Gemma4VisionAttention."""

    steps = ROTARY
    spelling = Spelling(is_causal=False)
    sees_all = True
    needs = ("position_embeddings", "position_ids")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return self.attended(hidden_states, **options), None

    def why_not_now(self) -> str | None:
        return _why_not_width(self) or super().why_not_now()

    def why_not_call(
        self, attention_mask: Any = None, position_embeddings: Any = None, position_ids: Any = None, **options: Any
    ) -> str | None:
        if position_ids is not None and position_ids.shape[-1] != 2:
            return f"called with positions in {position_ids.shape[-1]} directions"
        return super().why_not_call(attention_mask, **options)

    def branch(
        self,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Branch:
        def attend(three: Three) -> Tensor:
            assert position_embeddings is not None
            return _attended(self, three, *position_embeddings, attention_mask, self.scaling)  # type: ignore[arg-type]

        return _attention_branch(self, attend)


class FusedTimmAttention(timm.FusedAttention):
    """timm's Gemma4Attention."""

    reads = ()

    def forward(  # type: ignore[override]
        self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        if self.declines(x, self.why_not_now, attn_mask):
            return super(timm.FusedAttention, self).forward(x, rope_cos, rope_sin, attn_mask)
        with self.backend():
            return self.branch(rope_cos=rope_cos, rope_sin=rope_sin, attn_mask=attn_mask).run(x, False)[0]

    def why_not_now(self) -> str | None:
        attn: Any = self
        drops = (attn.attn_drop.p if attn.training else 0.0) or not parts.drops_nothing(attn.attn_drop)
        return _why_not_width(self) or ("a dropout of attention's weights" if drops else None)

    def branch(
        self,
        rope_cos: Tensor | None = None,
        rope_sin: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Branch:
        def attend(three: Three) -> Tensor:
            assert rope_cos is not None
            assert rope_sin is not None
            return _attended(self, three, rope_cos, rope_sin, attn_mask)

        return dropped(_attention_branch(self, attend), self.proj_drop)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedGemmaMlp(Fused):
    """transformers' Gemma4VisionMLP and timm's Gemma4GatedMlp."""

    axes = None
    activation: ClassVar[str] = "act_fn"

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x)
        with self.backend():
            return self.branch().run(x, False)[0]

    def branch(self, **options: Any) -> Branch:
        return dropped(self._inner(), self._modules.get("drop"))

    def _inner(self) -> Branch:
        act: Any = self._modules[self.activation]
        gating, other, last = (self._modules[name] for name in ("gate_proj", "up_proj", "down_proj"))
        first = {"gate_proj": gating, "up_proj": other}
        why_not = _why_not_projections(**first, down_proj=last)
        if why_not is None and not any(map(_limits, (gating, other, last))):

            def gate(both: Tensor) -> Tensor:
                one, two = both.chunk(2, dim=-1)
                return act(one) * two

            return gated_branch(_inside(first), gate, _inside({"down_proj": last}), act=act)
        call: Any = (lambda module, x: module(x)) if why_not is not None else _projected

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, None]:
            return call(last, act(call(gating, x)) * call(other, x)), None

        return Branch(run, "linear, limits and gate of torch, linear", None, why_not, "")

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedTimmMlp(FusedGemmaMlp):
    """timm's Gemma4GatedMlp."""

    activation = "act"


# ---------------------------------------------------------------------------------------------------------- layers


def _normed_behind(step: Sublayer, name: str, norm: nn.Module, keeps_dtype: bool) -> None:
    """Put a norm behind the branch of a step; it may answer in the branch's dtype, or widen as its weight does."""

    def after(out: Tensor) -> Tensor:
        return parts.layer_norm(norm, out, out.dtype if keeps_dtype else None)

    branch = step.branch
    why_not = parts.why_not_layer_norm(name, norm)
    reason = branch.reason if why_not is None else why_not
    step.branch = dataclasses.replace(
        followed(branch, after), reason=reason, ops=", ".join(filter(None, (branch.ops, "add_rms_norm")))
    )


class FusedGemmaLayer(FusedLayer):
    """transformers' Gemma4VisionEncoderLayer."""

    names = Names(("input_layernorm", "pre_feedforward_layernorm"), "self_attn")
    behind: ClassVar[tuple[str, str]] = ("post_attention_layernorm", "post_feedforward_layernorm")
    needs = FusedGemmaAttention.needs

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }
        if self.leaves(hidden_states, **options):
            return super(FusedLayer, self).forward(hidden_states, **options)
        return self.run(hidden_states, **options)

    def call(self, attn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        return attn(hidden_states=x, **options)[0]

    def sublayers(self, **options: Any) -> list[Sublayer]:
        steps = super().sublayers(**options)
        for step, name in zip(steps, self.behind, strict=True):
            _normed_behind(step, name, getattr(self, name), keeps_dtype=True)
        return steps


class FusedTimmBlock(timm.FusedBlock):
    """timm's Gemma4Block."""

    passes: ClassVar[dict[str, Any]] = {}

    def forward(  # type: ignore[override]
        self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        if self.declines(x, mask=attn_mask):
            return super(timm.FusedBlock, self).forward(x, rope_cos, rope_sin, attn_mask)
        return self.run(x, rope_cos=rope_cos, rope_sin=rope_sin, attn_mask=attn_mask)

    def why_not_joined(self) -> str | None:
        return "its positions come with each call"

    def called(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The attention as the block calls it."""
        block: Any = self
        return block.attn(x, rope_cos, rope_sin, attn_mask=attn_mask)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_of("attn", block.attn, lambda x: self.called(x, **options), **options)
        steps = [
            Sublayer("attn", block.norm1, attention, None, block.drop_path),
            Sublayer("mlp", block.norm3, branch_of("mlp", block.mlp), None, block.drop_path),
        ]
        for step, name in zip(steps, ("norm2", "norm4"), strict=True):
            _normed_behind(step, name, getattr(block, name), keeps_dtype=False)
        return steps


_CALL = ("hidden_states", "position_embeddings", "attention_mask", "position_ids", "kwargs")
_NORMS = ("q_norm", "k_norm", "v_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ROPE = ("x", "rope_cos", "rope_sin", "attn_mask")
RULES = (
    attention_rule(FusedGemmaAttention, owners("gemma4.Gemma4VisionAttention"), _CALL, _NORMS, shares_keys=True),
    Rule(
        FusedGemmaMlp,
        owners("gemma4.Gemma4VisionMLP"),
        lambda mlp: differs(mlp, ("x",), (*_MLP, FusedGemmaMlp.activation)),
    ),
    layer_rule(FusedGemmaLayer, owners("gemma4.Gemma4VisionEncoderLayer"), _CALL, FusedGemmaLayer.behind),
    Rule(
        FusedTimmAttention,
        frozenset({f"{_TIMM}Attention"}),
        lambda attn: differs(attn, _ROPE, (*_INPUTS, "o_proj", *_NORMS, "attn_drop", "proj_drop")),
    ),
    Rule(
        FusedTimmMlp,
        frozenset({f"{_TIMM}GatedMlp"}),
        lambda mlp: differs(mlp, ("x",), (*_MLP, FusedTimmMlp.activation, "drop")),
    ),
    Rule(
        FusedTimmBlock,
        frozenset({f"{_TIMM}Block"}),
        lambda block: differs(block, _ROPE, ("norm1", "attn", "norm2", "norm3", "mlp", "norm4", "drop_path")),
    ),
)
