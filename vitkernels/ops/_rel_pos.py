"""Self-attention whose relative positions are products of the queries with embeddings of their distances to the keys.

Each query is multiplied by all distances at once, those in rows and those in columns: one product, of whose result
rel_h and rel_w of `attention_rel_pos` are a shifted part. So a part of the queries' gradient comes from there. Op by op
it would be a gradient of the packed projection of its own, zeros but for a third, and added. Here one autograd Function
adds it where the queries' gradient lies, and makes rel_h and rel_w again in backward instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import look_at, signature
from vitkernels.op import own, plain_function
from vitkernels.ops import _check
from vitkernels.ops._amp import autocast_dtype, cast
from vitkernels.ops.attention_rel_pos import attention_rel_pos, op


def distances(of_each: Tensor) -> Tensor:
    """Embeddings of the distances along a side of n tokens, [2 * n - 1, K], the keys' order; from those of each query
    and key, [n, n, K]."""
    return torch.cat([of_each[-1], of_each[0, 1:]])


def attention(packed: Tensor, num_heads: int, in_y: Tensor, in_x: Tensor, scale: float | None = None) -> Tensor:
    """Of the packed projection of an image's tokens, the heads' outputs side by side.

    Args:
        packed: [B, h, w, 3 * D], its last axis laid out as [3, H, K].
        num_heads: H.
        in_y, in_x: [2 * h - 1, K] and [2 * w - 1, K], as `distances` has them.
        scale: of the scores without their positions, 1 / sqrt(K) by default.

    Returns:
        [B, h, w, D].
    """
    dtype = autocast_dtype(packed)
    if dtype is not None:
        packed, in_y, in_x = cast(dtype, packed, in_y, in_x)
    _check.same_dtype("attention_rel_pos", None, qkv=packed, in_y=in_y, in_x=in_x)
    qkv = packed.unflatten(-1, (3, num_heads, -1))
    embeddings = torch.cat([in_y, in_x])
    scale = _check.scale("attention_rel_pos", scale, qkv.shape[-1])
    if not torch.compiler.is_compiling() and look_at((packed, embeddings)) == (True, True):
        heads = _apply(qkv, embeddings, scale)
    else:
        rel_h, rel_w = _gathered(_products(qkv, embeddings), qkv.shape[1:3])
        heads = attention_rel_pos(qkv.flatten(1, 2), rel_h, rel_w, scale=scale)
    return heads.flatten(2).unflatten(1, packed.shape[1:3])


def _queries(qkv: Tensor) -> Tensor:
    """Of [B, h, w, 3, H, K], [H, B * h * w, K]; a view where the tokens lie one behind the other."""
    return qkv[..., 0, :, :].flatten(0, 2).transpose(0, 1)


def _products(qkv: Tensor, embeddings: Tensor) -> Tensor:
    """Each query's with all distances, [H, B * h * w, L]."""
    return _queries(qkv) @ embeddings.t()


def _gathered(products: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w: of the products of each query, those with its own distances to the keys."""
    each = products.unflatten(1, (-1, *sides)).transpose(0, 1)  # [B, H, h, w, L]
    places = (at.expand(*each.shape[:2], *at.shape) for at in _places(sides, products.device))
    rel_h, rel_w = (each.gather(-1, at).flatten(2, 3) for at in places)
    return rel_h, rel_w


def _places(sides: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the distances to a row's and to a column's keys are for each query, [h, w, h] and [h, w, w]."""
    height, width = sides
    y, x = (torch.arange(side, device=device) for side in sides)
    in_y = (height - 1 - y[:, None] + y)[:, None].expand(height, width, height)
    in_x = (2 * height - 1 + width - 1 - x[:, None] + x)[None].expand(height, width, width)
    return in_y, in_x


def _spread(drel: Sequence[Tensor], sides: tuple[int, int], distances: int) -> Tensor:
    """The products' gradient of those of rel_h and rel_w, with nothing written in place."""
    dproducts = drel[0].new_zeros((*drel[0].shape[:2], *sides, distances))  # [B, H, h, w, L]
    for each, at in zip(drel, _places(sides, dproducts.device), strict=True):
        at = at.expand(*dproducts.shape[:2], *at.shape)
        dproducts = dproducts.scatter(-1, at, each.reshape(at.shape))
    return dproducts.transpose(0, 1).reshape(dproducts.shape[1], -1, distances)


def _shifted(products: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same as views, [H, B, h, w, h] and [H, B, h, w, w]: a row further down begins one distance earlier."""
    height, width = sides
    heads, tokens, row = products.shape
    shape, strides = (heads, tokens // (height * width), height, width), (tokens * row, height * width * row)
    rel_h = products.as_strided((*shape, height), (*strides, width * row - 1, row, 1), height - 1)
    rel_w = products.as_strided((*shape, width), (*strides, width * row, row - 1, 1), 2 * height - 1 + width - 1)
    return rel_h, rel_w


def _positions(qkv: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """rel_h and rel_w."""
    shifted = _shifted(_products(qkv, embeddings), qkv.shape[1:3])  # type: ignore[arg-type]
    rel_h, rel_w = (each.flatten(2, 3).transpose(0, 1) for each in shifted)
    return rel_h, rel_w


def _forward(ctx: Any, qkv: Tensor, embeddings: Tensor, scale: float) -> Tensor:
    out, stats = op(qkv.flatten(1, 2), None, None, *_positions(qkv, embeddings), scale)
    ctx.save_for_backward(qkv, embeddings, out, stats)
    ctx.scale = scale
    return own(out.transpose(1, 2))


def _backward(ctx: Any, dheads: Tensor) -> tuple[Tensor | None, ...]:
    qkv, embeddings, out, stats = ctx.saved_tensors
    rel = _positions(qkv, embeddings)
    dqkv, _, _, *drel = op.backward(
        dheads.transpose(1, 2), qkv.flatten(1, 2), None, None, out, stats, *rel, ctx.scale, True
    )
    queries, sides = _queries(qkv), qkv.shape[1:3]
    if torch.is_grad_enabled() or signature((dheads,)) is None:  # vmap and graphs of gradients refuse writes into views
        dproducts = _spread(drel, sides, len(embeddings))
        dq, dk, dv = dqkv.view(qkv.shape).unbind(3)
        dq = dq + (dproducts @ embeddings).transpose(0, 1).reshape(dq.shape)
        return torch.stack([dq, dk, dv], dim=3), (dproducts.transpose(1, 2) @ queries).sum(0), None
    dproducts = qkv.new_zeros(*queries.shape[:2], len(embeddings))
    for to, each in zip(_shifted(dproducts, sides), drel, strict=True):
        to.copy_(each.transpose(0, 1).unflatten(2, to.shape[2:4]))
    dqkv = dqkv.view(qkv.shape)
    if ctx.needs_input_grad[0]:
        _queries(dqkv).add_(dproducts @ embeddings)
    dembeddings = (dproducts.transpose(1, 2) @ queries).sum(0) if ctx.needs_input_grad[1] else None
    return dqkv if ctx.needs_input_grad[0] else None, dembeddings, None


_apply = plain_function("attention_rel_pos", _forward, _backward)
