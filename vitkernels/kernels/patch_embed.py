"""patch_embed in Triton: the projection reads its patches from the image, so they are never in memory unfolded.

    forward          one kernel: gather, normalise, product, bias, prefix and positions, straight into [B, R + N, D]
    weight           one kernel: the same gather against dout, partial sums over parts of the batch, then their sum
    image            one kernel: dout times weight, stored where the pixels lie; each pixel has one writer
    the others       one pass over dout: its sums over the batch for each row of the position table

A patch's pixels are one axis of the product, (c, y, x), with x padded to a power of two so that a thread's loads stay
whole; the weight gets the same padding, of zeros. Workspace: a padded copy of the weight where padding is needed, and
for its gradient one float32 copy of the weight for each part of the batch. Nothing is atomic, all is repeatable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import dot, processors
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

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
    o_row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    """dout^T patches over one part of the rows, `steps` blocks of BLOCK_K of them: [parts, WIDTH, SIZE]."""
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
        b_dout = tl.load(p_tile, mask=m_patch[:, None] & (o_d < WIDTH)[None, :], other=0).to(DTYPE)
        acc = dot(tl.trans(b_dout), b_pixels, acc)
    o_part = (i_part * WIDTH + o_d).to(tl.int64)[:, None] * SIZE + o_k[None, :]
    tl.store(p_parts + o_part, acc, mask=(o_d < WIDTH)[:, None] & (o_k < SIZE)[None, :])


@triton.jit
def image_gradient(
    p_dout, p_weight, p_dimage, factors, count, tokens, across, height, stride_gb, stride_gt, stride_gd,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dout weight, rounded to weight's dtype as the patches were, stored into a contiguous image."""
    o_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
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
        b_dout = tl.load(p_tile, mask=m_patch[:, None] & (o_d < WIDTH)[None, :], other=0).to(DTYPE)
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
    i_group = tl.program_id(1)
    o_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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


# ----------------------------------------------------------------------------------------------------- the launchers


@dataclass(frozen=True)
class Patches:
    """Where the patches of a call lie, and how its pixels become numbers."""

    image: Tensor
    weight: Tensor
    keep: Tensor | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    prefixes: int

    @property
    def across(self) -> int:
        return self.image.shape[3] // self.weight.shape[3]

    @property
    def count(self) -> int:
        """Patches of an image."""
        return self.image.shape[2] // self.weight.shape[2] * self.across

    @property
    def tokens(self) -> int:
        """Patches of an image that are kept."""
        return self.count if self.keep is None else self.keep.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the result, over the batch."""
        return self.image.shape[0] * (self.prefixes + self.tokens)

    @property
    def normalize(self) -> bool:
        return self.image.dtype == torch.uint8 or self.mean is not None or self.std is not None

    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(pixel / 255 - mean) / std as a factor and an offset for each channel; only uint8 is divided by 255."""
        channels = self.image.shape[1]
        mean, std = self.mean or [0.0] * channels, self.std or [1.0] * channels
        scale = 255.0 if self.image.dtype == torch.uint8 else 1.0
        return tuple(1 / (s * scale) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))

    def shape(self) -> dict[str, int]:
        """The constants that every kernel of the product takes."""
        return _shape(*self.weight.shape)

    def padded_weight(self) -> Tensor:
        """[WIDTH, SIZE] as `_shape` has it; weight itself where no padding is needed."""
        width, channels, rows, columns = self.weight.shape
        shape = self.shape()
        weight = self.weight if shape["PITCH"] == columns else F.pad(self.weight, (0, shape["PITCH"] - columns))
        weight = weight.reshape(width, channels * rows * shape["PITCH"])
        return F.pad(weight, (0, shape["SIZE"] - weight.shape[1])).contiguous()


def _shape(width: int, channels: int, rows: int, columns: int) -> dict[str, int]:
    pitch = triton.next_power_of_2(columns)
    size = configs.PATCH_EMBED_DEPTH * triton.cdiv(channels * rows * pitch, configs.PATCH_EMBED_DEPTH)
    return {"WIDTH": width, "CHANNELS": channels, "ROWS": rows, "COLUMNS": columns, "PITCH": pitch, "SIZE": size}


def _tile(kernel: str, like: Tensor) -> configs.PatchEmbedTile:
    return configs.patch_embed(kernel, like.dtype == torch.float32, capability(like.device))


def _launch_options(tile: configs.PatchEmbedTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def why_not(direction: str, args: tuple[Any, ...]) -> str | None:
    """A sentence for a call that the kernels cannot serve, or None."""
    image, weight = args[:2] if direction == "forward" else args[1:3]
    tokens = image.shape[0] * (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    if tokens >= 2**31 - 2**16:
        return f"the kernels number rows in 32 bits, and the batch has {tokens} patches"
    return None


def forward(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """vitkernels::patch_embed; an index in keep that is out of range reads the nearest patch."""
    patches = Patches(image, weight, keep, mean, std, 0 if prefix is None else prefix.shape[0])
    dtypes = [tensor.dtype for tensor in (weight, prefix, pos_embed) if tensor is not None]
    out = image.new_empty(
        image.shape[0],
        patches.prefixes + patches.tokens,
        weight.shape[0],
        dtype=functools.reduce(torch.promote_types, dtypes),
    )
    if out.numel() == 0:
        return out
    tile = _tile("embed", weight)
    embed[triton.cdiv(weight.shape[0], tile.columns), triton.cdiv(patches.rows, tile.rows)](
        image,
        patches.padded_weight(),
        _packed(bias),
        _packed(prefix),
        _packed(pos_embed),
        _packed(keep),
        out,
        *patches.affine(),
        patches.rows,
        patches.tokens,
        patches.prefixes,
        patches.across,
        patches.count - 1,
        0 if pos_embed is None else pos_embed.shape[0] - patches.count,
        *image.stride(),
        **patches.shape(),
        NORMALIZE=patches.normalize,
        **_launch_options(tile),
    )
    return out


def backward(
    dout: Tensor,
    image: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    keep: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """vitkernels::patch_embed_backward."""
    patches = Patches(image, weight, keep, mean, std, 0 if prefix is None else prefix.shape[0])
    dimage = dweight = dbias = dprefix = dpos = nothing(weight)
    if needs[0]:
        dimage = _image_gradient(dout, patches)
    if needs[1]:
        dweight = _weight_gradient(dout, patches)
    if needs[2] or needs[3] or needs[4]:
        sums = _sums(dout, patches, by_patch=needs[4])
        if needs[2]:
            dbias = sums[patches.prefixes :].sum(0).to(weight.dtype)
        if needs[3] and prefix is not None:
            dprefix = sums[: patches.prefixes].to(prefix.dtype, copy=True)
        if needs[4] and pos_embed is not None:
            dpos = sums[sums.shape[0] - pos_embed.shape[0] :].to(pos_embed.dtype, copy=True)
    return dimage, dweight, dbias, dprefix, dpos


def _weight_gradient(dout: Tensor, patches: Patches) -> Tensor:
    weight, image, shape = patches.weight, patches.image, patches.shape()
    if dout.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    tile = _tile("weight_gradient", weight)
    grid = triton.cdiv(shape["SIZE"], tile.columns), triton.cdiv(shape["WIDTH"], tile.rows)
    blocks = triton.cdiv(patches.rows, tile.depth)
    steps = triton.cdiv(blocks, max(1, 2 * processors(image.device) // (grid[0] * grid[1])))
    parts = torch.empty(
        triton.cdiv(blocks, steps), shape["WIDTH"], shape["SIZE"], dtype=torch.float32, device=image.device
    )
    weight_gradient[(*grid, parts.shape[0])](
        dout,
        image,
        _packed(patches.keep),
        parts,
        *patches.affine(),
        patches.rows,
        patches.tokens,
        patches.prefixes,
        patches.across,
        patches.count - 1,
        steps,
        *dout.stride(),
        *image.stride(),
        **shape,
        NORMALIZE=patches.normalize,
        DTYPE=_TRITON_DTYPES[weight.dtype],
        **_launch_options(tile),
    )
    width, channels, rows, columns = weight.shape
    lines = parts.sum(0)[:, : channels * rows * shape["PITCH"]].view(width, channels, rows, shape["PITCH"])
    return lines[..., :columns].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)


def _image_gradient(dout: Tensor, patches: Patches) -> Tensor:
    image, weight = patches.image, patches.weight
    dimage = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    if dimage.numel() == 0:
        return dimage
    dpatches = dout[:, patches.prefixes :]
    if patches.keep is not None:  # linear: a patch kept twice gets the product of the sum
        groups = _groups(patches.keep, patches.count, of_image=True)
        dpatches = dout.new_empty(image.shape[0], patches.count, weight.shape[0], dtype=weight.dtype)
        _sum(dout, dpatches, patches, groups)
    tile = _tile("image_gradient", weight)
    shape, rows = patches.shape(), image.shape[0] * patches.count
    image_gradient[triton.cdiv(shape["SIZE"], tile.columns), triton.cdiv(rows, tile.rows)](
        dpatches,
        patches.padded_weight(),
        dimage,
        tuple(1 / s for s in patches.std or [1.0] * image.shape[1]),
        rows,
        patches.count,
        patches.across,
        image.shape[2],
        *dpatches.stride(),
        **shape,
        **_launch_options(tile),
    )
    return dimage


def _sums(dout: Tensor, patches: Patches, by_patch: bool) -> Tensor:
    """Sums over the batch, float32 [R + tokens, D]; with `by_patch` [R + N, D], a kept patch's under its own number."""
    keep = patches.keep if by_patch else None
    rows = patches.prefixes + (patches.tokens if keep is None else patches.count)
    sums = torch.empty(rows, dout.shape[2], dtype=torch.float32, device=dout.device)
    if keep is None:
        _sum(dout, sums, patches)
    else:
        _sum(dout[:, : patches.prefixes], sums[: patches.prefixes], patches)
        _sum(dout, sums[patches.prefixes :], patches, _groups(keep, patches.count, of_image=False))
    return sums


def _groups(keep: Tensor, patches: int, of_image: bool) -> tuple[Tensor, Tensor]:
    """Kept tokens sorted by patch (and, with `of_image`, by image first), and where each patch's begin."""
    number = keep.clamp(0, patches - 1)
    groups = patches
    if of_image:
        number = number + torch.arange(0, len(keep) * patches, patches, device=keep.device).unsqueeze(1)
        groups = len(keep) * patches
    number, order = number.flatten().sort(stable=True)
    return order, torch.searchsorted(number, torch.arange(groups + 1, device=keep.device))


def _sum(dout: Tensor, sums: Tensor, patches: Patches, groups: tuple[Tensor, Tensor] | None = None) -> None:
    if sums.numel() == 0:
        return
    width = dout.shape[2]
    tile = configs.PATCH_EMBED_SUM
    order, starts = groups or (None, None)
    sum_tokens[triton.cdiv(width, tile.columns), sums.numel() // width](
        dout,
        order,
        starts,
        sums,
        dout.shape[0],
        patches.tokens,
        patches.prefixes,
        *dout.stride(),
        WIDTH=width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
    )


# ------------------------------------------------------------------------------------------------------- the audit


def variants(capability: configs.Capability) -> list[Variant]:
    """Every kernel at every config row: B=256 at 224 px, patch 16 and 14; ViT-S, B and L; bf16, uint8 and float32."""
    rows = []
    for patch in (16, 14):
        for width in (384, 768, 1024):
            for image, dtype in (("bf16", "bf16"), ("u8", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
                rows += _variants(capability, patch, width, image, dtype)
    return rows


def _variants(capability: configs.Capability, patch: int, width: int, image: str, dtype: str) -> list[Variant]:
    batch, channels, side = 256, 3, 224
    size = {"u8": 1, "bf16": 2, "fp32": 4}
    down = side // patch
    rows, pixels = batch * down**2, batch * channels * side**2
    out_bytes = batch * (down**2 + 1) * width * size[dtype]
    weight_bytes = width * channels * patch**2 * size[dtype]
    shape = _shape(width, channels, patch, patch)

    # what each argument is, by name; a kernel takes those that it has
    divisible = ("stride_b", "stride_c", "stride_y", "stride_gb", "stride_gt")
    integers = (*divisible, "count", "tokens", "prefixes", "across", "last", "first", "steps", "height", "batch")
    types: dict[str, Any] = dict.fromkeys(integers, "i32")
    types |= {f"p_{each}": f"*{dtype}" for each in ("weight", "bias", "prefix", "pos", "out", "dout")}
    types |= {"p_image": f"*{image}", "p_dimage": f"*{image}", "p_parts": "*fp32", "p_sums": "*fp32"}
    types |= {"factors": ("fp32",) * channels, "offsets": ("fp32",) * channels}
    constants: dict[str, Any] = shape | {"stride_x": 1, "stride_gd": 1, "NORMALIZE": image == "u8"}
    constants |= {"p_keep": None, "p_order": None, "p_starts": None}
    constants |= {"DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}

    def variant(kernel: Any, tile: configs.PatchEmbedTile, moved: float, flops: float, useful: float) -> Variant:
        given = constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
        names = kernel.arg_names
        return Variant(
            f"patch_embed {kernel.__name__} P={patch} D={width} {image} image, {dtype}",
            kernel,
            {name: types[name] for name in names if name in types},
            {name: given[name] for name in names if name in given},
            num_warps=tile.warps,
            num_stages=tile.stages,
            divisible=tuple(name for name in names if name in divisible),
            matrix=bool(useful) and dtype != "fp32",
            moved=moved,
            flops=flops,
            useful=useful,
        )

    def product(kernel: Any, moved: float, m: int, n: int, k: int) -> Variant:
        tile = configs.patch_embed(kernel.__name__, dtype == "fp32", capability)
        flops = 2.0
        for extent, block in ((m, tile.rows), (n, tile.columns), (k, tile.depth)):
            flops *= triton.cdiv(extent, block) * block
        return variant(kernel, tile, moved, flops, 2.0 * rows * width * channels * patch**2)

    image_bytes = pixels * size[image]
    found = [
        product(embed, image_bytes + weight_bytes + out_bytes, rows + batch, width, shape["SIZE"]),
        product(weight_gradient, image_bytes + out_bytes + weight_bytes, width, shape["SIZE"], rows + batch),
        variant(sum_tokens, configs.PATCH_EMBED_SUM, out_bytes, 0.0, 0.0),
    ]
    if image != "u8":
        found.append(product(image_gradient, image_bytes + out_bytes + weight_bytes, rows, shape["SIZE"], width))
    return found
