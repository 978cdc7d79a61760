"""Triton kernels of patch_embed: products that read or write their patches where the image has them."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.common import dot

# -------------------------------------------------------------------------------------------------------- the gather


@triton.jit
def _patch_rows(
    o_row, p_keep, count, tokens, prefixes, across, last, stride_b, stride_y, stride_x, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """For rows of [B, R + tokens]: image, patch (below 0 in prefix rows), first pixel, whether it is a patch at all."""
    i_image = (o_row // (prefixes + tokens)).to(tl.int64)
    i_patch = o_row % (prefixes + tokens) - prefixes
    m_patch = (i_patch >= 0) & (o_row < count)
    if p_keep is not None:
        i_kept = tl.load(p_keep + i_image * tokens + i_patch, mask=m_patch, other=0)
        i_kept = tl.minimum(tl.maximum(i_kept, 0), last)  # on a GPU nobody has looked whether they are in range
        i_patch = tl.where(m_patch, i_kept.to(tl.int32), i_patch)
    i_down, i_across = (i_patch // across).to(tl.int64), (i_patch % across).to(tl.int64)
    o_first = i_image * stride_b + i_down * (ROWS * stride_y) + i_across * (COLUMNS * stride_x)
    return i_image, i_patch, o_first, m_patch


@triton.jit
def _patch_columns(
    o_k, stride_c, stride_y, stride_x, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """For positions in a padded patch: channel, offset from its first pixel, whether it is a pixel and no padding."""
    i_line, i_x = o_k // PITCH, o_k % PITCH
    i_channel, i_y = i_line // ROWS, i_line % ROWS
    o_pixel = i_channel.to(tl.int64) * stride_c + i_y.to(tl.int64) * stride_y + i_x.to(tl.int64) * stride_x
    m_pixel = i_line < CHANNELS * ROWS
    if PITCH != COLUMNS:
        m_pixel = m_pixel & (i_x < COLUMNS)
    return i_channel, o_pixel, m_pixel


@triton.jit
def _of_channel(i_channel, values, CHANNELS: tl.constexpr):
    """values[i_channel], for a tuple of numbers."""
    chosen = tl.zeros_like(i_channel).to(tl.float32)
    for i in tl.static_range(CHANNELS):
        chosen = tl.where(i_channel == i, values[i], chosen)
    return chosen


@triton.jit
def _pixels(
    p_image, o_first, o_pixel, mask, i_channel, factors, offsets, CHANNELS: tl.constexpr, NORMALIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of pixels, normalised, in DTYPE; finite where masked."""
    pixels = tl.load(p_image + o_first[:, None] + o_pixel[None, :], mask=mask, other=0)
    if NORMALIZE:
        factor = _of_channel(i_channel, factors, CHANNELS)
        offset = _of_channel(i_channel, offsets, CHANNELS)
        pixels = pixels.to(tl.float32) * factor[None, :] + offset[None, :]
    return pixels.to(DTYPE)


# ------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def embed(
    p_image, p_weight, p_bias, p_prefix, p_pos, p_keep, p_out, factors, offsets, count, tokens, prefixes, across, last,
    first, stride_b, stride_c, stride_y, stride_x, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PITCH: tl.constexpr, SIZE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of the result, prefix rows among them; row i_patch + first of the position table belongs to a patch."""
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N  # neighbours share their patches
    o_row = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row, m_d = o_row < count, o_d < WIDTH
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    _, i_patch, o_first, m_patch = _patch_rows(
        o_row, p_keep, count, tokens, prefixes, across, last, stride_b, stride_y, stride_x, ROWS, COLUMNS
    )
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, SIZE, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        i_channel, o_pixel, m_pixel = _patch_columns(o_k, stride_c, stride_y, stride_x, CHANNELS, ROWS, COLUMNS, PITCH)
        b_pixels = _pixels(
            p_image, o_first, o_pixel, m_patch[:, None] & m_pixel[None, :], i_channel, factors, offsets, CHANNELS,
            NORMALIZE, DTYPE,
        )  # fmt: skip
        b_weight = tl.load(p_weight + o_d[None, :] * SIZE + o_k[:, None], mask=m_d[None, :], other=0)
        acc = dot(b_pixels, b_weight, acc)
    if p_bias is not None:
        acc += tl.load(p_bias + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
    b_out = acc.to(DTYPE).to(tl.float32)  # as nn.Conv2d hands it on; positions of a wider dtype widen it again
    if p_prefix is not None:
        o_prefix = (i_patch + prefixes)[:, None] * WIDTH + o_d[None, :]
        m_prefix = (i_patch < 0)[:, None] & m_row[:, None] & m_d[None, :]
        b_prefix = tl.load(p_prefix + o_prefix, mask=m_prefix, other=0).to(tl.float32)
        b_out = tl.where(m_prefix, b_prefix, b_out)
    mask = m_row[:, None] & m_d[None, :]
    if p_pos is not None:
        i_pos = i_patch + first
        o_pos = i_pos.to(tl.int64)[:, None] * WIDTH + o_d[None, :]
        b_out += tl.load(p_pos + o_pos, mask=mask & (i_pos >= 0)[:, None], other=0).to(tl.float32)
    p_tile = p_out + o_row.to(tl.int64)[:, None] * WIDTH + o_d[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    p_dout, p_image, p_keep, p_parts, factors, offsets, count, tokens, prefixes, across, last, steps, stride_gb,
    stride_gt, stride_gd, stride_b, stride_c, stride_y, stride_x, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr, SIZE: tl.constexpr, NORMALIZE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dout^T patches, in DTYPE, over one part of the rows, `steps` blocks of BLOCK_K each: [parts, WIDTH, SIZE]."""
    o_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_part = tl.program_id(2)
    i_channel, o_pixel, m_pixel = _patch_columns(o_k, stride_c, stride_y, stride_x, CHANNELS, ROWS, COLUMNS, PITCH)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(steps):
        o_row = (i_part * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        i_image, _, o_first, m_patch = _patch_rows(
            o_row, p_keep, count, tokens, prefixes, across, last, stride_b, stride_y, stride_x, ROWS, COLUMNS
        )
        b_pixels = _pixels(
            p_image, o_first, o_pixel, m_patch[:, None] & m_pixel[None, :], i_channel, factors, offsets, CHANNELS,
            NORMALIZE, DTYPE,
        )  # fmt: skip
        o_token = i_image * stride_gb + (o_row % (prefixes + tokens)).to(tl.int64) * stride_gt
        p_tile = p_dout + o_token[:, None] + o_d.to(tl.int64)[None, :] * stride_gd
        b_dout = tl.load(p_tile, mask=m_patch[:, None] & (o_d < WIDTH)[None, :], other=0)
        acc = dot(tl.trans(b_dout), b_pixels, acc)
    o_part = (i_part * WIDTH + o_d).to(tl.int64)[:, None] * SIZE + o_k[None, :]
    tl.store(p_parts + o_part, acc, mask=(o_d < WIDTH)[:, None] & (o_k < SIZE)[None, :])


@triton.jit
def image_gradient(
    p_dout, p_weight, p_dimage, factors, count, tokens, across, height, stride_gb, stride_gt, stride_gd,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dout weight, of one dtype, rounded to it as the patches were, stored into a contiguous image."""
    TILES: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    o_k = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    line = across * COLUMNS
    i_channel, o_pixel, m_pixel = _patch_columns(o_k, height * line, line, 1, CHANNELS, ROWS, COLUMNS, PITCH)
    i_image, _, o_first, m_patch = _patch_rows(
        o_row, None, count, tokens, 0, across, 0, CHANNELS * height * line, line, 1, ROWS, COLUMNS
    )
    o_token = i_image * stride_gb + (o_row % tokens).to(tl.int64) * stride_gt
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for d in range(0, WIDTH, BLOCK_K):
        o_d = d + tl.arange(0, BLOCK_K)
        p_tile = p_dout + o_token[:, None] + o_d.to(tl.int64)[None, :] * stride_gd
        b_dout = tl.load(p_tile, mask=m_patch[:, None] & (o_d < WIDTH)[None, :], other=0)
        m_weight = (o_d < WIDTH)[:, None] & (o_k < SIZE)[None, :]
        b_weight = tl.load(p_weight + o_d[:, None] * SIZE + o_k[None, :], mask=m_weight, other=0)
        acc = dot(b_dout, b_weight, acc)
    b_pixels = acc.to(DTYPE).to(tl.float32) * _of_channel(i_channel, factors, CHANNELS)[None, :]
    p_tile = p_dimage + o_first[:, None] + o_pixel[None, :]
    tl.store(p_tile, b_pixels.to(p_dimage.dtype.element_ty), mask=m_patch[:, None] & m_pixel[None, :])


@triton.jit
def sum_tokens(
    p_dout, p_order, p_starts, p_sums, batch, tokens, prefixes, stride_gb, stride_gt, stride_gd, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of a group of tokens: group i is token i of every image or, with an order, the kept ones that it lists."""
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    i_group = tl.program_id(0) // TILES
    o_d = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = 0, batch
    if p_order is not None:
        begin, end = tl.load(p_starts + i_group), tl.load(p_starts + i_group + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i in range(begin, end, BLOCK_M):
        o_member = i + tl.arange(0, BLOCK_M)
        m_member = o_member < end
        if p_order is not None:
            i_token = tl.load(p_order + o_member, mask=m_member, other=0)
            o_token = i_token // tokens * stride_gb + (prefixes + i_token % tokens) * stride_gt
        else:
            o_token = o_member.to(tl.int64) * stride_gb + tl.cast(i_group, tl.int64) * stride_gt
        p_tile = p_dout + o_token[:, None] + o_d.to(tl.int64)[None, :] * stride_gd
        acc += tl.load(p_tile, mask=m_member[:, None] & (o_d < WIDTH)[None, :], other=0).to(tl.float32)
    p_group = p_sums + tl.cast(i_group, tl.int64) * WIDTH + o_d
    tl.store(p_group, tl.sum(acc, 0).to(p_sums.dtype.element_ty), mask=o_d < WIDTH)
