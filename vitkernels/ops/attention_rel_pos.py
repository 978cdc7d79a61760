"""attention_rel_pos: attention over an image with decomposed relative positions (MViT v2, Li et al. 2022; SAM, ViTDet).

The keys are an image of Kh x Kw tokens, row by row. Query q and the key in row y and column x get
scale * q k^T + rel_h[q, y] + rel_w[q, x], so that a bias of Nq x Nk elements never exists, forward or backward. What
else is computed, and what is kept for backward, is `attention`'s.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import accumulate_dtype, autocast_dtype, cast, given, nothing, wide
from vitkernels.ops.attention import _heads_last, check_width
from vitkernels.ops.attention import _reference as _reference_masked
from vitkernels.ops.attention import _reference_backward as _reference_backward_masked

NAME = "attention_rel_pos"
_APART = {"q", "k", "v"}


@overload
def attention_rel_pos(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float | None = None) -> Tensor: ...


@overload
def attention_rel_pos(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float | None = None
) -> Tensor: ...


def attention_rel_pos(*args: Any, **named: Any) -> Tensor:
    """Attention with a bias for the row and one for the column of each key: `attention_rel_pos(qkv, rel_h, rel_w)`, or
    q, k and v apart.

    Args:
        qkv: [B, N, 3, H, K], the packed projection, floating point, any strides; its gradient is packed too.
        q: [B, H, Nq, K], floating point, any strides.
        k, v: [B, H, Nk, K], q's dtype (autocast casts all three).
        rel_h: [B, H, Nq, Kh], floating point, any strides: what each query adds to the scores of each row of keys.
        rel_w: [B, H, Nq, Kw]: the same of each column; Kh * Kw is Nk.
        scale: factor on q k^T, 1 / sqrt(K) by default.

    Returns:
        [B, N, H, K] of a packed projection, contiguous; [B, H, Nq, K] of q, k and v apart, laid out in memory as
        [B, Nq, H, K].

    Raises:
        TypeError: an argument that is no floating-point tensor, or mixed dtypes of q, k and v outside autocast.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    packed = len(args) <= 3 and not named.keys() & _APART
    return (_qkv if packed else _apart)(*args, **named)


def _qkv(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float | None = None) -> Tensor:
    _check_qkv(qkv, rel_h, rel_w)
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = cast(dtype, qkv)
    scale = _check.scale(NAME, scale, qkv.shape[4])
    out, _ = op(qkv, None, None, rel_h, rel_w, scale)
    return out.transpose(1, 2)


def _apart(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float | None = None) -> Tensor:
    dtype = autocast_dtype(q)
    _check_apart(q, k, v, rel_h, rel_w, dtype)
    if dtype is not None:
        q, k, v = cast(dtype, q, k, v)
    scale = _check.scale(NAME, scale, q.shape[3])
    out, _ = op(q, k, v, rel_h, rel_w, scale)
    return out


_qkv.__qualname__ = _apart.__qualname__ = NAME  # what Python's own errors call them


# --------------------------------------------------------------------------------------------------------------- checks


@_check.once
def _check_qkv(qkv: Tensor, rel_h: Tensor, rel_w: Tensor) -> None:
    _check.is_tensor(NAME, qkv=qkv, rel_h=rel_h, rel_w=rel_w, optional={})
    _check.is_floating(NAME, qkv=qkv)
    _check.has_rank(NAME, "qkv", qkv, "[B, N, 3, H, K]")
    batch, tokens, _, heads, width = qkv.shape
    _check.has_shape(NAME, "qkv", qkv, (batch, tokens, 3, heads, width), "q, k and v of each token")
    check_width(NAME, "qkv", qkv, width)
    _check_bias(rel_h, rel_w, (batch, heads, tokens), tokens)


@_check.once
def _check_apart(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, autocast: torch.dtype | None) -> None:
    _check.is_tensor(NAME, q=q, k=k, v=v, rel_h=rel_h, rel_w=rel_w, optional={})
    _check.is_floating(NAME, q=q, k=k, v=v)
    for name, tensor, layout in (("q", q, "[B, H, Nq, K]"), ("k", k, "[B, H, Nk, K]"), ("v", v, "[B, H, Nk, K]")):
        _check.has_rank(NAME, name, tensor, layout)
    batch, heads, queries, width = q.shape
    check_width(NAME, "q", q, width)
    _check.has_shape(NAME, "k", k, (batch, heads, k.shape[2], width), "q's batch, heads and width")
    _check.has_shape(NAME, "v", v, k.shape, "k's shape")
    _check_bias(rel_h, rel_w, (batch, heads, queries), k.shape[2])
    _check.same_dtype(NAME, autocast, q=q, k=k, v=v)


def _check_bias(rel_h: Tensor, rel_w: Tensor, queries: tuple[int, int, int], keys: int) -> None:
    _check.is_floating(NAME, rel_h=rel_h, rel_w=rel_w)
    for name, rel, layout in (("rel_h", rel_h, "[B, H, Nq, Kh]"), ("rel_w", rel_w, "[B, H, Nq, Kw]")):
        _check.has_rank(NAME, name, rel, layout)
        _check.has_shape(NAME, name, rel, (*queries, rel.shape[3]), "q's batch, heads and queries")
    rows, columns = rel_h.shape[3], rel_w.shape[3]
    if rows * columns != keys:
        raise ValueError(
            f"{NAME}: arguments 'rel_h' and 'rel_w' are of {rows} rows and {columns} columns; "
            f"needs a product of {keys}, the number of keys"
        )


# ------------------------------------------------------------------------------------------------------------------- op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, rel_h, rel_w, ctx.scale = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, out, stats, rel_h, rel_w)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # once: checkpointing computes them anew
    needs = ctx.needs_input_grad[3:5]
    dq, dk, dv, drel_h, drel_w = op.backward(dout, *saved, ctx.scale, any(needs))
    apart = (None, None) if saved[1] is None else (dk, dv)
    return dq, *apart, given(needs[0], drel_h), given(needs[1], drel_w), None


def _fake(q, k, v, rel_h, rel_w, scale):
    first, _, _ = parts(q, k, v)
    batch, heads, queries, _ = first.shape
    return _heads_last(first), q.new_empty(batch, heads, 2, queries, dtype=accumulate_dtype(q.dtype))


def empty_gradients(q: Tensor, k: Tensor | None, v: Tensor | None, rel_h: Tensor, rel_w: Tensor, needs_rel: bool):
    """What backward returns, yet to be written."""
    rel = (rel_h.new_empty(rel_h.shape), rel_w.new_empty(rel_w.shape)) if needs_rel else (nothing(q), nothing(q))
    if k is None or v is None:
        return q.new_empty(q.shape), nothing(q), nothing(q), *rel
    return _heads_last(q), _heads_last(k), _heads_last(v), *rel


def _fake_backward(dout, q, k, v, out, stats, rel_h, rel_w, scale, needs_rel):
    return empty_gradients(q, k, v, rel_h, rel_w, needs_rel)


def parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of either form, each [B, H, N, K]; views."""
    if k is None or v is None:
        q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """What is added to the scores, [B, H, Nq, Nk]."""
    return (wide(rel_h)[..., :, None] + wide(rel_w)[..., None, :]).flatten(-2)


def _reference(q, k, v, rel_h, rel_w, scale):
    return _reference_masked(*parts(q, k, v), _bias(rel_h, rel_w), False, scale)


def _reference_backward(dout, q, k, v, out, stats, rel_h, rel_w, scale, needs_rel):
    grads = _reference_backward_masked(
        dout, *parts(q, k, v), out, stats, _bias(rel_h, rel_w), False, scale, needs_mask=needs_rel
    )
    dq, dk, dv, drel_h, drel_w = empty_gradients(q, k, v, rel_h, rel_w, needs_rel)
    for each, grad in zip(parts(dq, *((dk, dv) if k is not None else (None, None))), grads, strict=False):
        each.copy_(grad)
    if needs_rel:
        dscores = grads[3].unflatten(-1, (rel_h.shape[3], rel_w.shape[3]))
        drel_h.copy_(dscores.sum(-1))
        drel_w.copy_(dscores.sum(-2))
    return dq, dk, dv, drel_h, drel_w


op = Op(
    NAME,
    "(Tensor q, Tensor? k, Tensor? v, Tensor rel_h, Tensor rel_w, float scale) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor stats, Tensor rel_h, Tensor rel_w, "
    "float scale, bool needs_rel) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)
