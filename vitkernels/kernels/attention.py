"""Launchers of the attention kernels: schemas and meaning in `vitkernels.ops.attention`.

`long_forward` and `long_backward` serve sequences of one length, and those of `attention_varlen`.

q, k, v, the mask and all gradients are read and written where they lie, by strides. The gradient of an additive mask is
the one thing that costs memory: when it is asked for, the gradient of the scores is written as [B, H, Nq, Nk] in
float32 and summed by torch to the mask's shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels.kernels import attention_long, attention_short, capability, configs
from vitkernels.kernels.attention_variants import variants
from vitkernels.kernels.common import processors
from vitkernels.kernels.launch import cdiv, launch
from vitkernels.ops._amp import nothing
from vitkernels.ops.attention import _heads_last, _unpack, score_units, sum_to_mask

__all__ = ["backward", "backward_qkv", "forward", "forward_qkv", "variants", "why_not", "why_not_qkv"]

LOG2E = 1.4426950408889634
WIDEST = 128


def why_not(direction: str, call: Any) -> str | None:
    return why_not_width(call.q.shape[-1])


def why_not_qkv(direction: str, call: Any) -> str | None:
    return why_not_width(call.qkv.shape[-1] // (3 * call.num_heads))


def why_not_width(width: int) -> str | None:
    return f"the kernels take heads up to {WIDEST} wide, and these are {width}" if width > WIDEST else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out = _heads_last(q)
    return out, _forward(q, k, v, out, mask, is_causal, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, mask: Tensor | None, is_causal: bool,
    scale: float, needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _heads_last(q), _heads_last(k), _heads_last(v)
    return *grads, _backward(dout, (q, k, v), out, stats, grads, mask, is_causal, scale, needs_mask)


def forward_qkv(
    qkv: Tensor, num_heads: int, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    out = qkv.new_empty(batch, tokens, packed // 3)
    q, k, v = _unpack(qkv, num_heads)
    return out, _forward(q, k, v, _split(out, num_heads), mask, is_causal, scale)


def backward_qkv(
    dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, num_heads: int, mask: Tensor | None, is_causal: bool,
    scale: float, needs_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dqkv = qkv.new_empty(qkv.shape)
    tensors, grads = _unpack(qkv, num_heads), _unpack(dqkv, num_heads)
    dout, out = _split(dout, num_heads), _split(out, num_heads)
    return dqkv, _backward(dout, tensors, out, stats, grads, mask, is_causal, scale, needs_mask)


def _split(tensor: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, K]; a view."""
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------- launches


class Sequences(NamedTuple):
    """How many sequences there are, of how many heads of q, and how long: of one length, or at most.

    Attributes:
        rows: of a head's statistics.
        cu_q, cu_k: [batch + 1] int32, contiguous, where the queries and the keys of each begin, where they lie in one.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    rows: int
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    def longest(self, length: int) -> int | None:
        """What kernels must be told of the longest sequence's queries or keys: nothing, where all have as many."""
        return None if self.cu_q is None else length


def alignment(*tensors: Tensor) -> int:
    """The largest power of two up to 8 that divides the strides of batches, heads and rows."""
    strides = 8
    for tensor in tensors:
        for stride in tensor.stride()[:-1]:
            strides |= stride
    return strides & -strides


def strides_of(tensor: Tensor, align: int) -> tuple[int, int, int, int]:
    """Of [B, H, N, K]; of [T, H, K], where what stands for a batch is a sequence's first row."""
    if tensor.dim() == 3:
        row, head, column = tensor.stride()
        return row // align, head // align, row // align, column
    batch, head, row, column = tensor.stride()
    return batch // align, head // align, row // align, column


def mask_arguments(
    mask: Tensor | None, columns: int | None = None
) -> tuple[Tensor | None, tuple[int, ...], dict[str, Any]]:
    """The mask as kernels read it (bool as bytes), its strides, and what they must know when compiled.

    With `columns` it is that of an image of keys, as `attention_tiles.masked` has it.
    """
    if mask is None:
        return None, (0, 0, 0, 0), {"MASK": "none", "MASK_ROWS": False}
    kind = f"image {columns}" if columns is not None else "bool" if mask.dtype == torch.bool else "add"
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    values = mask.view(torch.uint8) if kind == "bool" else mask
    return values, strides, {"MASK": kind, "MASK_ROWS": mask.shape[2] > 1}


def _in_turn(mask: Tensor | None, batch: int) -> int | None:
    """How many sequences have masks of their own, where others have the same in turn; None where none has."""
    return None if mask is None or mask.shape[0] in (1, batch) else mask.shape[0]


def _short(
    direction: str, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> configs.AttentionTile | None:
    """The row of the short kernels where they serve: many heads, and masks that hide keys from all queries alike."""
    if scale <= 0 or (mask is not None and (mask.dtype != torch.bool or mask.shape[2] > 1)):
        return None
    if k.shape[1] != q.shape[1] or q.dtype == torch.float32 or _in_turn(mask, q.shape[0]) is not None:
        return None
    if q.shape[0] * q.shape[1] < configs.SHORT_PROGRAMS * processors(q.device):
        return None
    masked = mask is not None or is_causal
    return configs.SHORT[direction].find(capability(q.device), keys=k.shape[2], width=q.shape[3], masked=masked)


def long_tile(
    table: configs.Table[configs.AttentionTile], q: Tensor, columns: int | None = None
) -> configs.AttentionTile:
    """The row of the long kernels."""
    return table.pick(
        capability(q.device), width=q.shape[-1], float32=q.dtype == torch.float32, image=columns is not None
    )


def units_of(mask: Tensor | None, scale: float) -> tuple[float, float]:
    """`score_units` for exponentials of 2."""
    factor, unit = score_units(mask, scale)
    return factor, unit * LOG2E


def launch_options(tile: configs.AttentionTile) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options | ({"maxnreg": tile.maxnreg} if tile.maxnreg else {})


def zero_results(out: Tensor, stats: Tensor) -> None:
    """What queries get that see nothing."""
    out.zero_()
    stats.select(-2, 0).zero_()
    stats.select(-2, 1).fill_(torch.inf)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    stats = q.new_empty((batch, heads, 2, queries), dtype=torch.float32)
    if 0 in (batch, heads, queries, keys):
        zero_results(out, stats)
        return stats
    short = _short("forward", q, k, mask, is_causal, scale)
    if short is None:
        long_forward(Sequences(batch, heads, queries, keys, queries), q, k, v, out, stats, mask, is_causal, scale)
        return stats
    align = alignment(q, k, v, out)
    values, (mask_b, mask_h, _, mask_n), _ = mask_arguments(mask)
    _, unit = units_of(mask, scale)
    launch(
        attention_short.attention_short_forward, (batch * heads,),
        q, k, v, values, out, stats, *strides_of(q, align), *strides_of(k, align), *strides_of(v, align),
        mask_b, mask_h, mask_n, *strides_of(out, align)[:3], heads, queries, unit,
        NK=keys, K=width, ALIGN=align, WIDTHS=configs.attention_widths(width), MASK="none" if mask is None else "keys",
        CAUSAL=is_causal, BM=short.queries, KEYS=configs.attention_keys(keys), **launch_options(short),
    )  # fmt: skip
    return stats


def long_forward(
    of: Sequences, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, mask: Tensor | None, is_causal: bool,
    scale: float, columns: int | None = None,
) -> None:  # fmt: skip
    """Write out and the rows' statistics of some queries that have some keys, [B, H, N, K] or [T, H, K].

    `columns` is as in `mask_arguments`.
    """
    width = q.shape[-1]
    align = alignment(q, k, v, out)
    tile = long_tile(configs.LONG_FORWARD, q, columns)
    values, mask_strides, mask_constants = mask_arguments(mask, columns)
    launch(
        attention_long.attention_long_forward, (of.batch * of.heads * cdiv(of.queries, tile.queries),),
        q, k, v, values, out, stats, of.cu_q, of.cu_k, *strides_of(q, align), *strides_of(k, align),
        *strides_of(v, align), *mask_strides, *strides_of(out, align)[:3], of.heads, of.rows, of.keys,
        of.longest(of.queries), _in_turn(mask, of.batch),
        *units_of(mask, scale), K=width, ALIGN=align, WIDTHS=configs.attention_widths(width), **mask_constants,
        CAUSAL=is_causal, PLAIN=mask is None and scale > 0, GROUP=of.heads // k.shape[1], BM=tile.queries, BN=tile.keys,
        **launch_options(tile),
    )  # fmt: skip


def _backward(
    dout: Tensor, tensors: tuple[Tensor, ...], out: Tensor, stats: Tensor, grads: tuple[Tensor, ...],
    mask: Tensor | None, is_causal: bool, scale: float, needs_mask: bool,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv into `grads`; returns the mask's gradient."""
    q, k, v = tensors
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    if 0 in (batch, heads, queries, keys):
        for grad in grads:
            grad.zero_()
        return mask.new_zeros(mask.shape) if mask is not None and needs_mask else nothing(q)
    stats = stats.contiguous()  # as every backend's forward leaves it
    short = _short("backward", q, k, mask, is_causal, scale)
    if short is None:
        of = Sequences(batch, heads, queries, keys, queries)
        return long_backward(of, dout, tensors, out, stats, grads, mask, is_causal, scale, needs_mask)
    align = alignment(*tensors, out, dout, *grads)
    strides_dq, strides_dk, strides_dv = (strides_of(grad, align)[:3] for grad in grads)
    values, (mask_b, mask_h, _, mask_n), _ = mask_arguments(mask)
    _, unit = units_of(mask, scale)
    launch(
        attention_short.attention_short_backward, (batch * heads,),
        q, k, v, values, dout, stats, *grads, *strides_of(q, align), *strides_of(k, align), *strides_of(v, align),
        mask_b, mask_h, mask_n, *strides_of(dout, align), *strides_dq, *strides_dk, *strides_dv,
        heads, queries, scale, unit, NK=keys, K=width, ALIGN=align, WIDTHS=configs.attention_widths(width),
        MASK="none" if mask is None else "keys", CAUSAL=is_causal, BM=short.queries, BN=short.keys,
        PREFETCH=short.stages > 1, num_warps=short.warps, num_stages=1,
    )  # fmt: skip
    return nothing(q)


def long_backward(
    of: Sequences, dout: Tensor, tensors: tuple[Tensor, ...], out: Tensor, stats: Tensor, grads: tuple[Tensor, ...],
    mask: Tensor | None, is_causal: bool, scale: float, needs_mask: bool,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv into `grads`; returns the mask's gradient. Some queries have some keys."""
    q, k, v = tensors
    dq, dk, dv = grads
    width, group = q.shape[-1], of.heads // k.shape[1]
    align = alignment(*tensors, out, dout, *grads)
    sizes = {"K": width, "ALIGN": align, "WIDTHS": configs.attention_widths(width)}
    values, mask_strides, mask_constants = mask_arguments(mask)
    factor, unit = units_of(mask, scale)
    strides = *strides_of(q, align), *strides_of(k, align), *strides_of(v, align), *mask_strides
    strides += strides_of(dout, align)
    # dq's kernel leaves it where the mask learns
    delta = stats.new_empty((*stats.shape[:-2], of.rows)) if needs_mask else long_delta(of, out, dout, stats, align)
    ds = q.new_empty((of.batch, of.heads, of.rows, of.keys), dtype=torch.float32) if needs_mask else None
    tile = long_tile(configs.LONG_DS if needs_mask else configs.LONG_DQ, q)
    launch(
        attention_long.attention_long_dq, (of.batch * of.heads * cdiv(of.queries, tile.queries),),
        q, k, v, values, dout, stats, delta, dq, ds, of.cu_q, of.cu_k, *strides, *strides_of(dq, align)[:3],
        of.heads, of.rows, of.keys, of.longest(of.queries), _in_turn(mask, of.batch), scale, factor, unit,
        **sizes, **mask_constants, CAUSAL=is_causal, STORE_DS=needs_mask, GROUP=group, BM=tile.queries,
        BN=tile.keys, **launch_options(tile),
    )  # fmt: skip
    long_dkdv(of, dout, tensors, stats, delta, (dk, dv), align, mask, is_causal, scale)
    if mask is None or ds is None:
        return nothing(q)
    return sum_to_mask(ds, mask)


def long_delta(of: Sequences, out: Tensor, dout: Tensor, stats: Tensor, align: int) -> Tensor:
    """rowsum(dout * out), as `attention_long.attention_long_delta` has it."""
    delta = stats.new_empty((*stats.shape[:-2], of.rows))
    width = out.shape[-1]
    tile = long_tile(configs.LONG_DELTA, out)
    launch(
        attention_long.attention_long_delta, (of.batch * of.heads * cdiv(of.queries, tile.queries),),
        out, dout, delta, of.cu_q, *strides_of(out, align), *strides_of(dout, align), of.heads, of.rows,
        of.longest(of.queries), K=width, ALIGN=align, WIDTHS=configs.attention_widths(width), BM=tile.queries,
        **launch_options(tile),
    )  # fmt: skip
    return delta


def long_dkdv(
    of: Sequences, dout: Tensor, tensors: tuple[Tensor, ...], stats: Tensor, delta: Tensor,
    grads: tuple[Tensor, Tensor], align: int, mask: Tensor | None, is_causal: bool, scale: float,
    columns: int | None = None,
) -> None:  # fmt: skip
    """Write dk and dv; `columns` is as in `mask_arguments`."""
    q, k, v = tensors
    dk, dv = grads
    width, tile = q.shape[-1], long_tile(configs.LONG_DKDV, q)
    values, mask_strides, mask_constants = mask_arguments(mask, columns)
    launch(
        attention_long.attention_long_dkdv, (of.batch * k.shape[1] * cdiv(of.keys, tile.keys),),
        q, k, v, values, dout, stats, delta, dk, dv, of.cu_q, of.cu_k, *strides_of(q, align), *strides_of(k, align),
        *strides_of(v, align), *mask_strides, *strides_of(dout, align), *strides_of(dk, align)[:3],
        *strides_of(dv, align)[:3], of.heads, of.rows, of.keys, of.longest(of.keys), _in_turn(mask, of.batch), scale,
        *units_of(mask, scale), K=width, ALIGN=align, WIDTHS=configs.attention_widths(width), **mask_constants,
        CAUSAL=is_causal, GROUP=of.heads // k.shape[1], BM=tile.queries, BN=tile.keys, **launch_options(tile),
    )  # fmt: skip
