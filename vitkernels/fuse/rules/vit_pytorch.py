"""vit-pytorch: Transformers that run attention and feed-forward, each with its norm inside, in a loop of their own.

Read from vit-pytorch 1.26.11. The package repeats these classes in every file, with changes: beside `vit` and
`simple_vit`, they are known by their structure, and tried on random tokens. The blocks are the pairs in `layers`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, branch_of
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import Branch, Part, Sublayer, normed_branch, pre_norm
from vitkernels.residual.sublayers import attention_step, dropped, joined, linear_step, mlp_branch, why_not_linears

_NO_NORM = nn.Identity()  # before a sub-layer that is called whole, its own norm inside


class _NormedBranch(Fused):
    """A sub-layer that begins with its norm."""

    def reader(self) -> object:
        return self.norm_module()

    def norm_module(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or _why_not_tokens(x)):
            return super().forward(x)
        with self.backend():
            return normed_branch(x, self.norm_module(), self.branch())

    def parts(self) -> list[Part]:
        why_not = self.why_not_now()
        if why_not is not None:
            return [Part("", "", why_not)]
        norm = parts.why_not_layer_norm("norm", self.norm_module())
        return [Part("norm", "" if norm else "add_layer_norm", norm), self.branch().part("")]


def _why_not_tokens(x: Tensor) -> str | None:
    return None if x.dim() == 3 else f"called with shape {list(x.shape)}"


# ------------------------------------------------------------------------------------------------------- attention


class FusedAttention(_NormedBranch):
    """vit_pytorch.vit.Attention on `ops.attention_qkv`."""

    def norm_module(self) -> nn.Module:
        return self.norm  # type: ignore[return-value]

    def why_not_now(self) -> str | None:
        attn: Any = self
        if not parts.drops_nothing(getattr(attn, "dropout", None)):
            return "a dropout of attention's weights"
        return parts.why_not_part("attend", attn.attend, nn.Softmax)

    def branch(self, **options: Any) -> Branch:
        attn: Any = self
        projection, dropout = _projection(attn.to_out)

        def finish(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            heads = ops.attention_qkv(qkv, attn.heads, scale=attn.scale)
            return parts.last_linear(projection, heads, bias_apart)

        is_last = parts.is_identity(projection)
        unread = None if is_last else why_not_linears(to_out=projection)
        why_not = why_not_linears(to_qkv=attn.to_qkv) or unread
        step = None
        if why_not is None:
            packed = functools.partial(joined, attn.to_qkv)
            whole = attention_step(packed, projection, attn.heads, scale=attn.scale)
            step = linear_step(packed, finish) if is_last else whole
        branch = Branch(
            lambda x, bias_apart: finish(parts.linear(attn.to_qkv, x), bias_apart),
            "linear, attention, linear",
            attn.to_qkv,
            why_not,
            step=step,
        )
        return dropped(branch, dropout)


def _projection(out: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The projection of the heads, and the dropout after it: `to_out` is a Linear, both in a Sequential, or nothing."""
    if parts.why_not_part("to_out", out, nn.Sequential) is None:
        return out[0], out[1]  # type: ignore[index]
    return out, None


def _attention_differs(attn: Any) -> str | None:
    difference = differs(attn, ("x",), ("norm", "attend", "to_qkv", "to_out"), ("dropout",))
    if difference is not None:
        return difference
    if genuine.owner(attn.to_out) is nn.Sequential and len(attn.to_out) != 2:
        return f"to_out has {len(attn.to_out)} parts, not 2"
    return None if isinstance(getattr(attn, "scale", None), float) else "it has no scale that is a float"


ATTENTION = Rule(
    FusedAttention,
    frozenset({"vit_pytorch.vit.Attention", "vit_pytorch.simple_vit.Attention"}),
    _attention_differs,
    lambda attn: hasattr(attn, "to_qkv") and hasattr(attn, "heads"),
)


# ---------------------------------------------------------------------------------------------------- feed-forward


class FusedFeedForward(_NormedBranch):
    """vit_pytorch.vit.FeedForward on `ops.mlp`."""

    def norm_module(self) -> nn.Module:
        return self.net[0]  # type: ignore[index,return-value]

    def why_not_now(self) -> str | None:
        return parts.why_not_part("net", self.net, nn.Sequential)  # type: ignore[arg-type]

    def branch(self, **options: Any) -> Branch:
        _, fc1, act, *rest = self.net  # type: ignore[misc]
        drop1, fc2, drop2 = rest if len(rest) == 3 else (None, *rest, None)
        return dropped(mlp_branch(fc1, act, fc2, drop1), drop2)


def _feed_forward_differs(feed_forward: Any) -> str | None:
    difference = differs(feed_forward, ("x",), ("net",))
    if difference is not None:
        return difference
    net = list(feed_forward.net) if isinstance(feed_forward.net, nn.Sequential) else []
    if len(net) not in (4, 6) or not isinstance(net[0], nn.LayerNorm):
        return "net is not a norm, two Linears, and what stands between and behind them"
    return None


FEED_FORWARD = Rule(
    FusedFeedForward,
    frozenset({"vit_pytorch.vit.FeedForward", "vit_pytorch.simple_vit.FeedForward"}),
    _feed_forward_differs,
    lambda feed_forward: list(feed_forward._modules) == ["net"],
)


# ----------------------------------------------------------------------------------------------------- Transformer


class FusedTransformer(Fused):
    """vit_pytorch.vit.Transformer: all its blocks, and the norm behind them, as one stream."""

    is_block = True

    @classmethod
    def block_names(cls, module: nn.Module) -> list[str]:
        return [f"layers.{index}" for index in range(len(getattr(module, "layers", ())))]

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x, lambda: _why_not_tokens(x) or (None if self.layers else "it has no layers")):
            return super().forward(x)
        with self.backend():
            norm: Any = getattr(self, "norm", None)
            sublayers = [sublayer for block in self._blocks() for sublayer in block]
            state = self._vitkernels
            return pre_norm(x, sublayers, state.residual_dtype, norm, state.recompute_norms)

    def _blocks(self) -> list[tuple[Sublayer, Sublayer]]:
        return [(_sublayer("attn", attn), _sublayer("ff", ff)) for attn, ff in self.layers]  # type: ignore[union-attr]

    def parts(self) -> list[Part]:
        rows = [
            dataclasses.replace(part, module=name)
            for name, layers, block in zip(self.block_names(self), self.layers, self._blocks(), strict=True)  # type: ignore[arg-type]
            for module, sublayer in zip(layers, block, strict=True)
            for part in _rows(module, sublayer)
        ]
        norm: Any = getattr(self, "norm", None)
        return rows if norm is None else [*rows, Part("norm", "add_layer_norm", parts.why_not_layer_norm("norm", norm))]


def _sublayer(name: str, module: nn.Module) -> Sublayer:
    whole = not isinstance(module, _NormedBranch) or parts.why_not_part(name, module) or module.why_not_now()
    norm = _NO_NORM if whole else module.norm_module()  # type: ignore[operator]
    return Sublayer(name, norm, branch_of(name, module))


def _rows(module: nn.Module, sublayer: Sublayer) -> list[Part]:
    if sublayer.norm is not _NO_NORM:
        return sublayer.parts()
    difference = (_attention_differs if sublayer.name == "attn" else _feed_forward_differs)(module)
    why_not = sublayer.branch.why_not if difference is None else f"{sublayer.name}: {difference}"
    return [Part(sublayer.name, "", why_not)]


def _transformer_differs(transformer: Any) -> str | None:
    difference = differs(transformer, ("x",), ("layers",), ("norm",))
    if difference is not None:
        return difference
    known = (_attention_differs(attn) is None or _feed_forward_differs(ff) is None for attn, ff in transformer.layers)
    if not transformer.layers or any(known):
        return None
    attn, ff = (genuine.stock_type(each).__name__ for each in transformer.layers[0])
    return f"its layers are {attn} and {ff}, of which nothing is known"


def _has_pairs(module: nn.Module) -> bool:
    layers = getattr(module, "layers", None)
    return (
        isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and all(isinstance(pair, nn.ModuleList) and len(pair) == 2 for pair in layers)
    )


TRANSFORMER = Rule(
    FusedTransformer,
    frozenset({"vit_pytorch.vit.Transformer", "vit_pytorch.simple_vit.Transformer"}),
    _transformer_differs,
    _has_pairs,
)
RULES = (TRANSFORMER, ATTENTION, FEED_FORWARD)
