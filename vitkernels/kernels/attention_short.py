"""Attention over few keys, as most ViTs have: one program a head, its keys and values loaded once and kept.

Forward takes all scores of a tile of queries at once: one maximum, one sum, no running rescale. Backward also holds dk
and dv of all keys, so one walk over the queries gives every gradient: weights are computed once, delta is a sum over
weights at hand (out is not read), and nothing is added from two places. The number of keys is known when compiled:
masks and exponentials of columns past it are deleted. Of masks they take those that need few registers: causal, and
one that is the same for all queries (`MASK` "keys", which keys may be seen); the long kernels serve the others.
"""

# mypy: disable-error-code="assignment"
# tuples of blocks grow from empty ones; the compiler takes no annotation that says so
from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.attention_tiles import (
    INF,
    across,
    along,
    begin_of,
    head_of,
    load,
    load_stats,
    stats_of,
    store,
    store_stats,
    weights,
    zeros,
)
from vitkernels.kernels.common import dot


@triton.jit
def _load_keys(
    p, stride_n, stride_k, NK: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """All rows of k or v: a tile for each piece of the keys."""
    tiles = ()
    for j in tl.static_range(len(KEYS)):
        o_n = begin_of(KEYS, j) + tl.arange(0, KEYS[j])
        m_n = o_n < NK if begin_of(KEYS, j + 1) > NK else None
        tiles = tiles + (load(p, o_n, m_n, stride_n, stride_k, K, ALIGN, WIDTHS),)  # noqa: RUF005
    return tiles


@triton.jit
def _seen(p_mask, stride_mn, o_n, NK: tl.constexpr, MASK: tl.constexpr):
    """Whether a key is there and no mask hides it."""
    m_n = o_n < NK
    if MASK == "keys":
        m_n = tl.load(p_mask + tl.cast(o_n, tl.int64) * stride_mn, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def attention_short_forward(
    p_q, p_k, p_v, p_mask, p_out, p_stats,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mn,
    stride_ob, stride_oh, stride_on, H, NQ, unit, NK: tl.constexpr,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a head. `KEYS` are the pieces of powers of two that cover NK; the scale is positive."""
    i_bh = tl.program_id(0)
    i_b, i_h = i_bh // H, i_bh % H
    p_q = head_of(p_q, i_b, i_h, stride_qb, stride_qh, ALIGN)
    p_k = head_of(p_k, i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_b, i_h, stride_vb, stride_vh, ALIGN)
    p_out = head_of(p_out, i_b, i_h, stride_ob, stride_oh, ALIGN)
    if MASK == "keys":
        p_mask = head_of(p_mask, i_b, i_h, stride_mb, stride_mh, 1)
    p_stats = stats_of(p_stats, i_bh, NQ)
    k = _load_keys(p_k, stride_kn, stride_kk, NK, K, ALIGN, WIDTHS, KEYS)
    v = _load_keys(p_v, stride_vn, stride_vk, NK, K, ALIGN, WIDTHS, KEYS)
    for i_m in tl.range(0, NQ, BM, num_stages=1):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < NQ
        q = load(p_q, o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
        scores = ()
        b_max = tl.full([BM], -INF, tl.float32)
        for j in tl.static_range(len(KEYS)):
            o_n = begin_of(KEYS, j) + tl.arange(0, KEYS[j])
            s = across(q, k[j], WIDTHS)
            if MASK == "keys" or begin_of(KEYS, j + 1) > NK:
                s = tl.where(_seen(p_mask, stride_mn, o_n, NK, MASK)[None, :], s, -INF)
            if CAUSAL:
                s = tl.where(o_n[None, :] <= o_m[:, None], s, -INF)
            b_max = tl.maximum(b_max, tl.max(s, 1))
            scores = scores + (s,)  # noqa: RUF005
        if MASK == "keys":  # a row that sees nothing has weights of exp2(-inf - 0) = 0
            b_max = tl.where(b_max == -INF, 0.0, b_max)
        b_sum = tl.zeros([BM], tl.float32)
        acc = None
        for j in tl.static_range(len(KEYS)):
            p = tl.exp2((scores[j] - b_max[:, None]) * unit)
            b_sum += tl.sum(p, 1)
            acc = along(p.to(q[0].dtype), v[j], acc, WIDTHS)
        store_stats(p_stats, b_max, b_sum, o_m, m_m, NQ)
        if MASK == "keys":
            b_sum = tl.where(b_sum == 0, 1.0, b_sum)
        store(p_out, acc, (1.0 / b_sum)[:, None], o_m, m_m, stride_on, K, ALIGN, WIDTHS)


@triton.jit
def attention_short_backward(
    p_q, p_k, p_v, p_mask, p_dout, p_stats, p_dq, p_dk, p_dv,
    stride_qb, stride_qh, stride_qn, stride_qk, stride_kb, stride_kh, stride_kn, stride_kk,
    stride_vb, stride_vh, stride_vn, stride_vk, stride_mb, stride_mh, stride_mn,
    stride_gb, stride_gh, stride_gn, stride_gk, stride_dqb, stride_dqh, stride_dqn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, H, NQ, scale, unit,
    NK: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a head; BN >= NK, and the scale is positive. Scores are transposed, [keys, queries]."""
    i_bh = tl.program_id(0)
    i_b, i_h = i_bh // H, i_bh % H
    p_q = head_of(p_q, i_b, i_h, stride_qb, stride_qh, ALIGN)
    p_k = head_of(p_k, i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = head_of(p_v, i_b, i_h, stride_vb, stride_vh, ALIGN)
    p_dout = head_of(p_dout, i_b, i_h, stride_gb, stride_gh, ALIGN)
    p_dq = head_of(p_dq, i_b, i_h, stride_dqb, stride_dqh, ALIGN)
    p_stats = stats_of(p_stats, i_bh, NQ)
    o_n = tl.arange(0, BN)
    m_n = o_n < NK
    k = load(p_k, o_n, m_n, stride_kn, stride_kk, K, ALIGN, WIDTHS)
    v = load(p_v, o_n, m_n, stride_vn, stride_vk, K, ALIGN, WIDTHS)
    if MASK == "keys":
        p_mask = head_of(p_mask, i_b, i_h, stride_mb, stride_mh, 1)
    m_seen = _seen(p_mask, stride_mn, o_n, NK, MASK)
    dk, dv = zeros(BN, WIDTHS), zeros(BN, WIDTHS)
    for i_m in tl.range(0, NQ, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < NQ
        q = load(p_q, o_m, m_m, stride_qn, stride_qk, K, ALIGN, WIDTHS)
        dout = load(p_dout, o_m, m_m, stride_gn, stride_gk, K, ALIGN, WIDTHS)
        s = across(k, q, WIDTHS)
        b_max, b_log = load_stats(p_stats, o_m, m_m, NQ)  # not before the product, which needs the registers
        p = weights(s, b_max[None, :], b_log[None, :], unit)
        if MASK == "keys" or NK < BN:
            p = tl.where(m_seen[:, None], p, 0.0)
        if CAUSAL:
            p = tl.where(o_n[:, None] <= o_m[None, :], p, 0.0)
        dp = across(v, dout, WIDTHS)
        # where ds fits, it takes the place of q or dout in shared memory once they are read, in another layout, and
        # ptxas 12.8 mixes up descriptors of two layouts at one address. There q and dout are read last, in loops that
        # are not pipelined: in those that are, the compiler would wait for each product
        if WIDTHS[0] < BN:
            dv = along(p.to(dout[0].dtype), dout, dv, WIDTHS)
        ds = p * (dp - tl.sum(p * dp, 0)[None, :])
        ds = ds.to(q[0].dtype)
        if WIDTHS[0] < BN:
            dk = along(ds, q, dk, WIDTHS)
        dq = ()
        for i in tl.static_range(len(WIDTHS)):  # transposed: its 64 rows and more are what a warp group multiplies
            block = dot(tl.trans(k[i]), ds, None) * scale
            dq = dq + (tl.trans(block.to(p_dq.dtype.element_ty)),)  # noqa: RUF005
        if WIDTHS[0] >= BN:
            dv = along(p.to(dout[0].dtype), dout, dv, WIDTHS)
            dk = along(ds, q, dk, WIDTHS)
        store(p_dq, dq, 1, o_m, m_m, stride_dqn, K, ALIGN, WIDTHS)
    p_dk = head_of(p_dk, i_b, i_h, stride_dkb, stride_dkh, ALIGN)
    p_dv = head_of(p_dv, i_b, i_h, stride_dvb, stride_dvh, ALIGN)
    store(p_dk, dk, scale, o_n, m_n, stride_dkn, K, ALIGN, WIDTHS)
    store(p_dv, dv, 1.0, o_n, m_n, stride_dvn, K, ALIGN, WIDTHS)
