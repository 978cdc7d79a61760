"""timm: attention that a block calls on tokens laid out anew: windows of an image, keys of a smaller one.

Swin (Liu et al. 2021) and its second version, MaxViT, GCViT, Twins, PVT v2; read from timm 1.0.31. A bias of relative
positions is a mask of [1, H, N, N] that learns; where Swin's windows are shifted, a mask for each window of an image,
which serve in turn. The blocks are in `timm_windows` and `timm_post_norm`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention
from vitkernels.ops._windows import Windows, from_windows, to_windows
from vitkernels.residual import parts
from vitkernels.residual.genuine import owner_name
from vitkernels.residual.stream import Branch, Step
from vitkernels.residual.sublayers import attention_step, join_heads, projected, split_heads, why_not_linears

_BIASES = frozenset(f"timm.layers.pos_embed_rel.{name}" for name in ("RelPosBias", "RelPosMlp", "RelPosBiasTf"))


def why_not_bias(attn: nn.Module) -> str | None:
    """Why the module that makes an attention's bias must be called, not asked for it; None where it may be asked."""
    bias = attn._modules.get("rel_pos")
    if bias is None:
        return None
    if owner_name(bias) not in _BIASES:
        return f"its rel_pos is {owner_name(bias)}, of which nothing is known"
    return parts.why_not_part("rel_pos", bias)


class FusedInnerAttention(FusedAttention):
    """What they share: a call is the projections, the heads and what follows them, each on its own."""

    linears: ClassVar[tuple[str, ...]] = ("qkv", "proj")
    stock_only: ClassVar[tuple[str, ...]] = ()  # children that the stock forward alone calls, or on other axes

    def why_not_now(self) -> str | None:
        children = ((name, self._modules.get(name)) for name in self.stock_only)
        reasons = (parts.why_not_part(name, child) for name, child in children if child is not None)
        return next(filter(None, reasons), None) or why_not_bias(self) or super().why_not_now()

    def branch(self, **options: Any) -> Branch:
        why_not = why_not_linears(**{name: getattr(self, name) for name in self.linears})
        return Branch(lambda x, bias_apart: (self.run(x, **options), None), self.steps, None, why_not)


class FusedPlainAttention(FusedInnerAttention):
    """What they share: a call with tokens alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x)
        return self.run(x)


class FusedSwinAttention(FusedInnerAttention):
    """Swin's WindowAttention."""

    stock_only = ("softmax",)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now, mask):
            return super(FusedAttention, self).forward(x, mask)
        return self.run(x, mask=mask)

    def attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return ops.attention_qkv(qkv, self.num_heads, attn_mask=self.masks(mask))  # type: ignore[arg-type]

    def step_within(self, windows: Windows, mask: Tensor | None) -> Step | None:
        """Its norm, the windows made and undone, and the attention within them as one Function; None where a call must
        see the windows.

        Args:
            windows: of the image.
            mask: a call's, [W, N, N].
        """
        attn: Any = self
        why_not = self.why_not_now() or why_not_linears(qkv=attn.qkv, proj=attn.proj)
        if why_not is not None or not windows.whole or not parts.drops_nothing(attn.proj_drop):
            return None
        if windows.tokens != attn.window_area or (mask is not None and len(mask) != windows.per_image):
            return None
        bias = functools.partial(self.masks, mask)
        return attention_step(self.packed, attn.proj, attn.num_heads, attn_mask=bias, windows=windows)

    def masks(self, mask: Tensor | None) -> Tensor:
        """The bias, [1, H, N, N], or with the masks of an image's windows, [W, N, N], that of each: [W, H, N, N]."""
        return self.bias() if mask is None else self.bias() + mask[:, None]

    def bias(self) -> Tensor:
        """What is added to the scores of every window."""
        attn: Any = self
        return attn._get_rel_pos_bias()


class FusedCosineAttention(FusedSwinAttention):
    """Swin v2's: q and k of length 1, a factor for each head, and a bias that a small network makes of positions."""

    def step_within(self, windows: Windows, mask: Tensor | None) -> None:
        """None: the step has nothing between the projection and the scores."""
        return None

    def why_not_now(self) -> str | None:
        attn: Any = self
        if attn.q_bias is not None and (reason := why_not_linears(qkv=attn.qkv)):  # timm reads its weight
            return reason
        return super().why_not_now()

    def project(self, x: Tensor) -> Tensor:
        attn: Any = self
        if attn.q_bias is None:
            return parts.linear(attn.qkv, x)
        return ops.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))

    def attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        attn: Any = self
        q, k, v = split_heads(qkv, attn.num_heads)
        factor = attn.logit_scale.clamp(max=math.log(100.0)).exp().view(-1, 1, 1)
        q, k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        return join_heads(ops.attention(q, k, v, attn_mask=self.masks(mask), scale=1.0))

    def bias(self) -> Tensor:
        attn: Any = self
        tokens = attn.window_size[0] * attn.window_size[1]
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        bias = table[attn.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        return (16 * torch.sigmoid(bias))[None]


class FusedCosineCrAttention(FusedCosineAttention):
    """Swin v2 CR's WindowMultiHeadAttention."""

    why_not_now = FusedInnerAttention.why_not_now

    def project(self, x: Tensor) -> Tensor:
        return super(FusedCosineAttention, self).project(x)

    def bias(self) -> Tensor:
        attn: Any = self
        return attn._relative_positional_encodings()


class FusedPartitionAttention(FusedInnerAttention):
    """MaxViT's AttentionCl: tokens as [B, ..., D]."""

    axes: ClassVar[int | None] = None

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now, shared_rel_pos):
            return super(FusedAttention, self).forward(x, shared_rel_pos)
        return self.run(x, shared_rel_pos=shared_rel_pos)

    def attend(self, qkv: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        attn: Any = self
        bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
        packed = qkv.flatten(1, -2)
        if attn.head_first:  # the last axis is [H, 3, K]
            q, k, v = packed.unflatten(-1, (attn.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
            out = join_heads(ops.attention(q, k, v, attn_mask=bias))
        else:
            out = ops.attention_qkv(packed, attn.num_heads, attn_mask=bias)
        return out.unflatten(1, qkv.shape[1:-1])


class FusedGlobalQueryAttention(FusedInnerAttention):
    """GCViT's WindowAttentionGlobal: queries of the window, or of the image, the same for all its windows."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.declines(x, lambda: self.why_not_now() or self._why_not_queries(q_global)):
            return super(FusedAttention, self).forward(x, q_global)
        return self.run(x, q_global=q_global)

    def _why_not_queries(self, q_global: Tensor | None) -> str | None:
        return "called without q_global" if self.use_global and q_global is None else None

    def attend(self, qkv: Tensor, q_global: Tensor | None = None) -> Tensor:  # type: ignore[override]
        attn: Any = self
        bias = attn.rel_pos.get_bias()
        if not attn.use_global or q_global is None:
            return ops.attention_qkv(qkv, attn.num_heads, attn_mask=bias)
        k, v = qkv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q_global.repeat_interleave(len(qkv) // len(q_global), dim=0).reshape(*qkv.shape[:2], *k.shape[1::2])
        return join_heads(ops.attention(q.transpose(1, 2).to(v.dtype), k, v, attn_mask=bias))


class FusedImageAttention(FusedPlainAttention):
    """VOLO's Attention: of all tokens of [B, H, W, D]."""

    axes = None

    def attend(self, qkv: Tensor) -> Tensor:  # type: ignore[override]
        return ops.attention_qkv(qkv.flatten(1, -2), self.num_heads).unflatten(1, qkv.shape[1:-1])  # type: ignore[arg-type]


class FusedLocalAttention(FusedInnerAttention):
    """Twins' LocallyGroupedAttn: windows of an image that is padded to whole ones."""

    stock_only = ("qkv",)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x, size)
        return self.run(x, size)

    def run(self, x: Tensor, size: tuple[int, int] = (0, 0)) -> Tensor:  # type: ignore[override]
        attn: Any = self
        side = (attn.ws, attn.ws)
        with self.backend():
            windows, counts = to_windows(x.unflatten(1, tuple(size)), side)
            heads = ops.attention_qkv(self.project(windows), attn.num_heads)
            return self.output(x, from_windows(heads, side, counts, size).flatten(1, 2), False)[0]


class FusedReducedAttention(FusedInnerAttention):
    """Twins' GlobalSubSampleAttn and PVT v2's Attention: keys of an image that a convolution made smaller."""

    linears = ("q", "kv", "proj")
    reads = ("q",)

    def reader(self) -> object:
        return None if getattr(self, "pool", None) is not None else self.q  # a mean is of what is not rounded

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x, size)
        return self.run(x, size)

    def run(self, x: Tensor, size: tuple[int, int] = (0, 0)) -> Tensor:  # type: ignore[override]
        attn: Any = self
        with self.backend():
            if attn.sr is None:
                q, kv = projected(x, attn.q, attn.kv).split([attn.q.out_features, attn.kv.out_features], dim=-1)
            else:
                q, kv = parts.linear(attn.q, x), parts.linear(attn.kv, self.smaller(x, size))
            q = q.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            heads = join_heads(ops.attention(q, k, v))
            if parts.drops_nothing(attn.proj_drop):
                return parts.linear(attn.proj, heads)
            return attn.proj_drop(parts.linear(attn.proj, heads))

    def smaller(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The tokens that are the keys, [B, M, D]."""
        attn: Any = self
        image = x.transpose(1, 2).unflatten(2, tuple(size))
        pool, act = getattr(attn, "pool", None), getattr(attn, "act", None)
        tokens = attn.sr(image if pool is None else pool(image)).flatten(2).transpose(1, 2)
        tokens = parts.layer_norm(attn.norm, tokens, parts.operand_dtype(attn.kv if act is None else None, tokens))
        return tokens if act is None else act(tokens)


class FusedPvtAttention(FusedReducedAttention):
    """PVT v2's, which calls the size feat_size."""

    loses_small = -1

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x, feat_size)
        return self.run(x, (feat_size[0], feat_size[1]))


_OUT = ("attn_drop", "proj", "proj_drop")


def _rule(
    mixin: type[FusedInnerAttention],
    owner: str,
    arguments: tuple[str, ...],
    children: Collection[str] = (),
    optional: Collection[str] = (),
    parameters: Collection[str] = (),
) -> Rule:
    def contract(attn: nn.Module) -> str | None:
        inputs = [name for name in mixin.linears if name != "proj"]
        return differs(attn, arguments, (*inputs, *_OUT, *children), optional, parameters)

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


_TABLE = "relative_position_bias_table"
RULES = (
    _rule(FusedSwinAttention, "swin_transformer.WindowAttention", ("x", "mask"), ("softmax",), (), (_TABLE,)),
    _rule(
        FusedCosineAttention,
        "swin_transformer_v2.WindowAttention",
        ("x", "mask"),
        ("softmax", "cpb_mlp"),
        (),
        ("logit_scale", "q_bias", "v_bias"),
    ),
    _rule(
        FusedCosineCrAttention,
        "swin_transformer_v2_cr.WindowMultiHeadAttention",
        ("x", "mask"),
        ("meta_mlp",),
        (),
        ("logit_scale",),
    ),
    _rule(FusedPartitionAttention, "maxxvit.AttentionCl", ("x", "shared_rel_pos"), (), ("rel_pos",)),
    _rule(FusedGlobalQueryAttention, "gcvit.WindowAttentionGlobal", ("x", "q_global"), ("rel_pos",)),
    _rule(FusedImageAttention, "volo.Attention", ("x",)),
    _rule(FusedLocalAttention, "twins.LocallyGroupedAttn", ("x", "size")),
    _rule(FusedReducedAttention, "twins.GlobalSubSampleAttn", ("x", "size"), (), ("sr", "norm")),
    _rule(FusedPvtAttention, "pvt_v2.Attention", ("x", "feat_size"), (), ("sr", "norm", "pool", "act")),
)
