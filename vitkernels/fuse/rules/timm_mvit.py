"""timm: MViT v2 (Li et al. 2022): each head's q, k and v are pooled before the scores, which have decomposed relative
positions; where the image gets smaller or its features more, so does the residual stream. Read from timm 1.0.31.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import ops
from vitkernels.fuse.pooled import PooledBlock
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention
from vitkernels.fuse.rules.timm_window_attention import FusedInnerAttention
from vitkernels.fuse.rules.timm_windows import FusedOwnBlock
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import added_now
from vitkernels.residual.sublayers import join_heads, split_heads

Sides = tuple[int, int]


def _embedded(table: Tensor, queries: int, keys: int) -> Tensor:
    """Of each query and key along a side, [queries, keys, K]: the fewer of both lie as far apart as the others span."""
    by_query, by_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    y, x = (torch.arange(count, device=table.device) for count in (queries, keys))
    return table[((y[:, None] * by_query - x * by_key) + (keys - 1) * by_key).long()]


class FusedPooledAttention(FusedInnerAttention):
    """MultiScaleAttention, which returns the height and the width of its queries beside their tokens."""

    steps = "linear, pooling of torch, add_layer_norm, attention_rel_pos, linear"

    def forward(self, x: Tensor, feat_size: list[int]) -> tuple[Tensor, Sides]:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x, feat_size)
        return self.run(x, feat_size)

    def why_not_now(self) -> str | None:
        return None

    def run(self, x: Tensor, feat_size: list[int] | Sides = (0, 0)) -> tuple[Tensor, Sides]:  # type: ignore[override]
        attn: Any = self
        with self.backend():
            q, k, v = split_heads(parts.linear(attn.qkv, x), attn.num_heads)
            sides = (feat_size[0], feat_size[1])
            q, queries = self.pooled("q", q, sides)
            k, keys = self.pooled("k", k, sides)
            heads = self.scored(q, k, self.pooled("v", v, sides)[0], queries, keys)
            out = parts.linear(attn.proj, join_heads(heads + q if attn.residual_pooling else heads))
        return out, queries

    def pooled(self, name: str, heads: Tensor, sides: Sides) -> tuple[Tensor, Sides]:
        """q, k or v, [B, H, N, K], behind its pooling and norm, and the height and the width of what is left."""
        attn: Any = self
        pool, norm = getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}")
        if pool is not None:
            own = sys.modules[genuine.owner(self).__module__]
            image, token = own.reshape_pre_pool(heads, sides, attn.has_cls_token)
            heads, sides = own.reshape_post_pool(pool(image), attn.num_heads, token)
        if norm is not None:
            heads = parts.layer_norm(norm, heads, parts.operand_dtype(None, heads))
        return heads, (sides[0], sides[1])

    def scored(self, q: Tensor, k: Tensor, v: Tensor, queries: Sides, keys: Sides) -> Tensor:
        """The heads' outputs, [B, H, Nq, K]."""
        attn: Any = self
        first = int(attn.has_cls_token)
        image = q[:, :, first:].unflatten(2, queries)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if attn.rel_pos_type != "spatial":
            return ops.attention(q, k, v, scale=attn.scale)
        in_y = _embedded(attn.rel_pos_h, queries[0], keys[0])
        in_x = _embedded(attn.rel_pos_w, queries[1], keys[1])
        rel_h = torch.einsum("bhyxc,ykc->bhyxk", image, in_y).flatten(2, 3)
        rel_w = torch.einsum("bhyxc,xkc->bhyxk", image, in_x).flatten(2, 3)
        if not first:
            return ops.attention_rel_pos(q, k, v, rel_h, rel_w, scale=attn.scale)
        # the class token has no place in the image: its keys and queries get no bias, and so all others a mask
        bias = (rel_h[..., None] + rel_w[..., None, :]).flatten(3)
        return ops.attention(q, k, v, attn_mask=F.pad(bias, (1, 0, 1, 0)), scale=attn.scale)


class FusedMultiScaleBlock(PooledBlock, FusedOwnBlock):
    """MultiScaleBlock: its stream may be projected and pooled before the attention's sum, or projected before the
    feed-forward's."""

    kind = "it pools before its projections"

    def forward(self, x: Tensor, feat_size: list[int]) -> tuple[Tensor, Sides]:  # type: ignore[override]
        if self.declines(x):
            return super(FusedOwnBlock, self).forward(x, feat_size)
        sides: list[Sides] = []
        return self.run(x, feat_size=tuple(feat_size), sides=sides), sides[0]

    def own(self, x: Tensor, feat_size: Sides, sides: list[Sides]) -> Tensor:  # type: ignore[override]
        block: Any = self
        out, left = block.attn(x, feat_size)
        sides.append(left)
        return out

    def changes(self) -> bool:
        block: Any = self
        return block.shortcut_proj_attn is not None or block.shortcut_pool_attn is not None

    def shortcut(self, x: Tensor, normed: Tensor, feat_size: Sides = (0, 0), **options: Any) -> Tensor:
        block: Any = self
        if block.shortcut_proj_attn is not None:
            x = parts.linear(block.shortcut_proj_attn, normed)
        return block._shortcut_pool(x, feat_size)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        if block.shortcut_proj_mlp is None:
            return super().run(x, **options)
        with self.backend():
            attention, feed_forward = self.sublayers(**options)
            x = self.attended(x, attention, **options)
            normed = parts.layer_norm(feed_forward.norm, x, parts.operand_dtype(None, x))
            out, _ = feed_forward.branch.run(normed, False)
            x = parts.linear(block.shortcut_proj_mlp, normed)
            return added_now(x, feed_forward, out, widen=self._vitkernels.residual_dtype is None)


_POOLS = tuple(f"{kind}_{name}" for kind in ("pool", "norm") for name in ("q", "k", "v"))
RULES = (
    Rule(
        FusedPooledAttention,
        frozenset({"timm.models.mvitv2.MultiScaleAttention"}),
        lambda attn: differs(attn, ("x", "feat_size"), ("qkv", "proj"), _POOLS, ("rel_pos_h", "rel_pos_w")),
    ),
    Rule(
        FusedMultiScaleBlock,
        frozenset({"timm.models.mvitv2.MultiScaleBlock"}),
        lambda block: differs(
            block,
            ("x", "feat_size"),
            ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"),
            ("shortcut_proj_attn", "shortcut_pool_attn", "shortcut_proj_mlp"),
        ),
    ),
)
