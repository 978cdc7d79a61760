"""The kernels of glu_mlp.py, which says why they are so."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.common import dot
from vitkernels.kernels.mlp_tiles import activate, load, pieces, place, product


@triton.jit
def _two_products(
    p_a,
    p_b,
    i_m,
    i_n,
    M,
    N,
    K,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile of a b^T for rows i_n of b, and one for the rows N below them, in float32; b is [2 N, K]."""
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in tl.range(0, K, BLOCK_K):
        b_a = load(p_a, i_m, i_k, M, K, stride_a_m, stride_a_k, BLOCK_M, BLOCK_K, TMA)
        b_w_gate = load(p_b, i_n, i_k, 2 * N, K, stride_b_n, stride_b_k, BLOCK_N, BLOCK_K, TMA)
        b_w_up = load(p_b, N + i_n, i_k, 2 * N, K, stride_b_n, stride_b_k, BLOCK_N, BLOCK_K, TMA)
        b_gate = dot(b_a, b_w_gate.T, b_gate)
        b_up = dot(b_a, b_w_up.T, b_up)
    return b_gate, b_up


@triton.jit
def glu_mlp_forward(
    p_a,
    p_b,
    p_bias,
    p_pre,
    p_gated,
    M,
    N,
    K,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """pre = a b^T + bias, [M, 2 N], gated = f(left half) * right half, [M, N]; without b, a is the product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # not flattened: with two products in one loop, the compiler would wait for each before it issues the next
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = place(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N
        if p_b is None:
            b_gate = load(p_a, i_m, i_n, M, 2 * N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
            b_up = load(p_a, i_m, N + i_n, M, 2 * N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
        else:
            b_gate, b_up = _two_products(
                p_a, p_b, i_m, i_n, M, N, K, stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_M, BLOCK_N, BLOCK_K,
                TMA,
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_gates = pieces(b_gate, PIECES)
        b_ups = pieces(b_up, PIECES)
        for i_piece in tl.static_range(PIECES):
            b_gate_pre = b_gates[i_piece]
            b_up_pre = b_ups[i_piece]
            o_n = i_n + i_piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o_pre = o_m.to(tl.int64)[:, None] * (2 * N) + o_n[None, :]
            if p_bias is not None:
                b_gate_pre += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
                b_up_pre += tl.load(p_bias + N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            if p_pre is not None:
                tl.store(p_pre + o_pre, b_gate_pre.to(p_pre.dtype.element_ty), mask=m)
                tl.store(p_pre + N + o_pre, b_up_pre.to(p_pre.dtype.element_ty), mask=m)
            b_activated, _ = activate(b_gate_pre, ACTIVATION, p_b is None)
            o_gated = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
            tl.store(p_gated + o_gated, (b_activated * b_up_pre).to(p_gated.dtype.element_ty), mask=m)


@triton.jit
def glu_mlp_backward(
    p_a,
    p_b,
    p_pre,
    p_gated,
    p_partial,
    p_dpre,
    M,
    N,
    K,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """Of d = a b, [M, N]: dpre, [M, 2 N] as pre is, gated again, and dpre summed over each row of tiles.

    Without b, a is d, and gated may take its place.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_row, i_n = place(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_row * BLOCK_M, i_n * BLOCK_N
        if p_b is None:
            b_acc = load(p_a, i_m, i_n, M, N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
        else:
            b_acc = product(
                p_a, p_b, i_m, i_n, M, N, K, stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_M, BLOCK_N, BLOCK_K,
                TMA, "k",
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_pieces = pieces(b_acc, PIECES)
        for i_piece in tl.static_range(PIECES):
            b_d = b_pieces[i_piece]  # zero past the edges
            o_n = i_n + i_piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o_pre = o_m.to(tl.int64)[:, None] * (2 * N) + o_n[None, :]
            b_gate = tl.load(p_pre + o_pre, mask=m, other=0.0).to(tl.float32)
            b_up = tl.load(p_pre + N + o_pre, mask=m, other=0.0).to(tl.float32)
            b_activated, b_slope = activate(b_gate, ACTIVATION, p_b is None)
            b_dgate = b_d * b_up * b_slope
            b_dup = b_d * b_activated
            if p_gated is not None:
                o_gated = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
                tl.store(p_gated + o_gated, (b_activated * b_up).to(p_gated.dtype.element_ty), mask=m)
            tl.store(p_dpre + o_pre, b_dgate.to(p_dpre.dtype.element_ty), mask=m)
            tl.store(p_dpre + N + o_pre, b_dup.to(p_dpre.dtype.element_ty), mask=m)
            if p_partial is not None:
                o_partial = i_row * 2 * N + o_n
                tl.store(p_partial + o_partial, tl.sum(b_dgate, 0), mask=o_n < N)
                tl.store(p_partial + N + o_partial, tl.sum(b_dup, 0), mask=o_n < N)
