"""The kernels of add_layer_norm.py, which says how they are laid out."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.common import rounded, sum_rows


@triton.jit
def _row_offset(i_row, tokens, stride_b, stride_n):
    """Where rows of a [B, N, D] tensor begin, in elements."""
    return tl.cast(i_row // tokens, tl.int64) * stride_b + tl.cast(i_row % tokens, tl.int64) * stride_n


@triton.jit
def _vector(p, i_sample, o_d, m_d, D: tl.constexpr, BY_SAMPLE: tl.constexpr):
    """A vector [D], or a sample's row of [B, D]."""
    if BY_SAMPLE:
        p += tl.cast(i_sample, tl.int64) * D
    return tl.load(p + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def add_layer_norm_forward(
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
    WEIGHT_BY_SAMPLE: tl.constexpr,
    SCALE_BY_SAMPLE: tl.constexpr,
):
    """Without p_mean, an RMSNorm."""
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
                b_branch += _vector(p_branch_bias, 0, o_d, m_d, D, False)
            if p_scale is not None:
                b_branch *= _vector(p_scale, i_row // tokens, o_d, m_d, D, SCALE_BY_SAMPLE)
            if p_row_scale is not None:
                b_branch *= tl.load(p_row_scale + i_row // tokens).to(tl.float32)
            b_total = rounded(b_x + b_branch, p_total.dtype.element_ty)
            tl.store(p_total + o_out, b_total, mask=m_d)
            b_x = b_total.to(tl.float32)  # normed belongs to the total that is stored
        # the operator's division is off by up to two units in the last place
        if p_mean is not None:
            b_mean = tl.div_rn(tl.sum(b_x, 0), 1.0 * D)
            b_x = tl.where(m_d, b_x - b_mean, 0.0)
        b_rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(b_x * b_x, 0), 1.0 * D) + eps))
        b_x = b_x * b_rstd
        if p_weight is not None:
            b_x *= _vector(p_weight, i_row // tokens, o_d, m_d, D, WEIGHT_BY_SAMPLE)
        if p_bias is not None:
            b_x += _vector(p_bias, i_row // tokens, o_d, m_d, D, WEIGHT_BY_SAMPLE)
        tl.store(p_normed + o_out, rounded(b_x, p_normed.dtype.element_ty), mask=m_d)
        if p_mean is not None:
            tl.store(p_mean + i_row, b_mean)
        tl.store(p_rstd + i_row, b_rstd)


@triton.jit
def add_layer_norm_backward(
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
    programs,
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
    WEIGHT_BY_SAMPLE: tl.constexpr,
    SCALE_BY_SAMPLE: tl.constexpr,
):
    """Gradients of the rows, and this program's share of each vector's gradient: its row of [programs of all, D].

    All programs walk all rows together; where a vector has a row for each sample, `programs` of them walk one sample's.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_sample = 0
    if WEIGHT_BY_SAMPLE or SCALE_BY_SAMPLE:
        i_sample = tl.program_id(0) // programs
    if p_weight is not None:
        b_weight = _vector(p_weight, i_sample, o_d, m_d, D, WEIGHT_BY_SAMPLE)[None, :]
    b_dweight = tl.zeros([BLOCK_D], tl.float32)
    b_dbias = tl.zeros([BLOCK_D], tl.float32)
    b_dbranch_bias = tl.zeros([BLOCK_D], tl.float32)
    b_dscale = tl.zeros([BLOCK_D], tl.float32)

    i_begin = tl.program_id(0) * ROWS
    i_end = rows
    step = tl.num_programs(0) * ROWS
    if WEIGHT_BY_SAMPLE or SCALE_BY_SAMPLE:
        i_begin = i_sample * tokens + tl.program_id(0) % programs * ROWS
        i_end = (i_sample + 1) * tokens
        step = programs * ROWS
    for i_first in tl.range(i_begin, i_end, step, num_stages=STAGES):
        i_row = i_first + tl.arange(0, ROWS)
        m_row = i_row < i_end
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
            if p_mean is not None:
                b_total -= tl.load(p_mean + i_row, mask=m_row, other=0.0)[:, None]
            b_rstd = tl.load(p_rstd + i_row, mask=m_row, other=0.0)[:, None]
            b_normalised = b_total * b_rstd
            b_inner = b_dnormed
            if p_weight is not None:
                b_inner *= b_weight
            if p_mean is not None:
                b_shift = tl.div_rn(tl.sum(b_inner, 1), 1.0 * D)[:, None]
            b_slope = tl.div_rn(tl.sum(b_inner * b_normalised, 1), 1.0 * D)[:, None]
            if p_mean is not None:
                b_inner -= b_shift
            b_g = (b_inner - b_normalised * b_slope) * b_rstd
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
            b_dbranch *= _vector(p_scale, i_sample, o_d, m_d, D, SCALE_BY_SAMPLE)[None, :]
        if p_dbranch is not None:
            tl.store(p_dbranch + o_out, rounded(b_dbranch, p_dbranch.dtype.element_ty), mask=m)
        if p_dbranch_bias is not None:
            b_dbranch_bias += tl.sum(b_dbranch, 0)
        if p_branch is not None:
            o_branch = _row_offset(i_row, tokens, stride_branch_b, stride_branch_n)[:, None]
            o_branch += o_d.to(tl.int64)[None, :] * stride_branch_d
            b_branch = tl.load(p_branch + o_branch, mask=m, other=0.0).to(tl.float32)
            if p_branch_bias is not None:
                b_branch += _vector(p_branch_bias, 0, o_d, m_d, D, False)[None, :]
            if p_dscale is not None:
                b_dscale += tl.sum(b_row * b_branch, 0)
            if p_drow_scale is not None:
                if p_scale is not None:
                    b_branch *= _vector(p_scale, i_sample, o_d, m_d, D, SCALE_BY_SAMPLE)[None, :]
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
def _sum_one(
    p_partial, p_out, i_sample, samples, programs, o_d, m_d, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
):  # fmt: skip
    """[samples * programs, D] to [samples, D], or to [D] by the first sample's program."""
    if p_out is not None:
        if BY_SAMPLE:
            b_sum = sum_rows(p_partial, i_sample * programs, (i_sample + 1) * programs, o_d, m_d, D, 1, BLOCK_R)
            o_out = tl.cast(i_sample, tl.int64) * D + o_d
            tl.store(p_out + o_out, rounded(b_sum, p_out.dtype.element_ty), mask=m_d)
        elif i_sample == 0:
            b_sum = sum_rows(p_partial, 0, samples * programs, o_d, m_d, D, 1, BLOCK_R)
            tl.store(p_out + o_d, rounded(b_sum, p_out.dtype.element_ty), mask=m_d)


@triton.jit
def add_layer_norm_sum(
    p_weight,
    p_bias,
    p_branch_bias,
    p_scale,
    p_dweight,
    p_dbias,
    p_dbranch_bias,
    p_dscale,
    samples,
    programs,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHT_BY_SAMPLE: tl.constexpr,
    SCALE_BY_SAMPLE: tl.constexpr,
):
    """Sum the programs' shares, [samples * programs, D] each; one launch for all vectors, one of them a program."""
    tiles = tl.cdiv(D, BLOCK_C)
    i_sample = tl.program_id(0) // tiles
    o_d = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    i_vector = tl.program_id(1)
    if i_vector == 0:
        _sum_one(p_weight, p_dweight, i_sample, samples, programs, o_d, m_d, D, BLOCK_R, WEIGHT_BY_SAMPLE)
    elif i_vector == 1:
        _sum_one(p_bias, p_dbias, i_sample, samples, programs, o_d, m_d, D, BLOCK_R, WEIGHT_BY_SAMPLE)
    elif i_vector == 2:
        _sum_one(p_branch_bias, p_dbranch_bias, i_sample, samples, programs, o_d, m_d, D, BLOCK_R, False)
    else:
        _sum_one(p_scale, p_dscale, i_sample, samples, programs, o_d, m_d, D, BLOCK_R, SCALE_BY_SAMPLE)
