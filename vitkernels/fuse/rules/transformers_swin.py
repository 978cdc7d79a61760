"""Hugging Face transformers: Swin and its second version, Donut's, MaskFormer's and Swin2SR's (read from 5.23).

The bias of relative positions is a mask of [1, H, N, N] that learns; where windows are shifted, one for each window of
an image, which serve in turn.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers import FusedLayer, Names, layer_rule
from vitkernels.fuse.rules.transformers_nested import FusedSpreadLayer
from vitkernels.fuse.rules.transformers_parts import FusedAttention, FusedWrittenAttention, attention_rule, owners
from vitkernels.fuse.rules.transformers_spelling import Spelling, at, why_not_inside, written_out
from vitkernels.ops._windows import Windows
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import Branch, Step, Sublayer, added_norms
from vitkernels.residual.sublayers import attention_step, join_heads, joined, why_not_linears

BIAS = "a relative bias on its scores"


# ------------------------------------------------------------------------------------------------------- attention


class FusedSwinAttention(FusedAttention):
    """SwinAttention: of windows, with the masks of an image's windows, [W, N, N]."""

    spelling = Spelling(is_causal=False)

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:
        return super().why_not_call(None, **options)

    def is_plain(self) -> bool:
        return False

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        attn: Any = self
        mask = _added(self.bias(), attention_mask)
        return ops.attention_qkv(packed, attn.num_attention_heads, attn_mask=mask, scale=attn.scaling)

    def bias(self) -> Tensor:
        """What is added to the scores of every window, [1, H, N, N]."""
        attn: Any = self
        return attn.relative_position_bias()


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    return bias if mask is None else bias + mask[:, None]


class FusedDonutAttention(FusedWrittenAttention):
    """DonutSwinAttention and MaskFormerSwinAttention: of windows too."""

    spelling = written_out("self")

    def why_not_call(self, attention_mask: Any = None, **options: Any) -> str | None:  # type: ignore[override]
        return super().why_not_call(None, **options)

    def is_plain(self) -> bool:
        return False

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        inner: Any = self.self
        return ops.attention_qkv(packed, inner.num_attention_heads, attn_mask=_added(self.bias(), attention_mask))

    def bias(self) -> Tensor:
        """As `FusedSwinAttention.bias`."""
        inner: Any = self.self
        return _gathered(inner, inner.relative_position_bias_table)[None]


def _gathered(inner: Any, table: Tensor) -> Tensor:
    """[H, N, N] of a table of all relative positions, [(2h - 1)(2w - 1), H]."""
    tokens = inner.window_size[0] * inner.window_size[1]
    return table[inner.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()


class FusedSwinV2Attention(FusedDonutAttention):
    """Swinv2Attention and Swin2SRAttention: q and k of length 1, and a bias that a small network makes of positions."""

    def attend(self, packed: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        inner: Any = self.self
        q, k, v = (
            each.unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2) for each in packed.chunk(3, dim=-1)
        )
        factor = inner.logit_scale.clamp(max=math.log(100.0)).exp()
        q, k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        table = inner.continuous_position_bias_mlp(inner.relative_coords_table).view(-1, inner.num_attention_heads)
        bias = (16 * torch.sigmoid(_gathered(inner, table)))[None]
        twice = None if attention_mask is None else 2 * attention_mask  # the library adds it two times
        return join_heads(ops.attention(q, k, v, attn_mask=_added(bias, twice), scale=1.0))


# ---------------------------------------------------------------------------------------------------------- layers


def _step_within(attn: Any, windows: Windows, masks: Callable[[Tensor], Tensor | None], **options: Any) -> Step | None:
    """The norm of an attention, its windows made and undone, and the attention as one Function; None where a call of it
    must see the windows.

    Args:
        attn: a layer's.
        windows: of the image.
        masks: the layer's of these windows, from a tensor of their dtype and device.
        options: keywords of its call.
    """
    served = isinstance(attn, FusedSwinAttention | FusedDonutAttention) and not isinstance(attn, FusedSwinV2Attention)
    if not served or not windows.whole or parts.why_not_part("attention", attn) is not None:
        return None
    if attn.why_not_alone() is not None or attn.why_not_call(**options) is not None:
        return None
    spelling = attn.spelling
    inputs, out = [at(attn, name) for name in spelling.inputs], at(attn, spelling.out)
    last = None if spelling.last is None else at(attn, spelling.last)
    if why_not_linears(**dict(zip(spelling.inputs, inputs, strict=True)), out=out) or not parts.drops_nothing(last):
        return None

    def mask() -> Tensor:
        bias = attn.bias()
        return _added(bias, masks(bias))

    scale = None if spelling.scale is None else at(attn, spelling.scale)
    heads = at(attn, spelling.heads)
    return attention_step(lambda: joined(*inputs), out, heads, attn_mask=mask, scale=scale, windows=windows)


def _without_last_path(steps: list[Sublayer]) -> list[Sublayer]:
    """The steps of a layer that drops no feed-forward."""
    steps[1].drop_path = None
    return steps


class FusedSwinLayer(FusedLayer):
    """SwinLayer: windows, shifted in every other layer."""

    follows = ("cyclic_shift", "maybe_pad")
    names = Names(
        ("layernorm_before", "layernorm_after"),
        "attention",
        drop_paths=("drop_path", "drop_path"),
        dropouts=(None, "dropout"),
    )
    drops_windows: ClassVar[bool] = True  # whether a dropout of the layer's own draws for the attention's windows

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        if self.leaves(hidden_states):
            return super(FusedLayer, self).forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            layer.set_shift_and_window_size(input_dimensions)
        weights: list[Tensor | None] = []
        x = self.run(hidden_states, sides=input_dimensions, weights=weights, given=kwargs)
        return x, weights[0] if weights else None

    def sublayers(self, **options: Any) -> list[Sublayer]:
        return _without_last_path(super().sublayers(**options))

    def attention_branch(self, **options: Any) -> Branch:
        layer: Any = self
        attn = layer.attention
        branch = attention_within("attention", attn, lambda x: self.call(attn, x, **options), BIAS)
        drops = self.drops_windows and not parts.drops_nothing(layer.dropout)
        if options and not drops:
            (height, width), size, shift = options["sides"], layer.window_size, layer.shift_size
            windows = Windows((height, width), (size, size), (shift, shift))
            masks = functools.partial(self.masks, windows.sides)
            branch.step = _step_within(attn, windows, masks, **options["given"])
        return branch

    def call(  # type: ignore[override]
        self, attn: nn.Module, x: Tensor, sides: tuple[int, int], weights: list[Any], given: dict[str, Any]
    ) -> Tensor:
        """The attention of the image's windows; its weights are appended to the list."""
        layer: Any = self
        own = sys.modules[genuine.owner(self).__module__]
        size, shift, width = layer.window_size, layer.shift_size, x.shape[-1]
        image, _ = layer.maybe_pad(x.unflatten(1, sides), *sides)
        padded = image.shape[1:3]
        if shift > 0:
            image = torch.roll(image, shifts=(-shift, -shift), dims=(1, 2))
        windows = own.window_partition(image, size).view(-1, size * size, width)
        out, *found = attn(windows, self.masks(padded, windows), **given)
        weights += found
        if self.drops_windows:
            out = layer.dropout(out)
        image = own.window_reverse(out.view(-1, size, size, width), size, *padded)
        if shift > 0:
            image = torch.roll(image, shifts=(shift, shift), dims=(1, 2))
        return image[:, : sides[0], : sides[1]].flatten(1, 2)

    def masks(self, sides: tuple[int, int], windows: Tensor) -> Tensor | None:
        """Those of an image's windows, where they are shifted."""
        layer: Any = self
        return layer.get_attn_mask(*sides, dtype=windows.dtype, device=windows.device)


class FusedWindowsLayer(FusedSpreadLayer):
    """What the other layers share, called with output_attentions: `intermediate` and `output` are the feed-forward."""

    follows = ("maybe_pad",)
    names = Names(("layernorm_before", "layernorm_after"), "attention", "output", drop_paths=("drop_path", "drop_path"))
    drops_windows: ClassVar[bool] = False
    attention_branch = FusedSwinLayer.attention_branch
    call = FusedSwinLayer.call  # type: ignore[assignment]
    masks = FusedSwinLayer.masks

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedLayer, self).forward(hidden_states, input_dimensions, output_attentions)
        return self.stepped(hidden_states, input_dimensions)

    def why_not_call(self, output_attentions: bool = False, **options: Any) -> str | None:
        return "called with output_attentions" if output_attentions else super().why_not_call(**options)

    def stepped(self, x: Tensor, sides: tuple[int, int]) -> tuple[Tensor]:
        """What a call returns that asks for no weights."""
        return (self.run(x, sides=sides, weights=[], given={}),)


class FusedMaskFormerLayer(FusedWindowsLayer):
    """MaskFormerSwinLayer."""

    def sublayers(self, **options: Any) -> list[Sublayer]:
        return _without_last_path(super().sublayers(**options))

    def masks(self, sides: tuple[int, int], windows: Tensor) -> Tensor | None:
        layer: Any = self
        return layer.get_attn_mask(sides, device=windows.device, dtype=windows.dtype)


class FusedDonutLayer(FusedWindowsLayer):
    """DonutSwinLayer."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[Tensor, ...]:
        layer: Any = self
        if self.leaves(hidden_states, output_attentions=output_attentions):
            return super(FusedLayer, self).forward(hidden_states, input_dimensions, output_attentions, always_partition)
        if not always_partition:
            layer.set_shift_and_window_size(input_dimensions)
        return self.stepped(hidden_states, input_dimensions)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        return _without_last_path(super().sublayers(**options))


class FusedSwinV2Layer(FusedWindowsLayer):
    """Swinv2Layer and Swin2SRLayer: each norm comes behind its branch."""

    def reader(self) -> object:
        return None

    def run(self, x: Tensor, **options: Any) -> Tensor:
        with self.backend():
            return added_norms(x, self.sublayers(**options), self._vitkernels.residual_dtype)

    def why_not_joined(self) -> str | None:
        return "its norms come behind its branches"


def _twins(part: str) -> frozenset[str]:
    """The classes of that part of four texts."""
    return owners(
        f"""
        donut.donut_swin.DonutSwin{part} maskformer.maskformer_swin.MaskFormerSwin{part} swin2sr.Swin2SR{part}
        swinv2.Swinv2{part}
        """
    )


def _nested(mixin: type[FusedDonutAttention], *names: str) -> Rule:
    arguments = ("hidden_states", "attention_mask", "output_attentions")
    within = {"self": "SelfAttention", "output": "SelfOutput"}
    return attention_rule(
        mixin,
        owners(" ".join(f"{name}Attention" for name in names)),
        arguments,
        inside={part: owners(" ".join(f"{name}{cls}" for name in names)) for part, cls in within.items()},
    )


def _layer(mixin: type[FusedWindowsLayer], names: str, *more: str) -> Rule:
    children = mixin.names.children() | {"intermediate"}
    inside = {"intermediate": _twins("Intermediate"), "output": _twins("Output")}
    arguments = ("hidden_states", "input_dimensions", "output_attentions", *more)
    return Rule(
        mixin, owners(names), lambda layer: differs(layer, arguments, children) or why_not_inside(layer, inside)
    )


RULES = (
    attention_rule(FusedSwinAttention, owners("swin.SwinAttention"), optional=("relative_position_bias",)),
    _nested(FusedDonutAttention, "donut.donut_swin.DonutSwin", "maskformer.maskformer_swin.MaskFormerSwin"),
    _nested(FusedSwinV2Attention, "swinv2.Swinv2", "swin2sr.Swin2SR"),
    layer_rule(
        FusedSwinLayer,
        owners("swin.SwinLayer"),
        ("hidden_states", "input_dimensions", "always_partition", "kwargs"),
    ),
    _layer(FusedMaskFormerLayer, "maskformer.maskformer_swin.MaskFormerSwinLayer"),
    _layer(FusedDonutLayer, "donut.donut_swin.DonutSwinLayer", "always_partition"),
    _layer(FusedSwinV2Layer, "swinv2.Swinv2Layer swin2sr.Swin2SRLayer"),
)
