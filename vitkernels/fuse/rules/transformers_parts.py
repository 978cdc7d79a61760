"""Hugging Face transformers: the attention and feed-forward modules of its Vision Transformers.

Read from transformers 5.23. Attention there is a function that a model's config names; the functions served here
differ in speed alone, and in what they do with `is_causal`. The layers around these modules are in `transformers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused
from vitkernels.residual import known, parts, sublayers
from vitkernels.residual.genuine import IDLE_HOOKS, WRAPPERS
from vitkernels.residual.stream import Branch, Part, Step
from vitkernels.residual.sublayers import (
    ATTENTION,
    ROTARY,
    attention_step,
    join_heads,
    joined,
    linear_step,
    projected,
    rotary,
    split_heads,
    why_not_linears,
)


def owners(suffix: str, families: Mapping[str, str]) -> frozenset[str]:
    """The names of one class in many model files: package to prefix, and what follows the prefix."""
    return frozenset(f"transformers.models.{name}.modeling_{name}.{each}{suffix}" for name, each in families.items())


VIT = {
    "vit": "ViT",
    "deit": "DeiT",
    "vit_mae": "ViTMAE",
    "vit_msn": "ViTMSN",
    "ijepa": "IJepa",
    "audio_spectrogram_transformer": "AST",
    "vivit": "Vivit",
}
DINOV2 = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "tipsv2": "Tipsv2Vision"}
DINOV3 = {"dinov3_vit": "DINOv3ViT", "eomt_dinov3": "EomtDinov3"}
CLIP = {"clip": "CLIP", "metaclip_2": "MetaClip2", "altclip": "AltCLIP", "clipseg": "CLIPSeg", "x_clip": "XCLIP"}
SIGLIP = {"siglip": "Siglip", "siglip2": "Siglip2"}


def _formula(name: str, act: nn.Module) -> str:
    return name


# activation modules, by the formula they compute
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
known.ACTIVATIONS.update(
    {f"transformers.activations.{name}": functools.partial(_formula, kind) for name, kind in _ACTIVATIONS.items()}
)

# RMSNorm of vision towers, by the model whose text it stands in; all are copies of one
RMS_NORMS = {
    "aimv2": "Aimv2RMSNorm",
    "deepseek_ocr2": "DeepseekOcr2VisionRMSNorm",
    "glm4v": "Glm4vRMSNorm",
    "glm4v_moe": "Glm4vMoeRMSNorm",
    "glm_image": "GlmImageRMSNorm",
    "glm_ocr": "GlmOcrRMSNorm",
    "internvl": "InternVLVisionRMSNorm",
    "ovis2": "Ovis2RMSNorm",
    "pixtral": "PixtralRMSNorm",
    "qwen2_5_omni": "Qwen2_5OmniRMSNorm",
    "qwen2_5_vl": "Qwen2_5_VLRMSNorm",
}
known.RMS_NORMS.update(
    {
        f"transformers.models.{model}.modeling_{model}.{name}": lambda norm: norm.variance_epsilon
        for model, name in RMS_NORMS.items()
    }
)


def _records_nothing(hook: Callable[..., Any]) -> bool:
    """Whether this is the library's recorder of outputs, and nothing that is read around is recorded now.

    The first call that asks for hidden states or attentions hangs recorders on layers and attentions alike, for good.
    """
    names = getattr(hook, "__globals__", {})
    if names.get("__name__") != "transformers.utils.output_capturing" or torch.compiler.is_compiling():
        return False
    collected = names["_active_collector"].get() or {}
    return collected.keys() <= {"hidden_states", "_hidden_states_layers"}


IDLE_HOOKS.append(_records_nothing)
WRAPPERS.add(("transformers.modeling_layers", "forward_with_checkpointing"))


# ------------------------------------------------------------------------------------------------------- attention

# Names of attention functions that compute one thing; with a mask of four axes, or without one.
_FUNCTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "vitkernels")
# Keywords that reach attention on their way to others, and change nothing in it.
_PASSING = frozenset(
    {"is_causal", "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"}
)


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a template calls the parts of its attention."""

    out: str = "o_proj"
    heads: str = "num_attention_heads"
    scale: str = "scaling"
    dropout: str = "attention_dropout"


class FusedAttention(Fused):
    """ViTAttention and its copies: three projections as one product, then `ops.attention_qkv`.

    Eager attention returns the weights beside the output. A block throws them away, so reading around the module
    loses nothing; whoever calls the module itself gets its own code.
    """

    steps: ClassVar[str] = ATTENTION
    spelling: ClassVar[Spelling] = Spelling()
    reads = ("q_proj",)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.declines(
            hidden_states, lambda: self.why_not_alone() or self.why_not_call(attention_mask, kwargs), attention_mask
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        with self.backend():
            return self.run(hidden_states, False, attention_mask, kwargs)[0], None

    def why_not_now(self) -> str | None:
        attn: Any = self
        if self.training and getattr(attn, self.spelling.dropout) > 0:
            return "a dropout of attention's weights"
        function = attn.config._attn_implementation
        return None if function in _FUNCTIONS else f"attn_implementation is {function!r}"

    def why_not_alone(self) -> str | None:
        """`why_not_now`, where the module is called by somebody who may want its weights."""
        attn: Any = self
        eager = attn.config._attn_implementation in (None, "eager")
        return "eager attention returns its weights" if eager else self.why_not_now()

    def why_not_call(self, mask: Any, options: Mapping[str, Any]) -> str | None:
        """Why a call with this mask and these keywords cannot run fused, or None when it can."""
        for name in options:
            if name not in _PASSING:
                return f"called with {name}"
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            return f"called with a {type(mask).__name__} for a mask"
        return None if mask.dim() == 4 else f"called with a mask of {mask.dim()} axes"

    def is_causal_now(self, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
        """Whether the config's attention function would hide later tokens in this call."""
        attn: Any = self
        if mask is not None or attn.config._attn_implementation in (None, "eager"):
            return False
        asked = options.get("is_causal")
        return bool(attn.is_causal if asked is None else asked)

    def run(
        self, x: Tensor, bias_apart: bool, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The module on [B, N, D]; as `parts.last_linear`."""
        attn: Any = self
        return self.finish(projected(x, attn.q_proj, attn.k_proj, attn.v_proj), bias_apart, mask, options)

    def finish(
        self, packed: Tensor, bias_apart: bool, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What follows the projections, whose results stand side by side."""
        heads = self.attend(packed, mask, self.is_causal_now(mask, options), options)
        return parts.last_linear(getattr(self, self.spelling.out), heads, bias_apart)

    def attend(self, packed: Tensor, mask: Tensor | None, is_causal: bool, options: Mapping[str, Any]) -> Tensor:
        """[B, N, 3 * D] to the heads' outputs side by side, [B, N, D]."""
        heads, scale = getattr(self, self.spelling.heads), getattr(self, self.spelling.scale)
        return ops.attention_qkv(packed, heads, attn_mask=mask, is_causal=is_causal, scale=scale)

    def branch(self, attention_mask: Tensor | None = None, **options: Any) -> Branch:
        attn: Any = self
        projections = {"q_proj": attn.q_proj, "k_proj": attn.k_proj, "v_proj": attn.v_proj}
        why_not = why_not_linears(**projections)
        reader = attn.q_proj if why_not is None else None
        why_not = why_not or why_not_linears(**{self.spelling.out: getattr(attn, self.spelling.out)})
        return Branch(
            lambda x, bias_apart: self.run(x, bias_apart, attention_mask, options),
            self.steps,
            reader,
            why_not,
            step=self.step(attention_mask, options) if why_not is None else None,
        )

    def packed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the three projections as one."""
        attn: Any = self
        return joined(attn.q_proj, attn.k_proj, attn.v_proj)

    def step(self, mask: Tensor | None, options: Mapping[str, Any]) -> Step:
        """The branch with its norm as one Function, where all Linears may be read."""
        out, heads, scale = (
            getattr(self, name) for name in (self.spelling.out, self.spelling.heads, self.spelling.scale)
        )
        is_causal = self.is_causal_now(mask, options)
        return attention_step(self.packed, out, heads, attn_mask=mask, is_causal=is_causal, scale=scale)

    def parts(self) -> list[Part]:
        branch = self.branch()
        return [Part("", branch.ops, self.why_not_alone() or branch.why_not)]


class FusedClipAttention(FusedAttention):
    """CLIPAttention and its copies."""

    spelling = Spelling("out_proj", "num_heads", "scale", "dropout")


class FusedSiglipAttention(FusedClipAttention):
    """SiglipAttention and its copy: deaf to keywords."""

    def why_not_call(self, mask: Any, options: Mapping[str, Any]) -> str | None:
        return super().why_not_call(mask, {})

    def is_causal_now(self, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
        return super().is_causal_now(mask, {})


def without_positions(position_embeddings: object) -> str | None:
    """Whether a call lacks what it cannot do without; the module's own error is the one to see."""
    return "called without position_embeddings" if position_embeddings is None else None


class FusedRopeAttention(FusedAttention):
    """DINOv3ViTAttention: rotary positions on the patches' q and k, none on the prefix tokens'."""

    steps = ROTARY
    spelling = Spelling("o_proj", "num_heads", "scaling", "dropout")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"position_embeddings": position_embeddings, **kwargs}
        if self.declines(
            hidden_states,
            lambda: (
                without_positions(position_embeddings)
                or self.why_not_alone()
                or self.why_not_call(attention_mask, options)
            ),
            attention_mask,
        ):
            return super(FusedAttention, self).forward(hidden_states, attention_mask, **options)
        with self.backend():
            return self.run(hidden_states, False, attention_mask, options)[0], None

    def why_not_call(self, mask: Any, options: Mapping[str, Any]) -> str | None:
        rest = {name: value for name, value in options.items() if name != "position_embeddings"}
        return super().why_not_call(mask, rest)

    def step(self, mask: Tensor | None, options: Mapping[str, Any]) -> Step:
        return linear_step(self.packed, lambda packed, bias_apart: self.finish(packed, bias_apart, mask, options))

    def attend(self, packed: Tensor, mask: Tensor | None, is_causal: bool, options: Mapping[str, Any]) -> Tensor:
        cos, sin = options["position_embeddings"]
        q, k, v = split_heads(packed, getattr(self, self.spelling.heads))
        q, k = (rotary(each, sin, cos, prefix=each.shape[2] - sin.shape[-2], half=True) for each in (q, k))
        scale = getattr(self, self.spelling.scale)
        return join_heads(ops.attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale))


_ARGUMENTS = ("hidden_states", "attention_mask", "kwargs")
_ROPE_ARGUMENTS = ("hidden_states", "attention_mask", "position_embeddings", "kwargs")


def _attention(
    mixin: type[FusedAttention], families: Mapping[str, str], arguments: tuple[str, ...] = _ARGUMENTS
) -> Rule:
    children = ("q_proj", "k_proj", "v_proj", mixin.spelling.out)
    return Rule(mixin, owners("Attention", families), lambda attn: differs(attn, arguments, children))


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedMlp(Fused):
    """Two projections and an activation, on `ops.mlp`."""

    names: ClassVar[tuple[str, str, str]] = ("fc1", "activation_fn", "fc2")
    reads = ("fc1", "up_proj")
    axes = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.declines(hidden_states):
            return super().forward(hidden_states)
        with self.backend():
            return self.branch().run(hidden_states, False)[0]

    def branch(self, **options: Any) -> Branch:
        first, act, last = (getattr(self, name) for name in self.names)
        return sublayers.mlp_branch(first, act, last, names=(self.names[0], self.names[2]))

    def parts(self) -> list[Part]:
        return [self.branch().part("")]


class FusedUpDownMlp(FusedMlp):
    """DINOv3ViTMLP: the same by other names."""

    names = ("up_proj", "act_fn", "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedGatedMlp(FusedMlp):
    """DINOv2's and DINOv3's SwiGLU (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def branch(self, **options: Any) -> Branch:
        mlp: Any = self

        def gate(both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return mlp.act_fn(first) * second

        projections = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
        return sublayers.gated_branch(projections, gate, {"down_proj": mlp.down_proj}, act=mlp.act_fn)


def _has_mlp_parts(module: nn.Module) -> bool:
    """Whether a module is made as `FusedMlp` expects: many models have a copy of it under another name."""
    return set(module._modules) == set(FusedMlp.names) and isinstance(module._modules["fc1"], nn.Linear)


RULES = (
    _attention(FusedAttention, VIT | DINOV2),
    _attention(FusedRopeAttention, DINOV3, _ROPE_ARGUMENTS),
    _attention(FusedClipAttention, CLIP),
    _attention(FusedSiglipAttention, SIGLIP),
    Rule(
        FusedMlp,
        owners("MLP", VIT | DINOV2 | CLIP | SIGLIP),
        lambda mlp: differs(mlp, ("hidden_states",), FusedMlp.names),
        _has_mlp_parts,
    ),
    Rule(FusedUpDownMlp, owners("MLP", DINOV3), lambda mlp: differs(mlp, ("x",), FusedUpDownMlp.names)),
    Rule(
        FusedGatedMlp,
        owners("SwiGLUFFN", DINOV2) | owners("GatedMLP", DINOV3),
        lambda mlp: differs(mlp, ("x",), ("gate_proj", "up_proj", "down_proj", "act_fn")),
    ),
)
