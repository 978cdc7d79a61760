"""Attention over any number of keys: a looped forward, and a backward in three kernels (delta; dQ; dK and dV).

The forward walks over tiles of keys with a running maximum and sum (Dao et al. 2022). Backward recomputes the weights
from the statistics of each row, once by queries and once by keys, so no two programs add into the same place: no
atomics, and the same bits every time. Tiles that need no bounds or causal mask run in loops of their own, without it.

Of many sequences in one (`p_cu_q` and `p_cu_k`: where each begins) each has as many programs as the longest; those of a
tile that it does not have do nothing. NQ is the rows of the statistics there. `GROUP` heads of q share one of k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.attention_tiles import (
    INF,
    across,
    along,
    head_of,
    hidden,
    load,
    load_stats,
    mask_of,
    masked,
    row_dot,
    rows_of,
    scaled,
    sequence,
    store,
    store_stats,
    tiles_of,
    weights,
    zeros,
)


@triton.jit
def _keys_step(
    state, q, p_k, p_v, p_mask, o_m, i_n,
    stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, NQ, NK, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into (maximum, sum, weighted values)."""
    b_max, b_sum, acc = state
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < NK if EDGE else None
    k = load(p_k, o_n, m_n, stride_kn, stride_kk, K, ALIGN, WIDTHS)
    s = across(q, k, WIDTHS)
    if not PLAIN:  # no mask and a positive scale: `factor` is 1
        s = masked(s * factor, p_mask, o_m[:, None], o_n[None, :], stride_mm, stride_mn, NQ, NK, MASK, MASK_ROWS)
    if EDGE:
        s = hidden(s, o_m[:, None], o_n[None, :], NK, CAUSAL)
    b_max_new = tl.maximum(b_max, tl.max(s, 1))
    # a row that has seen nothing yet keeps its weights at exp2(-inf - 0) = 0
    b_zero = b_max_new if MASK == "none" else tl.where(b_max_new == -INF, 0.0, b_max_new)
    p = tl.exp2((s - b_zero[:, None]) * unit)
    shrink = tl.exp2((b_max - b_zero) * unit)
    v = load(p_v, o_n, m_n, stride_vn, stride_vk, K, ALIGN, WIDTHS)
    acc = along(p.to(v[0].dtype), v, scaled(acc, shrink, WIDTHS), WIDTHS)
    return b_max_new, b_sum * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_long_forward(
    p_q, p_k, p_v, p_mask, p_out, p_stats, p_cu_q, p_cu_k,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, H, NQ, NK, LONGEST, MASKS, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries; neighbours share a head, so its keys and values stay in L2."""
    n_tiles = tiles_of(NQ, LONGEST, BM)
    i_bh, i_m = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * BM
    i_b, i_h = i_bh // H, i_bh % H
    i_q, n_q = sequence(p_cu_q, i_b, NQ)
    i_k, n_k = sequence(p_cu_k, i_b, NK)
    if p_cu_q is not None:
        n_k = tl.where(i_m < n_q, n_k, 0)
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < n_q
    q = load(head_of(p_q, i_q, i_h, stride_qb, stride_qh, ALIGN), o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
    p_k = head_of(p_k, i_k, i_h // GROUP, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_k, i_h // GROUP, stride_vb, stride_vh, ALIGN)
    if MASK != "none":
        p_mask = mask_of(p_mask, i_b, i_h, stride_mb, stride_mh, MASKS)
    state = (tl.full([BM], -INF, tl.float32), tl.zeros([BM], tl.float32), zeros(BM, WIDTHS))
    n_seen = n_k  # by some query of the tile
    n_plain = n_k // BN * BN  # by every query, in whole tiles
    if CAUSAL:
        n_seen = tl.minimum(n_k, i_m + BM)
        n_plain = tl.minimum(n_k, i_m + 1) // BN * BN
    for i_n in tl.range(0, n_plain, BN):
        state = _keys_step(
            state, q, p_k, p_v, p_mask, o_m, i_n,
            stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, PLAIN, BN, False,
        )  # fmt: skip
    for i_n in tl.range(n_plain, n_seen, BN, num_stages=1):
        state = _keys_step(
            state, q, p_k, p_v, p_mask, o_m, i_n,
            stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, PLAIN, BN, True,
        )  # fmt: skip
    b_max, b_sum, acc = state
    if MASK != "none" or p_cu_k is not None:  # a row with nothing to attend to gives zeros
        b_max = tl.where(b_max == -INF, 0.0, b_max)
    store_stats(rows_of(p_stats, p_cu_q, i_bh, i_h, i_q, NQ, 2), b_max, b_sum, o_m, m_m, NQ)
    if MASK != "none" or p_cu_k is not None:
        b_sum = tl.where(b_sum == 0, 1.0, b_sum)
    p_out = head_of(p_out, i_q, i_h, stride_ob, stride_oh, ALIGN)
    store(p_out, acc, (1.0 / b_sum)[:, None], o_m, m_m, stride_on, K, ALIGN, WIDTHS)


@triton.jit
def attention_long_delta(
    p_out, p_dout, p_delta, p_cu_q,
    stride_ob, stride_oh, stride_on, stride_ok, stride_gb, stride_gh, stride_gn, stride_gk, H, NQ, LONGEST,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out), [B, H, NQ] in float32, or [H, NQ] of all sequences."""
    n_tiles = tiles_of(NQ, LONGEST, BM)
    i_bh, i_m = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * BM
    i_b, i_h = i_bh // H, i_bh % H
    i_q, n_q = sequence(p_cu_q, i_b, NQ)
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < n_q
    p_out = head_of(p_out, i_q, i_h, stride_ob, stride_oh, ALIGN)
    p_dout = head_of(p_dout, i_q, i_h, stride_gb, stride_gh, ALIGN)
    out = load(p_out, o_m, m_m, stride_on, stride_ok, K, ALIGN, WIDTHS)
    dout = load(p_dout, o_m, m_m, stride_gn, stride_gk, K, ALIGN, WIDTHS)
    p_delta = rows_of(p_delta, p_cu_q, i_bh, i_h, i_q, NQ, 1)
    tl.store(p_delta + o_m, row_dot(out, dout, WIDTHS), mask=m_m)


@triton.jit
def _queries_step(
    grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, o_n, i_m,
    stride_qn, stride_qk, stride_gn, stride_gk, stride_mm, stride_mn, NQ, n_q, n_k, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take one tile of queries into (dk, dv). Scores are transposed, [keys, queries]; NQ is as in the statistics."""
    dk, dv = grads
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < n_q
    q = load(p_q, o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
    dout = load(p_dout, o_m, m_m, stride_gn, stride_gk, K, ALIGN, WIDTHS)
    b_max, b_log = load_stats(p_stats, o_m, m_m, NQ)
    b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    s = across(k, q, WIDTHS) * factor
    s = masked(s, p_mask, o_m[None, :], o_n[:, None], stride_mm, stride_mn, n_q, n_k, MASK, MASK_ROWS)
    if EDGE:
        s = hidden(s, o_m[None, :], o_n[:, None], n_k, CAUSAL)
    p = weights(s, b_max[None, :], b_log[None, :], unit)
    dv = along(p.to(dout[0].dtype), dout, dv, WIDTHS)
    ds = p * (across(v, dout, WIDTHS) - b_delta[None, :])
    dk = along(ds.to(q[0].dtype), q, dk, WIDTHS)
    return dk, dv


@triton.jit
def _head_step(
    grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, p_cu_q, i_b, i_bh, i_h, i_q, o_n, i_n,
    stride_qh, stride_qn, stride_qk, stride_gh, stride_gn, stride_gk, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_qb, stride_gb, MASKS, NQ, n_q, n_k, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take the queries of one head into (dk, dv)."""
    p_q = head_of(p_q, i_q, i_h, stride_qb, stride_qh, ALIGN)
    p_dout = head_of(p_dout, i_q, i_h, stride_gb, stride_gh, ALIGN)
    if MASK != "none":
        p_mask = mask_of(p_mask, i_b, i_h, stride_mb, stride_mh, MASKS)
    p_stats = rows_of(p_stats, p_cu_q, i_bh, i_h, i_q, NQ, 2)
    p_delta = rows_of(p_delta, p_cu_q, i_bh, i_h, i_q, NQ, 1)
    begin = 0
    if CAUSAL:  # earlier queries see none of these keys, later ones all of them
        begin = tl.minimum(n_q, i_n) // BM * BM
        n_edge = tl.minimum(n_q, tl.cdiv(i_n + BN, BM) * BM)
        for i_m in tl.range(begin, n_edge, BM, num_stages=1):
            grads = _queries_step(
                grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, o_n, i_m,
                stride_qn, stride_qk, stride_gn, stride_gk, stride_mm, stride_mn, NQ, n_q, n_k, factor, unit,
                K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, BM, True,
            )  # fmt: skip
        begin = n_edge
    # a key that is not there needs no mask: its row of dk and dv is not stored
    for i_m in tl.range(begin, n_q, BM):
        grads = _queries_step(
            grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, o_n, i_m,
            stride_qn, stride_qk, stride_gn, stride_gk, stride_mm, stride_mn, NQ, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, BM, False,
        )  # fmt: skip
    return grads


@triton.jit
def attention_long_dkdv(
    p_q, p_k, p_v, p_mask, p_dout, p_stats, p_delta, p_dk, p_dv, p_cu_q, p_cu_k,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gh, stride_gn, stride_gk, stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn, H, NQ, NK, LONGEST, MASKS, scale, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys; it walks over the heads of q that share them, in order."""
    n_tiles = tiles_of(NK, LONGEST, BN)
    i_bh, i_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * BN
    i_b, i_kh = i_bh // (H // GROUP), i_bh % (H // GROUP)
    i_q, n_q = sequence(p_cu_q, i_b, NQ)
    i_k, n_k = sequence(p_cu_k, i_b, NK)
    if p_cu_k is not None:
        n_q = tl.where(i_n < n_k, n_q, 0)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < n_k
    p_k = head_of(p_k, i_k, i_kh, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_k, i_kh, stride_vb, stride_vh, ALIGN)
    k = load(p_k, o_n, m_n, stride_kn, stride_kk, K, ALIGN, WIDTHS)
    v = load(p_v, o_n, m_n, stride_vn, stride_vk, K, ALIGN, WIDTHS)
    grads = (zeros(BN, WIDTHS), zeros(BN, WIDTHS))
    if GROUP == 1:  # a loop of one turn would take registers
        grads = _head_step(
            grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, p_cu_q, i_b, i_bh, i_kh, i_q, o_n, i_n,
            stride_qh, stride_qn, stride_qk, stride_gh, stride_gn, stride_gk, stride_mb, stride_mh, stride_mm,
            stride_mn, stride_qb, stride_gb, MASKS, NQ, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, BM, BN,
        )  # fmt: skip
    else:
        for i_group in tl.range(GROUP):
            grads = _head_step(
                grads, k, v, p_q, p_dout, p_mask, p_stats, p_delta, p_cu_q,
                i_b, i_bh * GROUP + i_group, i_kh * GROUP + i_group, i_q, o_n, i_n,
                stride_qh, stride_qn, stride_qk, stride_gh, stride_gn, stride_gk, stride_mb, stride_mh, stride_mm,
                stride_mn, stride_qb, stride_gb, MASKS, NQ, n_q, n_k, factor, unit,
                K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, BM, BN,
            )  # fmt: skip
    dk, dv = grads
    p_dk = head_of(p_dk, i_k, i_kh, stride_dkb, stride_dkh, ALIGN)
    p_dv = head_of(p_dv, i_k, i_kh, stride_dvb, stride_dvh, ALIGN)
    store(p_dk, dk, scale, o_n, m_n, stride_dkn, K, ALIGN, WIDTHS)
    store(p_dv, dv, 1.0, o_n, m_n, stride_dvn, K, ALIGN, WIDTHS)


@triton.jit
def _dq_step(
    dq, q, dout, b_max, b_log, b_delta, p_k, p_v, p_mask, p_ds, o_m, i_n,
    stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, NQ, NK, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, STORE_DS: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into dq; without a `b_delta`, return its part of delta in its place."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < NK if EDGE else None
    k = load(p_k, o_n, m_n, stride_kn, stride_kk, K, ALIGN, WIDTHS)
    v = load(p_v, o_n, m_n, stride_vn, stride_vk, K, ALIGN, WIDTHS)
    s = across(q, k, WIDTHS) * factor
    s = masked(s, p_mask, o_m[:, None], o_n[None, :], stride_mm, stride_mn, NQ, NK, MASK, MASK_ROWS)
    if EDGE:
        s = hidden(s, o_m[:, None], o_n[None, :], NK, CAUSAL)
    p = weights(s, b_max[:, None], b_log[:, None], unit)
    dp = across(dout, v, WIDTHS)
    if b_delta is None:
        result = tl.sum(p * dp, 1)
    else:
        ds = p * (dp - b_delta[:, None])
        if STORE_DS:
            o_ds = tl.cast(o_m, tl.int64)[:, None] * NK + o_n[None, :]
            tl.store(p_ds + o_ds, ds, mask=(o_m < NQ)[:, None] & (o_n < NK)[None, :])
        result = along(ds.to(k[0].dtype), k, dq, WIDTHS)
    return result


@triton.jit
def attention_long_dq(
    p_q, p_k, p_v, p_mask, p_dout, p_stats, p_delta, p_dq, p_ds, p_cu_q, p_cu_k,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gh, stride_gn, stride_gk, stride_dqb, stride_dqh, stride_dqn, H, NQ, NK, LONGEST, MASKS,
    scale, factor, unit,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, STORE_DS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries; `STORE_DS` also writes delta and the gradient of the scores, [B, H, NQ, NK]."""
    n_tiles = tiles_of(NQ, LONGEST, BM)
    i_bh, i_m = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * BM
    i_b, i_h = i_bh // H, i_bh % H
    i_q, n_q = sequence(p_cu_q, i_b, NQ)
    i_k, n_k = sequence(p_cu_k, i_b, NK)
    if p_cu_q is not None:
        n_k = tl.where(i_m < n_q, n_k, 0)
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < n_q
    p_q = head_of(p_q, i_q, i_h, stride_qb, stride_qh, ALIGN)
    p_k = head_of(p_k, i_k, i_h // GROUP, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_k, i_h // GROUP, stride_vb, stride_vh, ALIGN)
    p_dout = head_of(p_dout, i_q, i_h, stride_gb, stride_gh, ALIGN)
    if MASK != "none":
        p_mask = mask_of(p_mask, i_b, i_h, stride_mb, stride_mh, MASKS)
    q = load(p_q, o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
    dout = load(p_dout, o_m, m_m, stride_gn, stride_gk, K, ALIGN, WIDTHS)
    b_max, b_log = load_stats(rows_of(p_stats, p_cu_q, i_bh, i_h, i_q, NQ, 2), o_m, m_m, NQ)
    p_delta = rows_of(p_delta, p_cu_q, i_bh, i_h, i_q, NQ, 1) + o_m
    dq = zeros(BM, WIDTHS)
    if STORE_DS:
        # The mask's gradient sums these over keys, where all but rounding can cancel: delta is summed from the very
        # weights, not from an out that was rounded. All tiles are bounded: speed matters less here.
        p_ds += tl.cast(i_bh, tl.int64) * NQ * NK
        b_delta = tl.zeros([BM], tl.float32)
        for i_n in tl.range(0, n_k, BN, num_stages=1):
            b_delta += _dq_step(
                None, q, dout, b_max, b_log, None, p_k, p_v, p_mask, None, o_m, i_n,
                stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, n_q, n_k, factor, unit,
                K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, False, BN, True,
            )  # fmt: skip
        tl.store(p_delta, b_delta, mask=m_m)
    else:
        b_delta = tl.load(p_delta, mask=m_m, other=0.0)
    n_seen = n_k
    n_plain = n_k // BN * BN
    if CAUSAL:
        n_seen = tl.minimum(n_k, i_m + BM)
        n_plain = tl.minimum(n_k, i_m + 1) // BN * BN
    for i_n in tl.range(0, n_plain, BN):
        dq = _dq_step(
            dq, q, dout, b_max, b_log, b_delta, p_k, p_v, p_mask, p_ds, o_m, i_n,
            stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, STORE_DS, BN, False,
        )  # fmt: skip
    for i_n in tl.range(n_plain, n_seen, BN, num_stages=1):
        dq = _dq_step(
            dq, q, dout, b_max, b_log, b_delta, p_k, p_v, p_mask, p_ds, o_m, i_n,
            stride_kn, stride_kk, stride_vn, stride_vk, stride_mm, stride_mn, n_q, n_k, factor, unit,
            K, ALIGN, WIDTHS, MASK, MASK_ROWS, CAUSAL, STORE_DS, BN, True,
        )  # fmt: skip
    p_dq = head_of(p_dq, i_q, i_h, stride_dqb, stride_dqh, ALIGN)
    store(p_dq, dq, scale, o_m, m_m, stride_dqn, K, ALIGN, WIDTHS)
