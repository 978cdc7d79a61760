"""What at least two pages use: `triton.jit` helpers, and the column sum behind every bias gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.kernels.device import current, interpreting
from vitkernels.kernels.launch import cdiv, launch
from vitkernels.kernels.variants import Variant

# bf16 tl.dot, add and compare are silently wrong in the interpreter: under it, tiles are float32
INTERPRETING: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; float32 operands are multiplied exactly, not as TF32."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


# ------------------------------------------------------------------------------------------------------ column sums

_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 64, 64, 4  # 32 elements a thread: four to eight wide loads in flight each
_SUM_CHUNK = 512  # rows a program sums: eight steps, and enough programs for the chip at any number of columns


@triton.jit
def sum_rows(p_in, i_first, i_end, o_c, m_c, stride_r, stride_c, BLOCK_R: tl.constexpr):
    """Sum over rows i_first .. i_end of the columns o_c, in float32."""
    b_sum = tl.zeros([BLOCK_R, o_c.shape[0]], tl.float32)
    for i_row in tl.range(i_first, i_end, BLOCK_R):
        o_r = i_row + tl.arange(0, BLOCK_R)
        o_in = o_r.to(tl.int64)[:, None] * stride_r + o_c.to(tl.int64)[None, :] * stride_c
        b_sum += tl.load(p_in + o_in, mask=(o_r < i_end)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0)


@triton.jit
def column_sum_kernel(
    p_in,
    p_out,
    rows,
    columns,
    stride_r,
    stride_c,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[chunk, column] = sum of that chunk's rows."""
    i_chunk = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    i_first = i_chunk * CHUNK
    b_sum = sum_rows(p_in, i_first, tl.minimum(i_first + CHUNK, rows), o_c, m_c, stride_r, stride_c, BLOCK_R)
    tl.store(p_out + tl.cast(i_chunk, tl.int64) * columns + o_c, b_sum.to(p_out.dtype.element_ty), mask=m_c)


def column_sum(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of a matrix over its rows, in float32 and rounded once: bias gradients.

    Args:
        matrix: [rows, columns], floating point, any strides.
        dtype: of the result, [columns].
    """
    rows, columns = matrix.shape
    chunks = max(1, cdiv(rows, _SUM_CHUNK))
    out = matrix.new_empty(chunks, columns, dtype=dtype if chunks == 1 else torch.float32)
    if columns:
        launch(
            column_sum_kernel,
            (chunks, cdiv(columns, _SUM_COLUMNS)),  # a grid's second axis ends at 65535
            matrix,
            out,
            rows,
            columns,
            *matrix.stride(),
            CHUNK=_SUM_CHUNK,
            BLOCK_R=_SUM_ROWS,
            BLOCK_C=_SUM_COLUMNS,
            num_warps=_SUM_WARPS,
        )
    return out[0] if chunks == 1 else column_sum(out, dtype)


def column_sum_variant(name: str, rows: int, columns: int, dtype: str) -> Variant:
    """The kernel over a contiguous [rows, columns] matrix, for `make audit`."""
    chunks = max(1, cdiv(rows, _SUM_CHUNK))
    size = 4 if dtype == "fp32" else 2
    return Variant(
        name=f"{name}, column sum {rows}x{columns} {dtype}",
        kernel=column_sum_kernel,
        signature={"p_in": f"*{dtype}", "p_out": "*fp32"} | dict.fromkeys(("rows", "columns", "stride_r"), "i32"),
        constants={"stride_c": 1, "CHUNK": _SUM_CHUNK, "BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLUMNS},
        num_warps=_SUM_WARPS,
        divisible=("columns", "stride_r"),
        moved=size * rows * columns + 4.0 * chunks * columns,
    )


def processors(device: torch.device) -> int:
    """Multiprocessors of a device that launches are for."""
    return current().processors(device)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """A float32 value in the dtype it is stored in, to nearest even, which the interpreter misses for bfloat16."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
