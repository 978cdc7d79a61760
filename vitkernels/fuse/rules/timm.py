"""timm: pre-norm blocks, attention and feed-forward of `vision_transformer` (read from timm 1.0.31)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse import parts, sublayers
from vitkernels.fuse.residual import Border, Branch, Part, Sublayer, pre_norm
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.sublayers import called, join_heads, not_mlp, split_heads
from vitkernels.fuse.swap import Fused, unread

TAILS = (("blocks", "norm"), ("blocks", "fc_norm"))


def _drop_path(module: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    keep = 1 - module.drop_prob  # type: ignore[operator]
    factor = tokens.new_empty(tokens.shape[0], dtype=dtype).bernoulli_(keep)
    return factor.div_(keep) if getattr(module, "scale_by_keep", True) and keep > 0 else factor


parts.DROP_PATHS["DropPath"] = _drop_path
parts.ACTIVATIONS["GELUTanh"] = lambda act: "gelu_tanh"


# ------------------------------------------------------------------------------------------------------- attention


def _not_heads(attn: Any) -> str | None:
    """Why the attention between its projections cannot run fused now, or None when it can."""
    if parts.dropout_rate(attn.attn_drop) > 0:
        return "attn_drop > 0 in training"
    return None if parts.drops_nothing(attn.attn_drop) else parts.obstacle("attn_drop", attn.attn_drop)


def _heads(attn: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """[B, N, D] to the heads' outputs side by side, [B, N, H * K]."""
    gate = None if attn.gate is None else parts.linear(attn.gate, x).sigmoid()
    qkv = parts.linear(attn.qkv, x)
    if parts.is_identity(attn.q_norm) and parts.is_identity(attn.k_norm):
        out = ops.attention_qkv(qkv, attn.num_heads, attn_mask=attn_mask, is_causal=is_causal)
    else:
        q, k, v = split_heads(qkv, attn.num_heads)
        q, k = parts.layer_norm(attn.q_norm, q).to(v.dtype), parts.layer_norm(attn.k_norm, k).to(v.dtype)
        out = join_heads(ops.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal))
    out = out if parts.is_identity(attn.norm) else attn.norm(out)
    return out if gate is None else out * gate


def _attention(attn: Any, attn_mask: Tensor | None, is_causal: bool) -> Branch:
    why_not = unread("attn", attn, FusedAttention) or _not_heads(attn)
    if why_not is not None:
        return Branch(lambda x, split: (attn(x, attn_mask=attn_mask, is_causal=is_causal), None), "", None, why_not)

    def run(x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        heads = _heads(attn, x, attn_mask, is_causal)
        if parts.drops_nothing(attn.proj_drop):
            return parts.last_linear(attn.proj, heads, split)
        return attn.proj_drop(parts.linear(attn.proj, heads)), None

    return Branch(run, "linear, attention, linear", attn.qkv, called(qkv=attn.qkv, proj=attn.proj))


class FusedAttention(Fused):
    """timm.layers.attention.Attention on `ops.attention_qkv`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: _not_heads(self) or _two_masks(attn_mask, is_causal)):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        with self.backend():
            return self.proj_drop(parts.linear(self.proj, _heads(self, x, attn_mask, is_causal)))  # type: ignore[operator,arg-type]

    def parts(self) -> list[Part]:
        attn: Any = self
        return [Part("", "linear, attention, linear", _not_heads(self) or called(qkv=attn.qkv, proj=attn.proj))]


def _two_masks(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    return "called with attn_mask and is_causal" if attn_mask is not None and is_causal else None


# ---------------------------------------------------------------------------------------------------- feed-forward


def _not_mlp(mlp: Any) -> str | None:
    """Why the two projections cannot run with the activation inside now, or None when they can."""
    if not parts.is_identity(mlp.norm):
        return "a norm between fc1 and fc2"
    return not_mlp(mlp.fc1, mlp.act, mlp.fc2, mlp.drop1)


def _mlp_forward(mlp: Any, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
    split = split and parts.drops_nothing(mlp.drop2)
    if parts.is_identity(mlp.norm):
        out, bias = sublayers.mlp(x, mlp.fc1, mlp.act, mlp.fc2, mlp.drop1, split)
    else:
        hidden = mlp.norm(mlp.drop1(mlp.act(parts.linear(mlp.fc1, x))))
        out, bias = parts.last_linear(mlp.fc2, hidden, split)
    return (out, bias) if split else (mlp.drop2(out), None)


def _mlp(mlp: Any) -> Branch:
    why_not = unread("mlp", mlp, FusedMlp)
    if why_not is not None:
        return Branch(lambda x, split: (mlp(x), None), "", None, why_not)
    inside = _not_mlp(mlp)
    return Branch(lambda x, split: _mlp_forward(mlp, x, split), "mlp" if inside is None else "linear", mlp.fc1, inside)


class FusedMlp(Fused):
    """timm.layers.mlp.Mlp on `ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.declines(x, lambda: _not_mlp(self)):
            return super().forward(x)
        with self.backend():
            return _mlp_forward(self, x, False)[0]

    def parts(self) -> list[Part]:
        return [Part("", "mlp", _not_mlp(self))]


# ----------------------------------------------------------------------------------------------------------- block


class FusedBlock(Fused):
    """timm.models.vision_transformer.Block, its adds run with the norms that follow them."""

    is_block = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: _two_masks(attn_mask, is_causal)):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        with self.backend():
            state = self._vitkernels
            return pre_norm(x, self._sublayers(attn_mask, is_causal), state.border, state.residual_dtype)

    def _sublayers(self, attn_mask: Tensor | None = None, is_causal: bool = False) -> list[Sublayer]:
        block: Any = self
        attention = _attention(block.attn, attn_mask, is_causal)
        return [
            Sublayer("attn", block.norm1, attention, block.ls1, block.drop_path1),
            Sublayer("mlp", block.norm2, _mlp(block.mlp), block.ls2, block.drop_path2),
        ]

    def entry(self) -> Border:
        return Border(self.norm1, getattr(self.attn, "qkv", None))  # type: ignore[arg-type]

    def parts(self) -> list[Part]:
        return [part for sublayer in self._sublayers() for part in sublayer.parts()]


ATTENTION = Rule(
    FusedAttention,
    frozenset({"timm.layers.attention.Attention"}),
    lambda attn: differs(
        attn,
        ("x", "attn_mask", "is_causal"),
        ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"),
        ("gate",),
    ),
)
MLP = Rule(
    FusedMlp,
    frozenset({"timm.layers.mlp.Mlp"}),
    lambda mlp: differs(mlp, ("x",), ("fc1", "act", "drop1", "norm", "fc2", "drop2")),
)
BLOCK = Rule(
    FusedBlock,
    frozenset({"timm.models.vision_transformer.Block"}),
    lambda block: differs(
        block,
        ("x", "attn_mask", "is_causal"),
        ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
    ),
)
RULES = (BLOCK, ATTENTION, MLP)
