"""rotary on CUDA: one pass over q or k each way, bound by memory.

A program holds the sines and cosines of a few tokens in registers and walks some of their heads: 4 bytes an element
come and go in bfloat16, and 8 more for sines and cosines, which all images share, come out of L2 once for those heads.
Backward is the same kernel with the sines exchanged within each pair and negated.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import rounded
from vitkernels.kernels.configs import Capability, RotaryTile
from vitkernels.kernels.launch import cdiv, launch, next_power_of_2
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing
from vitkernels.ops.attention import _heads_last
from vitkernels.ops.rotary import why_not_fused


@triton.jit
def load_pairs(p, o_row, m_row, stride_k, K: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """First and second of each pair in the rows that begin at o_row, in float32."""
    if HALF:
        o_k = tl.arange(0, BLOCK_K // 2)
        m = m_row[:, None] & (o_k < K // 2)[None, :]
        o = o_row[:, None] + o_k.to(tl.int64)[None, :] * stride_k
        b_first = tl.load(p + o, mask=m, other=0.0)
        b_second = tl.load(p + o + tl.full([], K // 2, tl.int64) * stride_k, mask=m, other=0.0)
    else:
        o_k = tl.arange(0, BLOCK_K)
        m = m_row[:, None] & (o_k < K)[None, :]
        b_both = tl.load(p + o_row[:, None] + o_k.to(tl.int64)[None, :] * stride_k, mask=m, other=0.0)
        b_first, b_second = tl.split(tl.reshape(b_both, [o_row.shape[0], BLOCK_K // 2, 2]))
    return b_first.to(tl.float32), b_second.to(tl.float32)


@triton.jit
def store_pairs(p, o_row, m_row, b_first, b_second, K: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """Write pairs to the packed rows that begin at o_row, rounded to what lies there."""
    b_first = rounded(b_first, p.dtype.element_ty)
    b_second = rounded(b_second, p.dtype.element_ty)
    if HALF:
        o_k = tl.arange(0, BLOCK_K // 2)
        m = m_row[:, None] & (o_k < K // 2)[None, :]
        tl.store(p + o_row[:, None] + o_k[None, :], b_first, mask=m)
        tl.store(p + o_row[:, None] + o_k[None, :] + K // 2, b_second, mask=m)
    else:
        o_k = tl.arange(0, BLOCK_K)
        m = m_row[:, None] & (o_k < K)[None, :]
        b_both = tl.reshape(tl.join(b_first, b_second), [o_row.shape[0], BLOCK_K])
        tl.store(p + o_row[:, None] + o_k[None, :], b_both, mask=m)


@triton.jit
def turn(b_first, b_second, b_sin_first, b_sin_second, b_cos_first, b_cos_second, BACKWARD: tl.constexpr):
    if BACKWARD:
        b_turned_first = b_first * b_cos_first + b_second * b_sin_second
        b_turned_second = b_second * b_cos_second - b_first * b_sin_first
    else:
        b_turned_first = b_first * b_cos_first - b_second * b_sin_first
        b_turned_second = b_second * b_cos_second + b_first * b_sin_second
    return b_turned_first, b_turned_second


@triton.jit
def rotary_kernel(
    p_x,
    p_sin,
    p_cos,
    p_out,
    rows,
    tokens,
    heads,
    prefix,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    stride_x_k,
    stride_sin_b,
    stride_sin_h,
    stride_sin_n,
    stride_sin_k,
    stride_cos_b,
    stride_cos_h,
    stride_cos_n,
    stride_cos_k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Some heads of some tokens; SHARED says that sines and cosines are those of every head."""
    i_row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m_row = i_row < rows
    i_b = (i_row // tokens).to(tl.int64)
    i_n = i_row % tokens
    m_place = m_row & (i_n >= prefix)
    i_place = (i_n - prefix).to(tl.int64)
    o_sin = i_b * stride_sin_b + i_place * stride_sin_n
    o_cos = i_b * stride_cos_b + i_place * stride_cos_n
    o_x = i_b * stride_x_b + i_n.to(tl.int64) * stride_x_n
    if SHARED:
        b_sin_first, b_sin_second = load_pairs(p_sin, o_sin, m_place, stride_sin_k, K, BLOCK_K, HALF)
        b_cos_first, b_cos_second = load_pairs(p_cos, o_cos, m_place, stride_cos_k, K, BLOCK_K, HALF)

    i_head_first = tl.program_id(1) * HEADS
    for i_head in tl.range(i_head_first, tl.minimum(i_head_first + HEADS, heads)):
        i_h = tl.cast(i_head, tl.int64)
        if not SHARED:
            o_sin_h = o_sin + i_h * stride_sin_h
            o_cos_h = o_cos + i_h * stride_cos_h
            b_sin_first, b_sin_second = load_pairs(p_sin, o_sin_h, m_place, stride_sin_k, K, BLOCK_K, HALF)
            b_cos_first, b_cos_second = load_pairs(p_cos, o_cos_h, m_place, stride_cos_k, K, BLOCK_K, HALF)
        b_first, b_second = load_pairs(p_x, o_x + i_h * stride_x_h, m_row, stride_x_k, K, BLOCK_K, HALF)
        b_turned_first, b_turned_second = turn(
            b_first, b_second, b_sin_first, b_sin_second, b_cos_first, b_cos_second, BACKWARD
        )
        # the prefix is copied, not turned by 0: what is infinite there stays so
        b_first = tl.where(m_place[:, None], b_turned_first, b_first)
        b_second = tl.where(m_place[:, None], b_turned_second, b_second)
        store_pairs(p_out, (i_row.to(tl.int64) * heads + i_h) * K, m_row, b_first, b_second, K, BLOCK_K, HALF)


def why_not_width(width: int) -> str | None:
    widest = configs.ROTARY.widest("width")
    if width > widest:
        return f"the kernels hold heads in registers, at most {widest} wide, and the last axis has {width}"
    return None


def why_not(direction: str, call: Any) -> str | None:
    return why_not_width((call.x if direction == "forward" else call.dout).shape[-1]) or why_not_fused(direction, call)


def strides_of(positions: Tensor) -> list[int]:
    """0 along the axes where one serves all."""
    return [0 if size == 1 else stride for size, stride in zip(positions.shape, positions.stride(), strict=True)]


def _turned(x: Tensor, sin: Tensor, cos: Tensor, prefix: int, half: bool, backward: bool) -> Tensor:
    out = _heads_last(x)
    batch, heads, tokens, width = x.shape
    if out.numel():
        tile = configs.ROTARY.pick(capability(x.device), width=width)
        launch(
            rotary_kernel,
            (cdiv(batch * tokens, tile.tokens), cdiv(heads, tile.heads)),
            x,
            sin,
            cos,
            out,
            batch * tokens,
            tokens,
            heads,
            prefix,
            *x.stride(),
            *strides_of(sin),
            *strides_of(cos),
            K=width,
            BLOCK_K=next_power_of_2(width),
            TOKENS=tile.tokens,
            HEADS=tile.heads,
            HALF=half,
            BACKWARD=backward,
            SHARED=sin.shape[1] == cos.shape[1] == 1,
            num_warps=tile.warps,
        )
    return out


def forward(x: Tensor, sin: Tensor, cos: Tensor, prefix: int, half: bool) -> Tensor:
    return _turned(x, sin, cos, prefix, half, False)


def backward(
    dout: Tensor, x: Tensor | None, sin: Tensor, cos: Tensor, prefix: int, half: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _turned(dout, sin, cos, prefix, half, True) if needs[0] else nothing(dout)
    return dx, nothing(dout), nothing(dout)


# -------------------------------------------------------------------------------------------------------- the audit

_BATCH, _TOKENS, _HEADS = 256, 197, 12  # of ViT-B/16 at 224


def _variant(tile: RotaryTile, width: int, dtype: str, half: bool, backward: bool, shared: bool) -> Variant:
    """The kernel at a row of its table, on q cut from a packed projection."""
    integers = [arg for arg in rotary_kernel.arg_names if arg.startswith("stride")]
    types = {"p_x": f"*{dtype}", "p_sin": "*fp32", "p_cos": "*fp32", "p_out": f"*{dtype}"}
    types |= dict.fromkeys(("rows", "tokens", "heads", "prefix", *integers), "i32")
    constants: dict[str, Any] = {arg: 1 for arg in integers if arg.endswith("_k")}
    constants |= {"K": width, "BLOCK_K": next_power_of_2(width), "TOKENS": tile.tokens, "HEADS": tile.heads}
    constants |= {"HALF": half, "BACKWARD": backward, "SHARED": shared}
    elements, size = _BATCH * _TOKENS * _HEADS * width, 4 if dtype == "fp32" else 2
    return Variant(
        name=f"rotary {'backward' if backward else 'forward'}, {'halves' if half else 'pairs'}"
        f"{'' if shared else ' of each head'}, {dtype}, {_BATCH}x{_TOKENS}x{_HEADS}x{width}",
        kernel=rotary_kernel,
        signature={arg: each for arg, each in types.items() if arg not in constants},
        constants=constants,
        num_warps=tile.warps,
        divisible=tuple(arg for arg in integers if arg not in constants),
        moved=float(2 * size * elements + 8 * _TOKENS * width * (1 if shared else _HEADS)),
    )


def variants(capability: Capability) -> list[Variant]:
    """Each row of the table in bfloat16, each way, with both kinds of pairs; a padded head, float32, heads apart."""
    found = [
        _variant(row.tile, row.limits["width"], "bf16", half, backward, True)
        for row in configs.ROTARY.of(capability)
        for half in (False, True)
        for backward in (False, True)
    ]
    for half in (False, True):
        found += [
            _variant(configs.ROTARY.pick(capability, width=88), 88, "bf16", half, False, True),
            _variant(configs.ROTARY.pick(capability, width=64), 64, "fp32", half, False, True),
            _variant(configs.ROTARY.pick(capability, width=64), 64, "bf16", half, False, False),
        ]
    return found
