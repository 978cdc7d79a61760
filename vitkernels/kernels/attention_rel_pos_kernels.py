"""dQ of attention over an image of keys, and the gradients of what is added to its rows and columns.

A tile of keys is a row of the image. So a query's sum over that row is the sum over its tile, written once, and those
over the columns add up in registers from row to row: no atomics, and no gradient of the scores in memory. In such sums
all but rounding can cancel, so that delta must be the sum of the very weights, which is known at the end: weights times
their gradients are summed, and the weights, and delta times these is subtracted last. The forward, and dK and dV, are
`attention_long`'s, which take the positions as a mask ("image" in `attention_tiles.masked`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.attention_tiles import (
    INF,
    across,
    along,
    columns_of,
    head_of,
    load,
    load_stats,
    stats_of,
    store,
    weights,
    zeros,
)


@triton.jit
def attention_rel_pos_dq(
    p_q, p_k, p_v, p_mask, p_dout, p_stats, p_delta, p_dq, p_sums, p_shares, p_exact, p_drel_w,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mm,
    stride_gb, stride_gh, stride_gn, stride_gk, stride_dqb, stride_dqh, stride_dqn, H, NQ, ROWS, scale, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries; BN is a power of two, the image's columns or more.

    `p_sums` and `p_shares` get the sums over the image's rows of weights times gradients, and of weights, contiguous
    [B, H, NQ, ROWS]; `p_exact` gets delta, and `p_drel_w` the columns' gradient, contiguous [B, H, NQ, columns]. All of
    them or none is given.
    """
    n_tiles = tl.cdiv(NQ, BM)
    i_bh, i_m = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * BM
    i_b, i_h = i_bh // H, i_bh % H
    o_m, o_x = i_m + tl.arange(0, BM), tl.arange(0, BN)
    m_m, m_x = o_m < NQ, o_x < columns_of(MASK)
    q = load(head_of(p_q, i_b, i_h, stride_qb, stride_qh, ALIGN), o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
    p_dout = head_of(p_dout, i_b, i_h, stride_gb, stride_gh, ALIGN)
    dout = load(p_dout, o_m, m_m, stride_gn, stride_gk, K, ALIGN, WIDTHS)
    p_k = head_of(p_k, i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_b, i_h, stride_vb, stride_vh, ALIGN)
    p_mask = head_of(p_mask, i_b, i_h, stride_mb, stride_mh, 1) + tl.cast(o_m, tl.int64) * stride_mm
    of_columns = tl.load(p_mask[:, None] + ROWS + o_x[None, :], mask=m_m[:, None] & m_x[None, :], other=0.0)
    of_columns = tl.where(m_x[None, :], of_columns.to(tl.float32), -INF)
    b_max, b_log = load_stats(stats_of(p_stats, i_bh, NQ), o_m, m_m, NQ)
    o_row = tl.cast(i_bh, tl.int64) * NQ + o_m
    b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
    dq = zeros(BM, WIDTHS)
    sums_w, shares_w = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    exact = tl.zeros([BM], tl.float32)
    for i_y in tl.range(0, ROWS):
        o_n = i_y * columns_of(MASK) + o_x
        k = load(p_k, o_n, m_x, stride_kn, stride_kk, K, ALIGN, WIDTHS)
        v = load(p_v, o_n, m_x, stride_vn, stride_vk, K, ALIGN, WIDTHS)
        of_row = tl.load(p_mask + i_y, mask=m_m, other=0.0).to(tl.float32)
        s = across(q, k, WIDTHS) * factor + (of_row[:, None] + of_columns)
        p = weights(s, b_max[:, None], b_log[:, None], unit)
        dp = across(dout, v, WIDTHS)
        if p_sums is not None:
            sums_w += p * dp
            shares_w += p
            of_sums = tl.sum(p * dp, 1)
            exact += of_sums
            tl.store(p_sums + o_row * ROWS + i_y, of_sums, mask=m_m)
            tl.store(p_shares + o_row * ROWS + i_y, tl.sum(p, 1), mask=m_m)
        ds = p * (dp - b_delta[:, None])
        dq = along(ds.to(k[0].dtype), k, dq, WIDTHS)
    p_dq = head_of(p_dq, i_b, i_h, stride_dqb, stride_dqh, ALIGN)
    store(p_dq, dq, scale, o_m, m_m, stride_dqn, K, ALIGN, WIDTHS)
    if p_sums is not None:
        tl.store(p_exact + o_row, exact, mask=m_m)
        drel_w = sums_w - exact[:, None] * shares_w
        p_drel_w += (o_row * columns_of(MASK))[:, None] + o_x[None, :]
        tl.store(p_drel_w, drel_w.to(p_drel_w.dtype.element_ty), mask=m_m[:, None] & m_x[None, :])
