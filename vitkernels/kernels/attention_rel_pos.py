"""Launchers of attention with decomposed relative positions: schema and meaning in `vitkernels.ops.attention_rel_pos`.

rel_h and rel_w are laid side by side, a row of Kh + Kw numbers a query, which is little beside the scores' Kh * Kw. The
forward, and dk and dv, are launches of `attention_long`; dq's kernel, which sums the gradients of the positions, is in
`attention_rel_pos_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kernels import attention_rel_pos_kernels, capability, configs
from vitkernels.kernels.attention import (
    Sequences,
    alignment,
    launch_options,
    long_delta,
    long_dkdv,
    long_forward,
    mask_arguments,
    strides_of,
    units_of,
    why_not_width,
    zero_results,
)
from vitkernels.kernels.attention_variants import variants_rel_pos as variants
from vitkernels.kernels.launch import cdiv, launch
from vitkernels.ops.attention import _heads_last
from vitkernels.ops.attention_rel_pos import empty_gradients, parts

__all__ = ["backward", "forward", "variants", "why_not"]


def why_not(direction: str, call: Any) -> str | None:
    columns, most = call.rel_w.shape[3], configs.REL_POS_DQ.widest("columns")
    if columns > most:
        return f"the kernels take images up to {most} columns wide, and these are {columns}"
    return why_not_width(call.q.shape[-1])


def _side_by_side(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    return torch.cat([rel_h, rel_w], dim=3)


def _sequences(q: Tensor, k: Tensor) -> Sequences:
    batch, heads, queries, _ = q.shape
    return Sequences(batch, heads, queries, k.shape[2], queries)


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = parts(q, k, v)
    of = _sequences(q, k)
    out = _heads_last(q)
    stats = q.new_empty((of.batch, of.heads, 2, of.rows), dtype=torch.float32)
    if 0 in (q.numel(), k.numel()):
        zero_results(out, stats)
    else:
        mask = _side_by_side(rel_h, rel_w)
        long_forward(of, q, k, v, out, stats, mask, False, scale, columns=rel_w.shape[3])
    return out, stats


def backward(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, stats: Tensor, rel_h: Tensor,
    rel_w: Tensor, scale: float, needs_rel: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = empty_gradients(q, k, v, rel_h, rel_w, needs_rel)
    dq, dk, dv, drel_h, drel_w = results
    grads = parts(dq, *((dk, dv) if k is not None else (None, None)))
    tensors = q, k, v = parts(q, k, v)
    if 0 in (q.numel(), k.numel()):
        for grad in results:
            grad.zero_()
        return results
    of, columns = _sequences(q, k), rel_w.shape[3]
    stats = stats.contiguous()
    align = alignment(*tensors, out, dout, *grads)
    mask = _side_by_side(rel_h, rel_w)
    delta = long_delta(of, out, dout, stats, align)
    _, mask_strides, _ = mask_arguments(mask)
    tile = configs.REL_POS_DQ.pick(
        capability(q.device), columns=columns, width=q.shape[3], float32=q.dtype == torch.float32
    )
    sums = shares = exact = None
    if needs_rel:
        sums, shares = stats.new_empty(2, *rel_h.shape).unbind(0)
        exact = stats.new_empty(delta.shape)
    launch(
        attention_rel_pos_kernels.attention_rel_pos_dq, (of.batch * of.heads * cdiv(of.queries, tile.queries),),
        q, k, v, mask, dout, stats, delta, grads[0], sums, shares, exact,
        drel_w if needs_rel else None,
        *strides_of(q, align), *strides_of(k, align), *strides_of(v, align), *mask_strides[:3],
        *strides_of(dout, align), *strides_of(grads[0], align)[:3], of.heads, of.rows, rel_h.shape[3], scale,
        *units_of(mask, scale), K=q.shape[3], ALIGN=align, WIDTHS=configs.attention_widths(q.shape[3]),
        MASK=f"image {columns}", BM=tile.queries, BN=configs.row_of_keys(columns), **launch_options(tile),
    )  # fmt: skip
    if sums is not None and shares is not None and exact is not None:
        drel_h.copy_(torch.addcmul(sums, exact.unsqueeze(-1), shares, value=-1))
        delta = exact
    long_dkdv(of, dout, tensors, stats, delta, grads[1:], align, mask, False, scale, columns=columns)
    return results
