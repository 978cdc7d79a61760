"""Hugging Face transformers: what the attention modules of its Vision Transformers share (read from 5.23).

Attention there is a function that a model's config names; the functions served here differ in speed alone, and in what
they do with `is_causal`. The library writes each model out in full, so that one text stands in many files: a mixin
serves a text or several that differ in names, and each rule lists the classes that hold one text. The texts are in
`transformers_attention`, feed-forwards in `transformers_mlp`, the layers around both in `transformers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_spelling import Spelling, at, why_not_inside, why_not_without, written_out
from vitkernels.fuse.swap import Fused
from vitkernels.ops import _steps
from vitkernels.ops._steps import Called, HeadNorms, Positions
from vitkernels.residual import known, parts
from vitkernels.residual.genuine import IDLE_HOOKS, WRAPPERS
from vitkernels.residual.stream import Branch, Part, Step
from vitkernels.residual.sublayers import (
    ATTENTION,
    attention_step,
    dropped,
    join_heads,
    joined,
    linear_step,
    projected,
    read_head_norms,
    why_not_linears,
)


def owners(names: str) -> frozenset[str]:
    """Classes of the library's model files, by "package.Class", or "package.file.Class" where a package has several."""
    split = [name.split(".") for name in names.split()]
    return frozenset(f"transformers.models.{name[0]}.modeling_{name[-2]}.{name[-1]}" for name in split)


def _formula(name: str, act: nn.Module) -> str:
    return name


known.RMS_NORMS.update(
    dict.fromkeys(
        owners(
            """
            aimv2.Aimv2RMSNorm deepseek_ocr2.DeepseekOcr2VisionRMSNorm dots3_note.Dots3NoteRMSNorm
            exaone4_5.Exaone4_5_RMSNorm glm4v.Glm4vRMSNorm glm4v_moe.Glm4vMoeRMSNorm glm_image.GlmImageRMSNorm
            glm5_next.Glm5NextRMSNorm glm_ocr.GlmOcrRMSNorm internvl.InternVLVisionRMSNorm
            kosmos2_5.Kosmos2_5LayerNorm lfm3_vl.Lfm3VlVisionRMSNorm ovis2.Ovis2RMSNorm pix2struct.Pix2StructLayerNorm
            pixtral.PixtralRMSNorm qianfan_ocr.QianfanOCRVisionRMSNorm qwen2_5_omni.Qwen2_5OmniRMSNorm
            qwen2_5_vl.Qwen2_5_VLRMSNorm sapiens2.Sapiens2RMSNorm
            """
        ),
        lambda norm: norm.variance_epsilon,
    )
)
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

# Names of attention functions that compute one thing; with a mask of four axes, or without one.
_FUNCTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "vitkernels")
# Keywords that reach attention on their way to others, and change nothing in it.
_PASSING = frozenset(
    {
        "is_causal",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
    }
)


class FusedAttention(Fused):
    """ViTAttention and its like: the projections as one product, then `ops.attention_qkv`.

    Eager attention returns the weights beside the output. A block throws them away, so reading around the module
    loses nothing; whoever calls the module itself gets its own code.
    """

    steps: ClassVar[str] = ATTENTION
    spelling: ClassVar[Spelling] = Spelling()
    has_functions: ClassVar[bool] = True  # whether the config names what computes; else it is written out, as eager's
    hears_keywords: ClassVar[bool] = True
    returns_weights: ClassVar[bool] = True
    by_halves: ClassVar[bool] = False  # whether an element's pair, in a rotary position, is half a head away
    is_packed: ClassVar[bool] = False  # whether calls are of images laid end to end
    sees_all: ClassVar[bool] = False  # whether it has no way to hide later tokens
    needs: ClassVar[tuple[str, ...]] = ()  # keywords
    stock_only: ClassVar[tuple[str, ...]] = ()  # children that the stock forward calls on other axes

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.leaves(hidden_states, attention_mask=attention_mask, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.attended(hidden_states, attention_mask=attention_mask, **kwargs), None

    def leaves(self, x: Tensor, **options: Any) -> bool:
        """Whether a call of the module itself with these keywords belongs to its own class."""
        return self.declines(
            x,
            lambda: why_not_without(self.needs, options) or self.why_not_alone() or self.why_not_call(**options),
            options.get("attention_mask"),
        )

    def attended(self, x: Tensor, **options: Any) -> Tensor:
        """The module on its tokens; the options are its forward's."""
        with self.backend():
            return self.branch(**options).run(x, False)[0]

    def reader(self) -> object:
        return at(self, self.spelling.inputs[0])

    def implementation(self) -> str:
        """The attention function that the config names."""
        return (at(self, self.spelling.config)._attn_implementation or "eager") if self.has_functions else "eager"

    def why_not_now(self) -> str | None:
        named = {name: at(self, name) for name in (*self.spelling.inside, *self.stock_only)}
        reasons = (parts.why_not_part(name, module) for name, module in named.items())
        why_not = next((reason for reason in reasons if reason is not None), None)
        if why_not is None and self._drops():
            why_not = "a dropout of attention's weights"
        if why_not is None and self.sees_all and getattr(self, "is_causal", False):
            why_not = "its is_causal is set"
        function = self.implementation()
        return why_not or (None if function in _FUNCTIONS else f"attn_implementation is {function!r}")

    def _drops(self) -> bool:
        dropout = at(self, self.spelling.dropout)
        if isinstance(dropout, nn.Module):
            return not parts.drops_nothing(dropout)
        inside = self.spelling.dropout.rpartition(".")[0]
        return bool((at(self, inside) if inside else self).training and dropout > 0)

    def why_not_alone(self) -> str | None:
        """`why_not_now`, where the module is called by somebody who may want its weights."""
        returned = self.returns_weights and self.implementation() == "eager"
        return "eager attention returns its weights" if returned else self.why_not_now()

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:
        """Why a call with this mask and these keywords cannot run fused, or None when it can."""
        for name in options if self.hears_keywords else ():
            if name not in _PASSING or (name == "is_causal" and self.spelling.is_causal is not None):
                return f"called with {name}"
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, Tensor):
            return f"called with a {type(attention_mask).__name__} for a mask"
        if attention_mask.dtype == torch.bool and self.implementation() == "eager":
            return "eager attention adds its mask, and this one is bool"
        return None if attention_mask.dim() == 4 else f"called with a mask of {attention_mask.dim()} axes"

    def is_causal_now(self, mask: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether the config's attention function would hide later tokens in this call."""
        own = self.spelling.is_causal
        if mask is not None or own is False or self.implementation() == "eager":
            return False
        asked = options.get("is_causal") if self.hears_keywords else None
        if asked is None:
            asked = at(self, own) if isinstance(own, str) else getattr(self, "is_causal", True)
        return bool(asked)

    def attend(self, packed: Tensor, **options: Any) -> Tensor:
        """The projections' results side by side, [B, N, 3 * D], to the heads' outputs side by side, [B, N, D]."""
        heads, scale = at(self, self.spelling.heads), self.score_factor()
        called = self.called(**options)
        if self.is_one_step(**options):
            norms = self.head_norms()
            assert norms is not None
            return _steps.between(packed, heads, norms, called, scale)
        q, k, v = self.turned(*self.split(packed), **options)
        out = ops.attention(q, k, v, attn_mask=called.attn_mask, is_causal=called.is_causal, scale=scale)
        return join_heads(out)

    def called(self, attention_mask: Tensor | None = None, **options: Any) -> Called:
        """What a call with these options brings to the scores."""
        is_causal = self.is_causal_now(attention_mask, options)
        return Called(attention_mask, is_causal, self.positions(**options))

    def positions(self, **options: Any) -> Positions:
        """Of a call's tokens."""
        return Positions()

    def is_one_step(self, **options: Any) -> bool:
        """Whether nothing but the ops of `attention_step` stands between the projections in such a call."""
        return self.head_norms() is not None

    def head_norms(self) -> HeadNorms | None:
        """Norms of each head's q and k, as `ops.rotary_qkv` has them; None where it cannot stand between the projection
        and the scores."""
        if self.is_plain():
            return HeadNorms()
        names = self.spelling.norms
        if names is None or not self.spelling.each_head:
            return None
        q_norm, k_norm = (at(self, name) for name in names)
        return read_head_norms(q_norm, k_norm, at(self, self.spelling.out), self.by_halves)

    def score_factor(self) -> float | None:
        """The factor on the scores; None for the usual one."""
        name = self.spelling.scale
        return None if name is None else at(self, name)

    def is_plain(self) -> bool:
        """Whether nothing happens to q and k between the projections and the scores."""
        return self.spelling.norms is None or all(parts.is_identity(at(self, name)) for name in self.spelling.norms)

    def split(self, packed: Tensor) -> list[Tensor]:
        """q, k and v, each [B, H, N, K], with the norms of q and k."""
        heads, norms, each = at(self, self.spelling.heads), self.spelling.norms, self.spelling.each_head
        three = list(packed.chunk(3, dim=-1))

        def normed() -> None:
            for index, name in enumerate(norms or ()):
                three[index] = parts.layer_norm(at(self, name), three[index]).to(three[2].dtype)

        if not each:
            normed()
        three = [tensor.unflatten(-1, (heads, -1)) for tensor in three]
        if each:
            normed()
        return [tensor.transpose(1, 2) for tensor in three]

    def turned(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the scores see them: with rotary positions, where there are any."""
        return q, k, v

    def branch(self, **options: Any) -> Branch:
        inputs = {name: at(self, name) for name in self.spelling.inputs}
        out = at(self, self.spelling.out)
        why_not = why_not_linears(**inputs)
        reader = None if why_not else next(iter(inputs.values()))
        why_not = why_not or why_not_linears(**{self.spelling.out: out})

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return finish(projected(x, *inputs.values()), bias_apart)

        def finish(packed: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return parts.last_linear(out, self.attend(packed, **options), bias_apart)

        lacks = why_not or why_not_without(self.needs, options)  # as `explain` asks, without a call
        step = None if lacks else self.step(lambda: joined(*inputs.values()), out, finish, **options)
        last = None if self.spelling.last is None else at(self, self.spelling.last)
        return dropped(Branch(run, self.steps, reader, why_not, step=step), last)

    def step(
        self,
        packed: Callable[[], tuple[Tensor, Tensor | None]],
        out: nn.Module,
        finish: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]],
        **options: Any,
    ) -> Step:
        """The branch with its norm as one Function, where all Linears may be read."""
        if not self.is_one_step(**options):
            return linear_step(packed, finish)
        turns = not self.is_plain()
        return attention_step(
            packed,
            out,
            at(self, self.spelling.heads),
            scale=self.score_factor(),
            norms=self.head_norms if turns else None,  # type: ignore[arg-type]
            call=self.called,
            options=options,
            is_packed=self.is_packed,
        )

    def parts(self) -> list[Part]:
        branch = self.branch()
        return [Part("", branch.ops, self.why_not_alone() or branch.why_not)]


class FusedWrittenAttention(FusedAttention):
    """Attention that is written out, in two modules inside, and returns a tuple: FlavaAttention, DonutSwinAttention."""

    spelling = written_out("attention")
    has_functions = False

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        options = {"attention_mask": attention_mask, "output_attentions": output_attentions}
        if self.leaves(hidden_states, **options):
            return super(FusedAttention, self).forward(hidden_states, **options)
        return (self.attended(hidden_states, **options),)

    def why_not_alone(self) -> str | None:
        return self.why_not_now()

    def why_not_call(self, attention_mask: Any = None, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else super().why_not_call(attention_mask, **options)


_ARGUMENTS = ("hidden_states", "attention_mask", "kwargs")


def attention_rule(
    mixin: type[FusedAttention],
    names: frozenset[str],
    arguments: Collection[str] = _ARGUMENTS,
    optional: Collection[str] = (),
    inside: Mapping[str, frozenset[str]] = MappingProxyType({}),
    shares_keys: bool = False,
) -> Rule:
    """The rule of one text; its children are those that the mixin's spelling names, and of these classes `inside`.

    `shares_keys` says that the mixin serves heads which share their keys with others.
    """
    spelling = mixin.spelling
    last = () if spelling.last is None else (spelling.last,)
    named = {path.split(".")[0] for path in (*spelling.inputs, spelling.out, *(spelling.norms or ()), *last)}

    def contract(attn: nn.Module) -> str | None:
        if getattr(attn, "num_key_value_groups", 1) != 1 and not shares_keys:
            return "several heads share their keys"
        return differs(attn, arguments, named, optional) or why_not_inside(attn, inside)

    return Rule(mixin, names, contract)


RULES: tuple[Rule, ...] = ()  # the texts have pages of their own
