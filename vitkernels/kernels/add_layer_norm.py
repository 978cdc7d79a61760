"""add_layer_norm on CUDA: one row at a time in registers, one pass over memory each way.

Both kernels are bound by memory: forward reads x and branch and writes total and normed (8 bytes an element in
bfloat16), backward reads total, dtotal and dnormed and writes dx (8 more, 12 with LayerScale's two). So rows are read
in 16-byte loads, each number is touched once, and the row's statistics never leave the registers.

Forward: a program walks a few rows, each in one warp up to a width of 1024, so that sums need shuffles and no barrier.
Backward: as many programs as the chip holds stay for the whole call, each with its own sums of the parameters'
gradients in registers; it writes them once, as one float32 row a vector, and a second kernel sums those rows. No
atomics: the same bits each run.

Tensors are [B, N, D] with any strides; an argument that is not there is None, which Triton compiles away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.kernels import configs
from vitkernels.kernels.common import processors, rounded, sum_rows
from vitkernels.kernels.configs import Capability, RowTile
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing

_SUM_ROWS, _SUM_COLUMNS = 64, 32


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _row_offset(i_row, tokens, stride_b, stride_n):
    """Where rows of a [B, N, D] tensor begin, in elements."""
    return tl.cast(i_row // tokens, tl.int64) * stride_b + tl.cast(i_row % tokens, tl.int64) * stride_n


@triton.jit
def _vector(p, o_d, m_d):
    return tl.load(p + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    p_x,
    p_branch,
    p_weight,
    p_bias,
    p_branch_bias,
    p_scale,
    p_row_scale,
    p_total,
    p_normed,
    p_mean,
    p_rstd,
    rows,
    tokens,
    stride_x_b,
    stride_x_n,
    stride_x_d,
    stride_branch_b,
    stride_branch_n,
    stride_branch_d,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_first = tl.program_id(0) * ROWS
    for i_row in tl.range(i_first, tl.minimum(i_first + ROWS, rows)):
        o_out = tl.cast(i_row, tl.int64) * D + o_d
        o_x = _row_offset(i_row, tokens, stride_x_b, stride_x_n) + o_d.to(tl.int64) * stride_x_d
        b_x = tl.load(p_x + o_x, mask=m_d, other=0.0).to(tl.float32)
        if p_branch is not None:
            o_branch = _row_offset(i_row, tokens, stride_branch_b, stride_branch_n) + o_d.to(tl.int64) * stride_branch_d
            b_branch = tl.load(p_branch + o_branch, mask=m_d, other=0.0).to(tl.float32)
            if p_branch_bias is not None:
                b_branch += _vector(p_branch_bias, o_d, m_d)
            if p_scale is not None:
                b_branch *= _vector(p_scale, o_d, m_d)
            if p_row_scale is not None:
                b_branch *= tl.load(p_row_scale + i_row // tokens).to(tl.float32)
            b_total = rounded(b_x + b_branch, p_total.dtype.element_ty)
            tl.store(p_total + o_out, b_total, mask=m_d)
            b_x = b_total.to(tl.float32)  # normed belongs to the total that is stored
        b_mean = tl.sum(b_x, 0) / D
        b_x = tl.where(m_d, b_x - b_mean, 0.0)
        b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / D + eps)
        b_x = b_x * b_rstd * _vector(p_weight, o_d, m_d)
        if p_bias is not None:
            b_x += _vector(p_bias, o_d, m_d)
        tl.store(p_normed + o_out, rounded(b_x, p_normed.dtype.element_ty), mask=m_d)
        tl.store(p_mean + i_row, b_mean)
        tl.store(p_rstd + i_row, b_rstd)


@triton.jit
def _backward(
    p_dtotal,
    p_dnormed,
    p_total,
    p_branch,
    p_weight,
    p_mean,
    p_rstd,
    p_branch_bias,
    p_scale,
    p_row_scale,
    p_dx,
    p_dbranch,
    p_dweight,
    p_dbias,
    p_dbranch_bias,
    p_dscale,
    p_drow_scale,
    rows,
    tokens,
    stride_dtotal_b,
    stride_dtotal_n,
    stride_dtotal_d,
    stride_dnormed_b,
    stride_dnormed_n,
    stride_dnormed_d,
    stride_total_b,
    stride_total_n,
    stride_total_d,
    stride_branch_b,
    stride_branch_n,
    stride_branch_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the rows, and this program's share of each vector's gradient: its row of [programs, D]."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = _vector(p_weight, o_d, m_d)[None, :]
    b_dweight = tl.zeros([BLOCK_D], tl.float32)
    b_dbias = tl.zeros([BLOCK_D], tl.float32)
    b_dbranch_bias = tl.zeros([BLOCK_D], tl.float32)
    b_dscale = tl.zeros([BLOCK_D], tl.float32)

    for i_first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        i_row = i_first + tl.arange(0, ROWS)
        m_row = i_row < rows
        m = m_row[:, None] & m_d[None, :]
        o_out = i_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)

        if p_dnormed is not None:
            o_total = _row_offset(i_row, tokens, stride_total_b, stride_total_n)[:, None]
            o_total += o_d.to(tl.int64)[None, :] * stride_total_d
            o_dnormed = _row_offset(i_row, tokens, stride_dnormed_b, stride_dnormed_n)[:, None]
            o_dnormed += o_d.to(tl.int64)[None, :] * stride_dnormed_d
            b_total = tl.load(p_total + o_total, mask=m, other=0.0).to(tl.float32)
            b_dnormed = tl.load(p_dnormed + o_dnormed, mask=m, other=0.0).to(tl.float32)
            b_mean = tl.load(p_mean + i_row, mask=m_row, other=0.0)[:, None]
            b_rstd = tl.load(p_rstd + i_row, mask=m_row, other=0.0)[:, None]
            b_normalised = (b_total - b_mean) * b_rstd
            b_inner = b_dnormed * b_weight
            b_shift = tl.sum(b_inner, 1)[:, None] / D
            b_slope = tl.sum(b_inner * b_normalised, 1)[:, None] / D
            b_g = (b_inner - b_shift - b_normalised * b_slope) * b_rstd
            if p_dweight is not None:
                b_dweight += tl.sum(b_dnormed * b_normalised, 0)
            if p_dbias is not None:
                b_dbias += tl.sum(b_dnormed, 0)

        if p_dtotal is not None:
            o_dtotal = _row_offset(i_row, tokens, stride_dtotal_b, stride_dtotal_n)[:, None]
            o_dtotal += o_d.to(tl.int64)[None, :] * stride_dtotal_d
            b_g += tl.load(p_dtotal + o_dtotal, mask=m, other=0.0).to(tl.float32)
        if p_dx is not None:
            tl.store(p_dx + o_out, rounded(b_g, p_dx.dtype.element_ty), mask=m)

        # the branch's side: total = x + row_scale * scale * (branch + branch_bias)
        b_row = b_g
        if p_row_scale is not None:
            b_row *= tl.load(p_row_scale + i_row // tokens, mask=m_row, other=0.0).to(tl.float32)[:, None]
        b_dbranch = b_row
        if p_scale is not None:
            b_dbranch *= _vector(p_scale, o_d, m_d)[None, :]
        if p_dbranch is not None:
            tl.store(p_dbranch + o_out, rounded(b_dbranch, p_dbranch.dtype.element_ty), mask=m)
        if p_dbranch_bias is not None:
            b_dbranch_bias += tl.sum(b_dbranch, 0)
        if p_branch is not None:
            o_branch = _row_offset(i_row, tokens, stride_branch_b, stride_branch_n)[:, None]
            o_branch += o_d.to(tl.int64)[None, :] * stride_branch_d
            b_branch = tl.load(p_branch + o_branch, mask=m, other=0.0).to(tl.float32)
            if p_branch_bias is not None:
                b_branch += _vector(p_branch_bias, o_d, m_d)[None, :]
            if p_dscale is not None:
                b_dscale += tl.sum(b_row * b_branch, 0)
            if p_drow_scale is not None:
                if p_scale is not None:
                    b_branch *= _vector(p_scale, o_d, m_d)[None, :]
                tl.store(p_drow_scale + i_row, tl.sum(b_g * b_branch, 1), mask=m_row)

    o_partial = tl.cast(tl.program_id(0), tl.int64) * D + o_d
    if p_dweight is not None:
        tl.store(p_dweight + o_partial, b_dweight, mask=m_d)
    if p_dbias is not None:
        tl.store(p_dbias + o_partial, b_dbias, mask=m_d)
    if p_dbranch_bias is not None:
        tl.store(p_dbranch_bias + o_partial, b_dbranch_bias, mask=m_d)
    if p_dscale is not None:
        tl.store(p_dscale + o_partial, b_dscale, mask=m_d)


@triton.jit
def _sum_one(p_partial, p_out, programs, o_d, m_d, D: tl.constexpr, BLOCK_R: tl.constexpr):
    if p_out is not None:
        b_sum = sum_rows(p_partial, 0, programs, o_d, m_d, D, 1, BLOCK_R)
        tl.store(p_out + o_d, rounded(b_sum, p_out.dtype.element_ty), mask=m_d)


@triton.jit
def _sum_partials(
    p_weight,
    p_bias,
    p_branch_bias,
    p_scale,
    p_dweight,
    p_dbias,
    p_dbranch_bias,
    p_dscale,
    programs,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the programs' shares, [programs, D] each; one launch for all vectors, one of them a program."""
    o_d = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    i_vector = tl.program_id(1)
    if i_vector == 0:
        _sum_one(p_weight, p_dweight, programs, o_d, m_d, D, BLOCK_R)
    elif i_vector == 1:
        _sum_one(p_bias, p_dbias, programs, o_d, m_d, D, BLOCK_R)
    elif i_vector == 2:
        _sum_one(p_branch_bias, p_dbranch_bias, programs, o_d, m_d, D, BLOCK_R)
    else:
        _sum_one(p_scale, p_dscale, programs, o_d, m_d, D, BLOCK_R)


# -------------------------------------------------------------------------------------------------------- launchers


def why_not(direction: str, args: tuple[Any, ...]) -> str | None:
    width = (args[0] if direction == "forward" else args[2]).shape[-1]
    widest = configs.LAYER_NORM_FORWARD[-1].width
    if width > widest:
        return f"the kernels hold a row in registers, at most {widest} wide, and the last axis has {width}"
    return None


def _as_rows(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The tensor as [B, N, D] with its strides; more axes than that merge, by a copy where strides cannot say it."""
    if tensor is None:
        return None, (0, 0, 1)
    if tensor.dim() > 3:
        tensor = tensor.flatten(1, -2)
    stride_b, stride_n, stride_d = (0, 0, 0, *tensor.stride())[-3:]
    if tensor.dim() == 2:  # [B, D]: each sample is one row
        stride_b, stride_n = stride_n, 0
    return tensor, (stride_b, stride_n, stride_d)


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors of one row: packing a strided one costs nothing beside the rows."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _tokens(x: Tensor) -> int:
    """Rows a sample."""
    return math.prod(x.shape[1:-1])


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = nothing(x) if branch is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    rows, width = mean.numel(), x.shape[-1]
    if rows:
        tile = configs.pick_row_tile(configs.LAYER_NORM_FORWARD, width)
        rows_of_x, strides = _as_rows(x)
        rows_of_branch, branch_strides = _as_rows(branch)
        _forward[(triton.cdiv(rows, tile.rows),)](
            rows_of_x,
            rows_of_branch,
            *_contiguous(weight, bias, branch_bias, scale, row_scale),
            None if branch is None else total,
            normed,
            mean,
            rstd,
            rows,
            _tokens(normed),
            *strides,
            *branch_strides,
            eps,
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            ROWS=tile.rows,
            num_warps=tile.warps,
        )
    return total, normed, mean, rstd


def backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    width, rows, device = total.shape[-1], mean.numel(), total.device
    dtypes = (total.dtype, branch_dtype, weight.dtype, weight.dtype, *(torch.float32,) * 3)
    shapes = (total.shape, total.shape, *((width,),) * 4, mean.shape)
    grads = [
        torch.empty(shape, dtype=dtype, device=device) if need else None
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]
    scaled = needs[5] or needs[6]
    table = configs.LAYER_NORM_BACKWARD_SCALED if scaled else configs.LAYER_NORM_BACKWARD
    tile = configs.pick_row_tile(table, width)
    programs = min(triton.cdiv(rows, tile.rows), tile.programs * processors(device))
    partials = [
        torch.empty(programs, width, dtype=torch.float32, device=device) if need else None for need in needs[2:6]
    ]
    if rows:
        tensors, strides = zip(*map(_as_rows, (dtotal, dnormed, total, branch)), strict=True)
        _backward[(programs,)](
            *tensors,
            *_contiguous(weight, mean, rstd, branch_bias, scale, row_scale),
            *grads[:2],
            *partials,
            grads[6],
            rows,
            _tokens(total),
            *(stride for each in strides for stride in each),
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            ROWS=tile.rows,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    if any(needs[2:6]):
        _sum_partials[(triton.cdiv(width, _SUM_COLUMNS), 4)](
            *partials, *grads[2:6], programs, D=width, BLOCK_R=_SUM_ROWS, BLOCK_C=_SUM_COLUMNS
        )
    if grads[6] is not None:
        grads[6] = grads[6].reshape(total.shape[0], _tokens(total)).sum(1)
    return tuple(nothing(total) if grad is None else grad for grad in grads)


# -------------------------------------------------------------------------------------------------------- the audit

_ROWS = 50432  # of ViT-B/16 at 224, B=256
_WIDTHS = {256: 192, 512: 384, 1024: 768, 2048: 1536, 4096: 3072, 8192: 6144, 16384: 16384}  # a model's in each block


def _variant(kernel: Any, name: str, tile: RowTile, types: dict[str, str], bytes_each: int) -> Variant:
    """A kernel at a row of its table; pointers that have no type are not there, strides are those of whole tensors."""
    width = _WIDTHS[tile.width]
    integers = [arg for arg in kernel.arg_names if arg in ("rows", "tokens") or arg.startswith("stride")]
    constants = {arg: 1 for arg in integers if arg.endswith("_d")}
    constants |= {arg: None for arg in kernel.arg_names if arg.startswith("p_") and arg not in types}
    constants |= {"D": width, "BLOCK_D": tile.width, "ROWS": tile.rows}
    if "STAGES" in kernel.arg_names:
        constants["STAGES"] = tile.stages
    scalars = dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    return Variant(
        name=f"add_layer_norm {name}, {_ROWS}x{width}",
        kernel=kernel,
        signature={
            arg: each for arg, each in (types | scalars).items() if arg in kernel.arg_names if arg not in constants
        },
        constants=constants,
        num_warps=tile.warps,
        divisible=tuple(arg for arg in integers if arg not in constants and arg.startswith("stride")),
        spills=tile.spills,
        moved=float(bytes_each * _ROWS * width),
    )


def variants(capability: Capability) -> list[Variant]:
    """Every row of the tables, with a bfloat16 branch on a bfloat16 and on a float32 residual stream."""
    found = []
    for residual, size in (("bf16", 2), ("fp32", 4)):
        vectors = dict.fromkeys(
            ("p_weight", "p_bias", "p_branch_bias", "p_scale", "p_row_scale", "p_mean", "p_rstd"), "*fp32"
        )
        stream = dict.fromkeys(("p_x", "p_total", "p_dtotal", "p_dx"), f"*{residual}")
        branch = dict.fromkeys(("p_branch", "p_normed", "p_dnormed", "p_dbranch"), "*bf16")
        grads = dict.fromkeys(("p_dweight", "p_dbias", "p_dbranch_bias", "p_dscale", "p_drow_scale"), "*fp32")
        given = vectors | stream | branch | grads
        scaled = ("p_branch", "p_branch_bias", "p_scale", "p_dscale", "p_drow_scale")
        plain = {arg: each for arg, each in given.items() if arg not in scaled}
        for kernel, name, table, pointers, bytes_each in (
            (_forward, "forward", configs.LAYER_NORM_FORWARD, given, 2 * size + 4),
            (_backward, "backward", configs.LAYER_NORM_BACKWARD, plain, 3 * size + 4),
            (_backward, "backward with scale", configs.LAYER_NORM_BACKWARD_SCALED, given, 3 * size + 6),
        ):
            found += [_variant(kernel, f"{name}, {residual} residual", row, pointers, bytes_each) for row in table]
    programs = 3 * 132
    found.append(
        Variant(
            name=f"add_layer_norm sum of {programs} partial sums",
            kernel=_sum_partials,
            signature=dict.fromkeys(_sum_partials.arg_names[:8], "*fp32") | {"programs": "i32"},
            constants={"D": 768, "BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLUMNS},
            moved=4.0 * 4 * programs * 768,
        )
    )
    return found
