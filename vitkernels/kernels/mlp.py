"""mlp on CUDA: the activation in the first product's epilogue, its derivative and b1's gradient in the second one's.

    forward    pre = x w1^T + b1, activated = f(pre)         one kernel, stores both (pre where a gradient will come)
               y = activated w2^T + b2                       the vendor's GEMM
    backward   dpre = (dy w2) f'(pre), activated = f(pre)    one kernel, and b1's gradient as a sum for each row of tiles
               dx = dpre w1, dw1 = dpre^T x, dw2 = dy^T activated    the vendor's GEMMs
               db2, db1                                      column sums, of dy and of the tiles' rows

Only pre outlives the forward pass. Why its kernel stores the activation too, at ViT-B's M=50k, D=768, F=3072 on an H100
(3.0 TB/s, 798 TFLOP/s, four warp instructions a cycle on each of 132 multiprocessors):

- Storing it costs 310 MB, 103 us of memory time, in a product of 238 GFLOP, 298 us at peak: 341 operations a byte with
  both stores against a ridge of 266, so a kernel that overlaps its stores hides them. cuBLAS and an elementwise pass
  move 620 MB more, 206 us that nothing hides.
- The other way, to store pre alone and activate while the second product loads its operand, does the activation once
  for each column of output tiles: 155M numbers x 20 instructions x 768 / 128 is 630 us of issue slots, and they stand
  in the loop that feeds the tensor cores.

Backward the same holds: dw2 needs f(pre) as an operand, dpre's kernel has pre in registers, and one more store there is
half of what a pass of its own would move.

float32 is multiplied by the vendor's GEMM, in the precision that torch's settings ask for; the same kernels then read
the product instead of computing it, and use tl.erf.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import column_sum, dot, processors
from vitkernels.kernels.configs import Capability, ProductTile
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing

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
def _activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
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


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load(p, i_r, i_c, rows, columns, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix, with zeros past its edges; p is a tensor descriptor where the copy engine (TMA) loads."""
    if TMA:
        return p.load([i_r, i_c])
    else:
        o_r = i_r + tl.arange(0, ROWS)
        o_c = i_c + tl.arange(0, COLUMNS)
        o = o_r.to(tl.int64)[:, None] * stride_r + o_c.to(tl.int64)[None, :] * stride_c
        return tl.load(p + o, mask=(o_r < rows)[:, None] & (o_c < columns)[None, :], other=0.0)


@triton.jit
def _place(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, column by column, so that L2 holds what they share."""
    i_first = i_tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - i_first, GROUP)
    i_inside = i_tile % (GROUP * tiles_n)
    return i_first + i_inside % height, i_inside // height


@triton.jit
def _product(
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
        b_a = _load(p_a, i_m, i_k, M, K, stride_a_m, stride_a_k, BLOCK_M, BLOCK_K, TMA)
        if B_ROWS == "n":
            b_b = _load(p_b, i_n, i_k, N, K, stride_b_n, stride_b_k, BLOCK_N, BLOCK_K, TMA).T
        else:
            b_b = _load(p_b, i_k, i_n, K, N, stride_b_k, stride_b_n, BLOCK_K, BLOCK_N, TMA)
        b_acc = dot(b_a, b_b, b_acc)
    return b_acc


@triton.jit
def _halves(b):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _pieces(b, PIECES: tl.constexpr):
    """A tile as 1, 2 or 4 pieces, left to right: the epilogue then holds a piece's numbers at a time, not a tile's."""
    if PIECES == 1:
        return (b,)
    elif PIECES == 2:
        return _halves(b)
    else:
        b_left, b_right = _halves(b)
        return _halves(b_left) + _halves(b_right)


@triton.jit
def _forward(
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
):
    """pre = a b^T + bias, activated = f(pre), both [M, N]; without b, a is the product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_m, i_n = _place(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N
        if p_b is None:
            b_acc = _load(p_a, i_m, i_n, M, N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
        else:
            b_acc = _product(
                p_a, p_b, i_m, i_n, M, N, K, stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_M, BLOCK_N, BLOCK_K,
                TMA, "n",
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_pieces = _pieces(b_acc, PIECES)
        for i_piece in tl.static_range(PIECES):
            b_pre = b_pieces[i_piece]
            o_n = i_n + i_piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
            if p_bias is not None:
                b_pre += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            if p_pre is not None:
                tl.store(p_pre + o, b_pre.to(p_pre.dtype.element_ty), mask=m)
            b_activated, _ = _activate(b_pre, ACTIVATION, p_b is None)
            tl.store(p_activated + o, b_activated.to(p_activated.dtype.element_ty), mask=m)


@triton.jit
def _backward(
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
):
    """dpre = (a b) f'(pre), activated = f(pre), and dpre summed over each row of tiles; without b, a is the product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_row, i_n = _place(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_row * BLOCK_M, i_n * BLOCK_N
        if p_b is None:
            b_acc = _load(p_a, i_m, i_n, M, N, stride_a_m, stride_a_k, BLOCK_M, BLOCK_N, False).to(tl.float32)
        else:
            b_acc = _product(
                p_a, p_b, i_m, i_n, M, N, K, stride_a_m, stride_a_k, stride_b_n, stride_b_k, BLOCK_M, BLOCK_N, BLOCK_K,
                TMA, "k",
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_pieces = _pieces(b_acc, PIECES)
        for i_piece in tl.static_range(PIECES):
            o_n = i_n + i_piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            m = (o_m < M)[:, None] & (o_n < N)[None, :]
            o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
            b_pre = tl.load(p_pre + o, mask=m, other=0.0).to(tl.float32)
            b_activated, b_slope = _activate(b_pre, ACTIVATION, p_b is None)
            b_dpre = b_pieces[i_piece] * b_slope  # zero past the edges, as the product is
            if p_activated is not None:
                tl.store(p_activated + o, b_activated.to(p_activated.dtype.element_ty), mask=m)
            tl.store(p_dpre + o, b_dpre.to(p_dpre.dtype.element_ty), mask=m)
            if p_partial is not None:
                tl.store(p_partial + i_row * N + o_n, tl.sum(b_dpre, 0), mask=o_n < N)


# -------------------------------------------------------------------------------------------------------- launchers


def why_not(direction: str, args: tuple[Any, ...]) -> str | None:
    """Nothing is declined."""
    return None


def _suits_tma(matrix: Tensor) -> bool:
    """What the copy engine can address: whole rows, everything on 16 bytes."""
    stride_r, stride_c = matrix.stride()
    size = matrix.element_size()
    return matrix.numel() > 0 and stride_c == 1 and stride_r * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def _tile(table: dict[Capability, ProductTile], rows: int, columns: int, like: Tensor) -> ProductTile:
    if like.dtype == torch.float32:
        return configs.MLP_ELEMENTWISE
    tile = configs.pick_product_tile(table, capability(like.device))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return tile if tiles >= processors(like.device) else configs.MLP_SMALL


def _launch(
    kernel: Any,
    tile: ProductTile,
    a: Tensor,
    b: Tensor | None,
    pointers: tuple[Tensor | None, ...],
    sizes: tuple[int, int, int],
    activation: str,
) -> None:
    """Run a kernel over the tiles of [M, N], sizes being (M, N, K). Forward b is [N, K], backward [K, N]; or None."""
    rows, columns = triton.cdiv(sizes[0], tile.rows), triton.cdiv(sizes[1], tile.columns)
    if rows * columns == 0:
        return
    strides = (*a.stride(), *((0, 0) if b is None else b.stride() if kernel is _forward else b.stride()[::-1]))
    tma = tile.tma and b is not None and _suits_tma(a) and _suits_tma(b)
    if tma:
        block = [tile.columns, tile.inner] if kernel is _forward else [tile.inner, tile.columns]
        a, b = TensorDescriptor.from_tensor(a, [tile.rows, tile.inner]), TensorDescriptor.from_tensor(b, block)
    kernel[(min(rows * columns, tile.programs * processors(pointers[-1].device)),)](
        a,
        b,
        *pointers,
        *sizes,
        *strides,
        ACTIVATION=activation,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.inner,
        PIECES=tile.pieces,
        GROUP=configs.MLP_GROUP,
        TMA=tma,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.maxnreg,
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def _activated(pre: Tensor, activation: str) -> Tensor:
    """f(pre) by the forward kernel, which takes pre for a product that is there."""
    activated = torch.empty_like(pre)
    _launch(_forward, configs.MLP_ELEMENTWISE, pre, None, (None, None, activated), (*pre.shape, 0), activation)
    return activated


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    sizes = (lead.numel(), *w1.shape)
    rows = x.reshape(sizes[0], sizes[2])  # a view, unless the leading axes do not merge into one stride
    if x.dtype == torch.float32:
        pre = _linear(rows, w1, b1)
        activated = _activated(pre, activation)
    else:
        pre = x.new_empty(sizes[:2]) if save else None
        activated = x.new_empty(sizes[:2])
        bias = None if b1 is None else b1.contiguous()  # one row: packing a strided one costs nothing
        tile = _tile(configs.MLP_FORWARD, *sizes[:2], x)
        _launch(_forward, tile, rows, w1, (bias, pre, activated), sizes, activation)
    y = _linear(activated, w2, b2).reshape(*lead, w2.shape[0])
    return y, pre.reshape(*lead, sizes[1]) if save and pre is not None else nothing(x)


def backward(
    dy: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outer, hidden = w2.shape
    count = x.shape[:-1].numel()
    g, rows, pre = dy.reshape(count, outer), x.reshape(count, w1.shape[1]), pre.reshape(count, hidden).contiguous()
    activated = partial = None
    if any(needs[:3]):
        tile = _tile(configs.MLP_BACKWARD, count, hidden, x)
        vendor = x.dtype == torch.float32
        dpre = g @ w2 if vendor else x.new_empty(count, hidden)
        activated = torch.empty_like(pre) if needs[3] else None
        partial = x.new_empty(triton.cdiv(count, tile.rows), hidden, dtype=torch.float32) if needs[2] else None
        a, b = (dpre, None) if vendor else (g, w2)  # the vendor's product turns into dpre where it lies
        _launch(_backward, tile, a, b, (pre, activated, partial, dpre), (count, hidden, outer), activation)
    elif needs[3]:
        activated = _activated(pre, activation)
    return (
        (dpre @ w1).reshape(x.shape) if needs[0] else nothing(x),
        dpre.t() @ rows if needs[1] else nothing(x),
        nothing(x) if partial is None else column_sum(partial, w1.dtype),
        nothing(x) if activated is None else g.t() @ activated,
        column_sum(g, w2.dtype) if needs[4] else nothing(x),
    )


# -------------------------------------------------------------------------------------------------------- the audit


def _variant(
    kernel: Any,
    name: str,
    tile: ProductTile,
    sizes: tuple[int, int, int],
    activation: str,
    tma: bool,
    elementwise: bool = False,
) -> Variant:
    m, n, k = sizes
    vendor = tile.inner == 0
    dtype = "fp32" if vendor else "bf16"
    block = [tile.columns, tile.inner] if kernel is _forward else [tile.inner, tile.columns]
    descriptor = "tensordesc<bf16{}>"
    signature = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.startswith("p_")}
    signature |= {arg: "*fp32" for arg in ("p_partial",) if arg in signature}
    signature |= {arg: "i32" for arg in kernel.arg_names if arg in ("M", "N", "K") or arg.startswith("stride")}
    if tma:
        signature |= {"p_a": descriptor.format([tile.rows, tile.inner]), "p_b": descriptor.format(block)}
    constants = {
        "ACTIVATION": activation, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.inner,
        "PIECES": tile.pieces, "GROUP": configs.MLP_GROUP, "TMA": tma,
        "stride_a_k": 1, "stride_b_k" if kernel is _forward else "stride_b_n": 1,
    }  # fmt: skip
    if vendor:
        constants |= {"p_b": None, "p_bias": None, "p_pre": None} if kernel is _forward else {"p_b": None}
    padded = triton.cdiv(m, tile.rows) * tile.rows * triton.cdiv(n, tile.columns) * tile.columns
    return Variant(
        name=f"mlp {name}, {m}x{n}x{k} {activation}",
        kernel=kernel,
        signature={arg: each for arg, each in signature.items() if arg not in constants},
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.maxnreg,
        divisible=tuple(arg for arg in ("N", "K", "stride_a_m", "stride_b_n", "stride_b_k") if arg not in constants),
        matrix=not vendor,
        flops=0.0 if vendor else 2.0 * padded * k,
        useful=0.0 if vendor else 2.0 * m * n * k,
        moved=0.0,
    )


def variants(capability: Capability) -> list[Variant]:
    sizes = (50432, 3072, 768)
    found = []
    for kernel, name, table in (
        (_forward, "forward", configs.MLP_FORWARD),
        (_backward, "backward", configs.MLP_BACKWARD),
    ):
        tile = configs.pick_product_tile(table, capability)
        found += [_variant(kernel, name, tile, sizes, a, tile.tma) for a in ("gelu", "gelu_tanh")]
        found.append(_variant(kernel, name + " pointers", tile, sizes, "gelu", False))
        found.append(_variant(kernel, name + " small", configs.MLP_SMALL, (256, 3072, 768), "gelu", False))
        found.append(_variant(kernel, name + " fp32", configs.MLP_ELEMENTWISE, sizes, "gelu", False))
    return found
