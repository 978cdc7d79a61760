"""attention: softmax(q k^T * scale + mask) v without the N x N matrix, forward and backward.

Vaswani et al. 2017, computed tile by tile as in FlashAttention (Dao et al. 2022): what is saved for backward is the
output and, of each row of scores, the largest and the log of the sum of exponentials relative to it (`score_units`).
`attention` takes q, k and v apart; `attention_qkv` takes the packed projection [B, N, 3, H, K] that ViTs compute, reads
it in place and writes one packed gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import accumulate_dtype, autocast_dtype, cast, given, nothing, wide

_NO_WEIGHT = -1e30  # added to a score, it leaves nothing of it, and of its weight


@remembered
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention, as `torch.nn.functional.scaled_dot_product_attention`.

    Scores are float32 (float64 for float64), before and after a mask is added. So a row whose keys all get finfo.min,
    or another value that leaves nothing of q k^T, averages v, as in eager attention; False and -inf hide a key.

    Args:
        q: [B, H, Nq, K], floating point, any strides.
        k, v: [B, Hk, Nk, K], q's dtype (autocast casts all three); Hk divides H, and each head of k and v serves H / Hk
            neighbours of q without being repeated.
        attn_mask: broadcastable to [B, H, Nq, Nk], or of M sequences where M divides B, for b % M in turn (windows of
            images): bool (True takes part) or floating point, added to the scores; its gradient is given when it asks
            for one. A row with nothing to attend to gives zeros and zero gradients.
        is_causal: query i sees keys 0 to i; not together with a mask.
        scale: factor on the scores, 1 / sqrt(K) by default.

    Returns:
        [B, H, Nq, K] in q's dtype, laid out in memory as [B, Nq, H, K], so that merging the heads costs no copy.

    Raises:
        TypeError: an argument that is no floating-point tensor, a mask that holds no numbers (torch's CausalBias),
            or mixed dtypes outside autocast.
        ValueError: shapes that do not fit, tensors on different devices, or a mask beside is_causal.
    """
    dtype = autocast_dtype(q)
    _check_args(q, k, v, attn_mask, is_causal, dtype)
    if dtype is not None:
        q, k, v = cast(dtype, q, k, v)
    scale = _check.scale("attention", scale, q.shape[3])
    out, _ = op(q, k, v, _as_read("attention", attn_mask), is_causal, scale)
    return out


@_check.once
def _check_args(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, autocast: torch.dtype | None
) -> None:
    name = "attention"
    _check.is_tensor(name, q=q, k=k, v=v, optional={"attn_mask": attn_mask})
    _check.is_floating(name, q=q, k=k, v=v)
    for tensor_name, tensor, layout in (
        ("q", q, "[B, H, Nq, K]"),
        ("k", k, "[B, Hk, Nk, K]"),
        ("v", v, "[B, Hk, Nk, K]"),
    ):
        _check.has_rank(name, tensor_name, tensor, layout)
    batch, heads, queries, width = q.shape
    _check.has_shape(name, "k", k, (batch, *k.shape[1:3], width), "q's batch and width")
    check_groups(name, k.shape[1], heads)
    _check.has_shape(name, "v", v, k.shape, "k's shape")
    check_width(name, "q", q, width)
    _check_mask(name, attn_mask, is_causal, (batch, heads, queries, k.shape[2]))
    _check.same_dtype(name, autocast, q=q, k=k, v=v)


@remembered
def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Self-attention on the packed projection, without splitting or permuting it.

    Args:
        qkv: [B, N, 3 * D], its last axis laid out as [3, H, K] with D = H * K, floating point, any strides.
        num_heads: H; must divide D.
        attn_mask, is_causal, scale: as in `attention`.

    Returns:
        [B, N, D] in qkv's dtype.

    Raises:
        TypeError, ValueError: as in `attention`; also a last axis that is not 3 * H * K.
    """
    num_heads = _check.integer(num_heads)
    check_packed(qkv, num_heads, attn_mask, is_causal)
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = cast(dtype, qkv)
    out, _ = op_qkv(qkv, *packed_options(qkv, num_heads, attn_mask, is_causal, scale))
    return out


def packed_options(
    qkv: Tensor, num_heads: int, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[int, Tensor | None, bool, float]:
    """What the schema of `op_qkv` has after qkv."""
    scale = _check.scale("attention_qkv", scale, qkv.shape[2] // (3 * num_heads))
    return num_heads, _as_read("attention_qkv", mask), is_causal, scale


@_check.once
def check_packed(qkv: Tensor, num_heads: int, attn_mask: Tensor | None, is_causal: bool) -> None:
    name = "attention_qkv"
    _check.is_tensor(name, qkv=qkv, optional={"attn_mask": attn_mask})
    _check.is_floating(name, qkv=qkv)
    _check.has_rank(name, "qkv", qkv, "[B, N, 3 * D]")
    batch, tokens, packed = qkv.shape
    if not _check.is_integer(num_heads) or num_heads < 1:
        raise ValueError(f"{name}: argument 'num_heads' is {num_heads!r}; needs an int of 1 or more")
    if packed % (3 * num_heads) != 0:
        raise ValueError(
            f"{name}: argument 'qkv' has a last axis of {packed}; needs a multiple of 3 * num_heads = {3 * num_heads}"
        )
    check_width(name, "qkv", qkv, packed // (3 * num_heads))
    _check_mask(name, attn_mask, is_causal, (batch, num_heads, tokens, tokens))


def check_groups(op_name: str, keys_heads: int, heads: int) -> None:
    if keys_heads != heads and (keys_heads == 0 or heads % keys_heads != 0):
        raise ValueError(f"{op_name}: argument 'k' has {keys_heads} heads; needs a divisor of q's {heads}")


def check_width(op_name: str, name: str, tensor: Tensor, width: int) -> None:
    if width == 0:
        raise ValueError(
            f"{op_name}: argument '{name}' has shape {list(tensor.shape)}; needs a head width of 1 or more"
        )


def _check_mask(name: str, mask: Tensor | None, is_causal: bool, scores: tuple[int, ...]) -> None:
    """Up to four axes, each of size 1 or the scores', or of four the first one a divisor."""
    _check.is_flag(name, "is_causal", is_causal)
    if mask is None:
        return
    if is_causal:
        raise ValueError(f"{name}: arguments 'attn_mask' and 'is_causal' are both given; needs one of them")
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"{name}: argument 'attn_mask' has dtype {mask.dtype}; needs bool or floating point")
        _check.is_floating(name, attn_mask=mask)
    inner = mask.shape[1:] if mask.dim() == 4 else mask.shape
    fits = mask.dim() <= 4 and all(
        size == 1 or size == score  # not `in`: dynamo finds no traced size in a tuple
        for size, score in zip(reversed(inner), reversed(scores), strict=False)
    )
    count = mask.shape[0] if mask.dim() == 4 else 1
    if not fits or (count != scores[0] and (count == 0 or scores[0] % count)):
        raise ValueError(
            f"{name}: argument 'attn_mask' has shape {list(mask.shape)}; "
            f"needs one that broadcasts to [B, H, Nq, Nk] = {list(scores)}, or masks of some sequences, a divisor of B"
        )


def _as_read(name: str, mask: Tensor | None) -> Tensor | None:
    """The mask with four axes; if it learns nothing, of one row where queries share it, and bool where that hides."""
    if mask is None:
        return None
    if type(mask).__module__ == "torch.nn.attention.bias":  # CausalBias: a shape, over memory that nobody wrote
        raise _check.refused(
            TypeError,
            f"{name}: argument 'attn_mask' is a {type(mask).__name__}, which holds no numbers; "
            "needs a mask that does, or is_causal",
        )
    learns, mask = mask.requires_grad, mask[(None,) * (4 - mask.dim())]
    if learns:
        return mask
    if mask.shape[2] > 1 and mask.stride(2) == 0:
        mask = mask[:, :, :1]
    return mask == 0 if _hides_keys(mask) else mask


def _hides_keys(mask: Tensor) -> bool:
    """Whether a row of an additive mask is 0, or leaves a key no weight beside one with 0.

    On a GPU nobody looks: it would stall the stream.
    """
    if mask.dtype == torch.bool or mask.shape[2] != 1 or type(mask) is not Tensor or mask.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    seen = mask == 0
    return bool((seen | (mask < _NO_WEIGHT)).all() and seen.any(-1).all())


# ------------------------------------------------------------------------------------------------------ q, k, v apart


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, out, stats, mask)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    q, k, v, out, stats, mask = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[3]
    dq, dk, dv, dmask = op.backward(dout, q, k, v, out, stats, mask, ctx.is_causal, ctx.scale, needs_mask)
    return dq, dk, dv, given(needs_mask, dmask), None, None


def _heads_last(like: Tensor) -> Tensor:
    """An empty [B, H, N, K] laid out as [B, N, H, K]."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    return _heads_last(q), q.new_empty(batch, heads, 2, queries, dtype=accumulate_dtype(q.dtype))


def _fake_backward(dout, q, k, v, out, stats, mask, is_causal, scale, needs_mask):
    dmask = mask.new_empty(mask.shape) if needs_mask else nothing(q)
    return _heads_last(q), _heads_last(k), _heads_last(v), dmask


def score_units(mask: Tensor | None, scale: float) -> tuple[float, float]:
    """`factor` and `unit` of a call, the same in every backend.

    A score is factor * q k^T + mask, or -inf for a hidden key; its weight is exp(unit * (score - largest) - log_sum).
    The row's `largest` score and its `log_sum`, the log of the sum of exp(unit * (score - largest)), are what forward
    leaves to backward: `stats`, [B, H, 2, Nq]. Added up to a log-sum-exp, the small one would be rounded away beside a
    huge one. A row with nothing to attend to has 0 and +inf, and so weights of 0.

    Without an additive mask the scale waits for the difference: a product that a compiler fuses with a difference is
    not rounded, and would not equal the largest of those that are.
    """
    if scale == 0 or (mask is not None and mask.dtype != torch.bool):
        return scale, 1.0
    return math.copysign(1.0, scale), abs(scale)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, factor: float) -> Tensor:
    scores = wide(q) @ wide(k).transpose(-1, -2) * factor
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    mask = _of_each(mask, scores.shape[0])
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _weights(scores: Tensor, stats: Tensor, unit: float) -> Tensor:
    largest, log_sum = stats.unsqueeze(-1).unbind(2)
    return (unit * (scores - largest) - log_sum).exp()


def _of_each(mask: Tensor, batch: int) -> Tensor:
    """Masks that serve in turn, one for each sequence."""
    if mask.dim() < 4 or mask.shape[0] in (1, batch):  # by shape: len() would make a traced size a constant
        return mask
    return mask.repeat(batch // mask.shape[0], 1, 1, 1)


def sum_to_mask(dscores: Tensor, mask: Tensor) -> Tensor:
    """The gradient of an additive mask, from that of the scores, [B, H, Nq, Nk]."""
    count = mask.shape[0]
    if count not in (1, dscores.shape[0]):
        dscores = dscores.unflatten(0, (-1, count)).sum(0)
    return dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """k or v with a head of its own for each one of q."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _reference(q, k, v, mask, is_causal, scale):
    k, v = (_repeated(each, q.shape[1]) for each in (k, v))
    factor, unit = score_units(mask, scale)
    scores = _scores(q, k, mask, is_causal, factor)
    largest = scores.amax(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    largest = largest.masked_fill(largest == -math.inf, 0)
    log_sum = (unit * (scores - largest.unsqueeze(-1))).exp().sum(-1).log()
    stats = torch.stack([largest, log_sum.masked_fill(log_sum == -math.inf, math.inf)], dim=2)
    out = _weights(scores, stats, unit) @ wide(v)
    return out.transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2), stats


def _reference_backward(dout, q, k, v, out, stats, mask, is_causal, scale, needs_mask):
    groups = k.shape[:2]
    k, v = (_repeated(each, q.shape[1]) for each in (k, v))
    factor, unit = score_units(mask, scale)
    weights = _weights(_scores(q, k, mask, is_causal, factor), stats, unit)
    g = wide(dout)
    delta = (g * wide(out)).sum(-1, keepdim=True)
    dscores = weights * (g @ wide(v).transpose(-1, -2) - delta)
    dq, dk = dscores @ wide(k) * scale, dscores.transpose(-1, -2) @ wide(q) * scale
    dv = weights.transpose(-1, -2) @ g
    if groups != q.shape[:2]:
        dk, dv = (grad.unflatten(1, (groups[1], -1)).sum(2) for grad in (dk, dv))
    dq, dk, dv = (grad.transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2) for grad in (dq, dk, dv))
    dmask = sum_to_mask(dscores, mask) if needs_mask else nothing(q)
    return dq, dk, dv, dmask


op = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor? attn_mask, bool is_causal, "
    "float scale, bool needs_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)


# ------------------------------------------------------------------------------------------------------- packed q, k, v


def _setup_context_qkv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, ctx.num_heads, mask, ctx.is_causal, ctx.scale = inputs
    out, stats = output
    ctx.save_for_backward(qkv, out, stats, mask)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients_qkv(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    qkv, out, stats, mask = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[2]
    dqkv, dmask = op_qkv.backward(dout, qkv, out, stats, ctx.num_heads, mask, ctx.is_causal, ctx.scale, needs_mask)
    return dqkv, None, given(needs_mask, dmask), None, None


def _fake_qkv(qkv: Tensor, num_heads: int, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    stats = qkv.new_empty(batch, num_heads, 2, tokens, dtype=accumulate_dtype(qkv.dtype))
    return qkv.new_empty(batch, tokens, packed // 3), stats


def _fake_backward_qkv(dout, qkv, out, stats, num_heads, mask, is_causal, scale, needs_mask):
    return qkv.new_empty(qkv.shape), mask.new_empty(mask.shape) if needs_mask else nothing(qkv)


def _unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 * D] -> q, k and v, each [B, H, N, K]; views."""
    return qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads))).permute(2, 0, 3, 1, 4).unbind(0)


def _reference_qkv(qkv, num_heads, mask, is_causal, scale):
    out, stats = _reference(*_unpack(qkv, num_heads), mask, is_causal, scale)
    return out.transpose(1, 2).flatten(2), stats


def _reference_backward_qkv(dout, qkv, out, stats, num_heads, mask, is_causal, scale, needs_mask):
    q, k, v = _unpack(qkv, num_heads)
    dout, out = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in (dout, out))
    *grads, dmask = _reference_backward(dout, q, k, v, out, stats, mask, is_causal, scale, needs_mask)
    return torch.stack([grad.transpose(1, 2) for grad in grads], dim=2).flatten(2), dmask


op_qkv = Op(
    "attention_qkv",
    "(Tensor qkv, int num_heads, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor stats, int num_heads, Tensor? attn_mask, bool is_causal, "
    "float scale, bool needs_mask) -> (Tensor, Tensor)",
    fake=_fake_qkv,
    fake_backward=_fake_backward_qkv,
    setup_context=_setup_context_qkv,
    gradients=_gradients_qkv,
)
op_qkv.register("reference", _reference_qkv, _reference_backward_qkv)
