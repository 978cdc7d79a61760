"""attention_varlen: attention over many sequences laid end to end, without padding and without a mask.

Images of different sizes in one batch (Qwen-VL, NaFlex), or several crops of one: sequence s has the tokens
cu_seqlens[s] to cu_seqlens[s + 1], and attends to itself alone. What is computed, and what is kept for backward, is
`attention`'s; results equal those of the sequences one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import accumulate_dtype, autocast_dtype, cast, nothing
from vitkernels.ops.attention import _reference as _reference_dense
from vitkernels.ops.attention import _reference_backward as _reference_backward_dense
from vitkernels.ops.attention import check_groups, check_width

NAME = "attention_varlen"
_APART = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


@overload
def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, is_causal: bool = False, scale: float | None = None
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor: ...


def attention_varlen(*args: Any, **named: Any) -> Tensor:
    """Attention within each of many sequences: `attention_varlen(qkv, cu_seqlens, max_seqlen)`, or q, k and v apart.

    Args:
        qkv: [T, 3, H, K], the packed projection of all tokens, floating point, any strides; its gradient is packed too.
        q: [Tq, H, K], floating point, any strides.
        k, v: [Tk, Hk, K], q's dtype (autocast casts all three); Hk divides H, and each head of k and v serves H / Hk
            neighbours of q without being repeated.
        cu_seqlens, cu_seqlens_q, cu_seqlens_k: [S + 1] int32 on q's device, ascending from 0 to the number of tokens;
            two equal neighbours are an empty sequence. A query whose sequence has no keys gives zeros.
        max_seqlen, max_seqlen_q, max_seqlen_k: tokens of the longest sequence, or more.
        is_causal: query i of a sequence sees its keys 0 to i.
        scale: factor on the scores, 1 / sqrt(K) by default.

    Returns:
        [Tq, H, K] in q's dtype, contiguous.

    Raises:
        TypeError: an argument that is no tensor, mixed dtypes outside autocast, or cu_seqlens other than int32.
        ValueError: shapes that do not fit, tensors on different devices, and on the CPU cu_seqlens that do not ascend
            from 0 to the number of tokens (in compiled code a RuntimeError, when it runs) or hold a sequence longer
            than max_seqlen. On a GPU their values are not
            looked at, for it would stall the stream: with wrong ones, results are undefined.
    """
    packed = len(args) <= 3 and not named.keys() & _APART
    return (_qkv if packed else _apart)(*args, **named)


def _qkv(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    max_seqlen = _check.integer(max_seqlen)
    check_qkv(qkv, cu_seqlens, max_seqlen)
    check_values("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, qkv.shape[0])
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = cast(dtype, qkv)
    scale = _check.scale(NAME, scale, qkv.shape[3])
    out, _ = op(qkv, None, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, is_causal, scale)
    return out


def _apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    max_seqlen_q, max_seqlen_k = _check.integer(max_seqlen_q), _check.integer(max_seqlen_k)
    dtype = autocast_dtype(q)
    _check_apart(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtype)
    check_values("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q.shape[0])
    check_values("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k.shape[0])
    if dtype is not None:
        q, k, v = cast(dtype, q, k, v)
    scale = _check.scale(NAME, scale, q.shape[2])
    out, _ = op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale)
    return out


_qkv.__qualname__ = _apart.__qualname__ = NAME  # what Python's own errors call them


# --------------------------------------------------------------------------------------------------------------- checks


@_check.once
def check_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: Any) -> None:
    _check.is_tensor(NAME, qkv=qkv, cu_seqlens=cu_seqlens, optional={})
    _check.is_floating(NAME, qkv=qkv)
    _check.has_rank(NAME, "qkv", qkv, "[T, 3, H, K]")
    tokens, _, heads, width = qkv.shape
    _check.has_shape(NAME, "qkv", qkv, (tokens, 3, heads, width), "q, k and v of each token")
    check_width(NAME, "qkv", qkv, width)
    _check_lengths("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen)


@_check.once
def _check_apart(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any, autocast: torch.dtype | None
) -> None:
    _check.is_tensor(NAME, q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, optional={})
    _check.is_floating(NAME, q=q, k=k, v=v)
    for name, tensor, layout in (("q", q, "[Tq, H, K]"), ("k", k, "[Tk, Hk, K]"), ("v", v, "[Tk, Hk, K]")):
        _check.has_rank(NAME, name, tensor, layout)
    _, heads, width = q.shape
    check_width(NAME, "q", q, width)
    _check.has_shape(NAME, "k", k, (k.shape[0], k.shape[1], width), "q's width")
    check_groups(NAME, k.shape[1], heads)
    _check.has_shape(NAME, "v", v, k.shape, "k's shape")
    _check_lengths("cu_seqlens_q", cu_q, "max_seqlen_q", max_q)
    _check_lengths("cu_seqlens_k", cu_k, "max_seqlen_k", max_k)
    _check.has_shape(NAME, "cu_seqlens_k", cu_k, cu_q.shape, "as many sequences as cu_seqlens_q")
    _check.same_dtype(NAME, autocast, q=q, k=k, v=v)


def _check_lengths(name: str, cu_seqlens: Tensor, longest_name: str, longest: Any) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{NAME}: argument '{name}' has dtype {cu_seqlens.dtype}; needs int32")
    _check.has_rank(NAME, name, cu_seqlens, "[S + 1]")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{NAME}: argument '{name}' is empty; needs 0 and the end of each sequence")
    if not _check.is_integer(longest) or longest < 0:
        raise ValueError(f"{NAME}: argument '{longest_name}' is {longest!r}; needs an int of 0 or more")


def check_values(name: str, cu_seqlens: Tensor, longest_name: str, longest: int, tokens: int) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu":  # a fake one has no values
        return
    lengths = [end - begin for begin, end in _spans(name, cu_seqlens, tokens)]
    most = max(lengths, default=0)
    if most > longest:
        raise ValueError(
            f"{NAME}: argument '{longest_name}' is {longest}; needs {most} or more, the tokens of sequence "
            f"{lengths.index(most)}"
        )


def _spans(name: str, cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of each sequence."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{NAME}: argument '{name}' begins with {ends[0]}; needs 0")
    for index, (begin, end) in enumerate(pairwise(ends)):
        if end < begin:
            raise ValueError(
                f"{NAME}: argument '{name}' falls from {begin} to {end} behind index {index}; needs ascending values"
            )
    if ends[-1] != tokens:
        raise ValueError(f"{NAME}: argument '{name}' ends with {ends[-1]}; needs {tokens}, the number of tokens")
    return list(pairwise(ends))


# ------------------------------------------------------------------------------------------------------------------- op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, out, stats, cu_q, cu_k)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: checkpointing computes them anew
    dq, dk, dv = op.backward(dout, *saved, *ctx.options)
    return dq, *((None, None) if saved[1] is None else (dk, dv)), *[None] * 6


def _fake(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale):
    tokens, *_, heads, width = q.shape
    return q.new_empty(tokens, heads, width), q.new_empty(heads, 2, tokens, dtype=accumulate_dtype(q.dtype))


def _fake_backward(dout, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, is_causal, scale):
    if k is None:
        return q.new_empty(q.shape), nothing(q), nothing(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of either form, each [T, heads, K]; views."""
    if k is None or v is None:
        q, k, v = q.unbind(1)
    return q, k, v


def _sequences(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of q and of k. Compiled graphs do not look at values, so that they are looked at here too."""
    spans = _spans("cu_seqlens_q", cu_q, q.shape[0]), _spans("cu_seqlens_k", cu_k, k.shape[0])
    for queries, keys in zip(*spans, strict=True):
        yield slice(*queries), slice(*keys)


def _heads_first(tensor: Tensor) -> Tensor:
    """[N, H, K] -> [1, H, N, K]; a view."""
    return tensor.transpose(0, 1)[None]


def _reference(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale):
    q, k, v = parts(q, k, v)
    out, stats = _fake(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale)
    for queries, keys in _sequences(cu_q, cu_k, q, k):
        one = (_heads_first(q[queries]), _heads_first(k[keys]), _heads_first(v[keys]))
        one_out, one_stats = _reference_dense(*one, None, is_causal, scale)
        out[queries], stats[:, :, queries] = one_out[0].transpose(0, 1), one_stats[0]
    return out, stats


def _reference_backward(dout, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, is_causal, scale):
    grads = _fake_backward(dout, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, is_causal, scale)
    dq, dk, dv = grads if k is not None else grads[0].unbind(1)
    q, k, v = parts(q, k, v)
    for queries, keys in _sequences(cu_q, cu_k, q, k):
        one = (_heads_first(q[queries]), _heads_first(k[keys]), _heads_first(v[keys]), _heads_first(out[queries]))
        one_stats = stats[None, :, :, queries]
        one_grads = _reference_backward_dense(
            _heads_first(dout[queries]), *one, one_stats, None, is_causal, scale, needs_mask=False
        )
        for grad, rows, each in zip((dq, dk, dv), (queries, keys, keys), one_grads[:3], strict=True):
            grad[rows] = each[0].transpose(0, 1)
    return grads


op = Op(
    NAME,
    "(Tensor q, Tensor? k, Tensor? v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool is_causal, float scale) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor stats, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool is_causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)
