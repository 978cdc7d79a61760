"""What the kernels of mlp.py and glu_mlp.py share: activations, and tiles of a product."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.common import dot

# ------------------------------------------------------------------------------------------------------ activations


@triton.jit
def _reciprocal(x, EXACT: tl.constexpr):
    """1 / x for x >= 1: a division is nine instructions, this is two, and some ulp off."""
    if EXACT:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """The normal distribution's cdf, and exp(-x^2 / 2)."""
    decay = tl.exp2(x * x * -0.7213475204444817)  # log2(e) / 2
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:  # Abramowitz and Stegun 7.1.26, halved: 1.5e-7 off, far below what 16 bits hold
        t = _reciprocal(1.0 + 0.23164188 * tl.abs(x), EXACT)
        p = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * p * decay
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return cdf, decay


@triton.jit
def _gated(x, u, du, EXACT: tl.constexpr):
    """x * sigmoid(u(x)) and its derivative."""
    gate = _reciprocal(1.0 + tl.exp2(u * -1.4426950408889634), EXACT)
    return x * gate, gate + x * du * (gate * (1.0 - gate))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of float32 numbers and its derivative; the compiler drops the one that is not used."""
    if ACTIVATION == "gelu":
        cdf, decay = _normal_cdf(x, EXACT)
        return x * cdf, cdf + x * decay * 0.3989422804014327  # 1 / sqrt(2 pi)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(v)) / 2 is sigmoid(2 v), v being sqrt(2 / pi) (x + 0.044715 x^3)
        square = x * x
        u, du = (
            x * (1.5957691216057308 + 0.07135481627260025 * square),
            1.5957691216057308 + 0.21406444881780074 * square,
        )
        return _gated(x, u, du, EXACT)
    elif ACTIVATION == "quick_gelu":
        return _gated(x, 1.702 * x, 1.702, EXACT)
    else:
        return _gated(x, x, 1.0, EXACT)


# ------------------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load(p, i_r, i_c, rows, columns, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix, with zeros past its edges; p is a tensor descriptor where the copy engine (TMA) loads."""
    if TMA:
        return p.load([i_r, i_c])
    else:
        o_r = i_r + tl.arange(0, ROWS)
        o_c = i_c + tl.arange(0, COLUMNS)
        o = o_r.to(tl.int64)[:, None] * stride_r + o_c.to(tl.int64)[None, :] * stride_c
        return tl.load(p + o, mask=(o_r < rows)[:, None] & (o_c < columns)[None, :], other=0.0)


@triton.jit
def put(p, b, i_r, i_c, o, m, TMA: tl.constexpr):
    """Store a tile; p is a tensor descriptor where the copy engine stores, which keeps to the matrix by itself."""
    if TMA:
        p.store([i_r, i_c], b.to(p.dtype))
    else:
        tl.store(p + o, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def place(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, column by column, so that L2 holds what they share."""
    i_first = i_tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - i_first, GROUP)
    i_inside = i_tile % (GROUP * tiles_n)
    return i_first + i_inside % height, i_inside // height


@triton.jit
def product(
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
    B_ROWS: tl.constexpr,
):
    """A tile of a b^T in float32. B_ROWS says what b's rows are: "n" for a weight [N, K], "k" for one [K, N]."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in tl.range(0, K, BLOCK_K):
        b_a = load(p_a, i_m, i_k, M, K, stride_a_m, stride_a_k, BLOCK_M, BLOCK_K, TMA)
        if B_ROWS == "n":
            b_b = load(p_b, i_n, i_k, N, K, stride_b_n, stride_b_k, BLOCK_N, BLOCK_K, TMA).T
        else:
            b_b = load(p_b, i_k, i_n, K, N, stride_b_k, stride_b_n, BLOCK_K, BLOCK_N, TMA)
        b_acc = dot(b_a, b_b, b_acc)
    return b_acc


@triton.jit
def _halves(b):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def pieces(b, PIECES: tl.constexpr):
    """A tile as 1, 2 or 4 pieces, left to right: the epilogue then holds a piece's numbers at a time, not a tile's."""
    if PIECES == 1:
        return (b,)
    elif PIECES == 2:
        return _halves(b)
    else:
        b_left, b_right = _halves(b)
        return _halves(b_left) + _halves(b_right)
