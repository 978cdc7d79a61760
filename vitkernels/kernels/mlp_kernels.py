"""The kernels of mlp.py, which says why they are so."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.mlp_tiles import activate, load, pieces, place, product, put


@triton.jit
def mlp_forward(
    p_a,
    p_b,
    p_bias,
    p_pre,
    p_activated,
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
    TMA_OUT: tl.constexpr,
):
    """pre = a b^T + bias, activated = f(pre), both [M, N]; without b, a is the product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_m, i_n = place(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N
        if p_b is None:
            b_acc = load(p_a, i_m, i_n, M, N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
        else:
            b_acc = product(
                p_a, p_b, i_m, i_n, M, N, K, stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_M, BLOCK_N, BLOCK_K,
                TMA, "n",
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_pieces = pieces(b_acc, PIECES)
        for i_piece in tl.static_range(PIECES):
            b_pre = b_pieces[i_piece]
            i_column = i_n + i_piece * (BLOCK_N // PIECES)
            o_n = i_column + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
            if p_bias is not None:
                b_pre += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            if p_pre is not None:
                put(p_pre, b_pre, i_m, i_column, o, m, TMA_OUT)
            b_activated, _ = activate(b_pre, ACTIVATION, p_b is None)
            put(p_activated, b_activated, i_m, i_column, o, m, TMA_OUT)


@triton.jit
def _load_pre(p_pre, o_m, i_n, M, N, COLUMNS: tl.constexpr):
    o_n = i_n + tl.arange(0, COLUMNS)
    o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    return tl.load(p_pre + o, mask=(o_m < M)[:, None] & (o_n < N)[None, :], other=0.0)


@triton.jit
def mlp_backward(
    p_a,
    p_b,
    p_pre,
    p_activated,
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
    TMA_OUT: tl.constexpr,
):
    """dpre = (a b) f'(pre), activated = f(pre), and dpre summed over each row of tiles; without b, a is the product."""
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
        b_next = _load_pre(p_pre, o_m, i_n, M, N, BLOCK_N // PIECES)
        b_pieces = pieces(b_acc, PIECES)
        for i_piece in tl.static_range(PIECES):
            i_column = i_n + i_piece * (BLOCK_N // PIECES)
            o_n = i_column + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
            b_pre = b_next.to(tl.float32)
            if i_piece + 1 < PIECES:  # on its way while this piece is worked on
                b_next = _load_pre(p_pre, o_m, i_column + BLOCK_N // PIECES, M, N, BLOCK_N // PIECES)
            b_activated, b_slope = activate(b_pre, ACTIVATION, p_b is None)
            b_dpre = b_pieces[i_piece] * b_slope  # zero past the edges, as the product is
            if p_activated is not None:
                put(p_activated, b_activated, i_m, i_column, o, m, TMA_OUT)
            put(p_dpre, b_dpre, i_m, i_column, o, m, TMA_OUT)
            if p_partial is not None:
                tl.store(p_partial + i_row * N + o_n, tl.sum(b_dpre, 0), mask=o_n < N)
