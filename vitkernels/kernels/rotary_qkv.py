"""rotary_qkv on CUDA: one pass over a packed projection each way, bound by memory.

As in `rotary`, a program holds the sines and cosines of a few tokens and walks some of their heads, of q, k or v. The
norm is taken of what it holds anyway. Backward reads the norm's input too; the gradients of weights and biases are sums
over a program's rows, one row of partial sums each, then column sums: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import column_sum
from vitkernels.kernels.configs import Capability, RotaryTile
from vitkernels.kernels.launch import cdiv, launch, next_power_of_2
from vitkernels.kernels.rotary import load_pairs, store_pairs, strides_of, turn, why_not_width
from vitkernels.kernels.variants import Variant
from vitkernels.ops._amp import nothing


@triton.jit
def _load_vector(p, K: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """A weight or bias as pairs, [1, BLOCK_K / 2] each."""
    return load_pairs(p, tl.zeros([1], tl.int64), tl.full([1], 1, tl.int1), 1, K, BLOCK_K, HALF)


@triton.jit
def _mean(b_first, b_second, K: tl.constexpr):
    """Of each row, as [rows, 1]; what is past K is 0."""
    return tl.div_rn(tl.sum(b_first, 1) + tl.sum(b_second, 1), 1.0 * K)[:, None]


@triton.jit
def _normed(b_first, b_second, eps, m_first, m_second, K: tl.constexpr, LAYER: tl.constexpr):
    """Rows without mean and scale, zeros where the masks are not, and the factor that made the scale one."""
    if LAYER:
        b_mean = _mean(b_first, b_second, K)
        b_first = tl.where(m_first, b_first - b_mean, 0.0)
        b_second = tl.where(m_second, b_second - b_mean, 0.0)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(b_first * b_first, b_second * b_second, K) + eps))
    # not 0 * b_rstd: without an eps that is NaN in rows that are not there
    return tl.where(m_first, b_first * b_rstd, 0.0), tl.where(m_second, b_second * b_rstd, 0.0), b_rstd


@triton.jit
def rotary_qkv_kernel(
    p_x, p_input, p_sin, p_cos, p_q_weight, p_q_bias, p_k_weight, p_k_bias, p_out, p_sums,
    rows, tokens, heads, parts, prefix, eps,
    stride_x_b, stride_x_n, stride_x_p, stride_x_h, stride_x_k, stride_in_b, stride_in_n, stride_in_p, stride_in_h,
    stride_in_k, stride_sin_b, stride_sin_h, stride_sin_n, stride_sin_k, stride_cos_b, stride_cos_h, stride_cos_n,
    stride_cos_k, K: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Some heads of q, k or v of some tokens; SHARED says that sines and cosines are those of every head.

    Backward, `p_x` is the gradient that arrives and `p_input` what was normalised; `p_sums`, [q and k, weight and bias,
    programs, K] in float32, gets each program's part of the vectors' gradients.
    """
    i_row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i_part = tl.program_id(2)
    m_row = i_row < rows
    i_b = (i_row // tokens).to(tl.int64)
    i_n = i_row % tokens
    is_turned = i_part < 2  # v is not
    m_place = m_row & (i_n >= prefix) & is_turned
    i_place = (i_n - prefix).to(tl.int64)
    o_x = i_b * stride_x_b + i_n.to(tl.int64) * stride_x_n + tl.cast(i_part, tl.int64) * stride_x_p
    o_pair = tl.arange(0, BLOCK_K // 2)[None, :]
    m_first = m_row[:, None] & ((o_pair < K // 2) if HALF else (2 * o_pair < K))
    m_second = m_row[:, None] & ((o_pair < K // 2) if HALF else (2 * o_pair + 1 < K))
    if p_sin is not None:
        o_sin = i_b * stride_sin_b + i_place * stride_sin_n
        o_cos = i_b * stride_cos_b + i_place * stride_cos_n
        if SHARED:
            b_sin_first, b_sin_second = load_pairs(p_sin, o_sin, m_place, stride_sin_k, K, BLOCK_K, HALF)
            b_cos_first, b_cos_second = load_pairs(p_cos, o_cos, m_place, stride_cos_k, K, BLOCK_K, HALF)
    b_weight_first, b_weight_second = 1.0, 1.0
    b_bias_first, b_bias_second = 0.0, 0.0
    if p_q_weight is not None:
        b_weight_first, b_weight_second = _load_vector(p_q_weight, K, BLOCK_K, HALF)
    if p_k_weight is not None:
        b_k_first, b_k_second = _load_vector(p_k_weight, K, BLOCK_K, HALF)
        b_weight_first = tl.where(i_part == 0, b_weight_first, b_k_first)
        b_weight_second = tl.where(i_part == 0, b_weight_second, b_k_second)
    elif p_q_weight is not None:
        b_weight_first = tl.where(i_part == 0, b_weight_first, 1.0)
        b_weight_second = tl.where(i_part == 0, b_weight_second, 1.0)
    if p_q_bias is not None:
        b_bias_first, b_bias_second = _load_vector(p_q_bias, K, BLOCK_K, HALF)
        b_bias_first = tl.where(i_part == 0, b_bias_first, 0.0)
        b_bias_second = tl.where(i_part == 0, b_bias_second, 0.0)
    if p_k_bias is not None:
        b_k_first, b_k_second = _load_vector(p_k_bias, K, BLOCK_K, HALF)
        b_bias_first += tl.where(i_part == 1, b_k_first, 0.0)
        b_bias_second += tl.where(i_part == 1, b_k_second, 0.0)
    if p_sums is not None:
        b_dw_first, b_dw_second = tl.zeros([BLOCK_K // 2], tl.float32), tl.zeros([BLOCK_K // 2], tl.float32)
        b_db_first, b_db_second = tl.zeros([BLOCK_K // 2], tl.float32), tl.zeros([BLOCK_K // 2], tl.float32)

    i_head_first = tl.program_id(1) * HEADS
    for i_head in tl.range(i_head_first, tl.minimum(i_head_first + HEADS, heads)):
        i_h = tl.cast(i_head, tl.int64)
        b_first, b_second = load_pairs(p_x, o_x + i_h * stride_x_h, m_row, stride_x_k, K, BLOCK_K, HALF)
        if NORM != "none" and not BACKWARD:
            b_hat_first, b_hat_second, _ = _normed(b_first, b_second, eps, m_first, m_second, K, NORM == "layer_norm")
            b_first = tl.where(is_turned, b_hat_first * b_weight_first + b_bias_first, b_first)
            b_second = tl.where(is_turned, b_hat_second * b_weight_second + b_bias_second, b_second)
        if p_sin is not None:
            if not SHARED:
                o_sin_h = o_sin + i_h * stride_sin_h
                o_cos_h = o_cos + i_h * stride_cos_h
                b_sin_first, b_sin_second = load_pairs(p_sin, o_sin_h, m_place, stride_sin_k, K, BLOCK_K, HALF)
                b_cos_first, b_cos_second = load_pairs(p_cos, o_cos_h, m_place, stride_cos_k, K, BLOCK_K, HALF)
            b_turned_first, b_turned_second = turn(
                b_first, b_second, b_sin_first, b_sin_second, b_cos_first, b_cos_second, BACKWARD
            )
            # what has no place is copied, not turned by 0: what is infinite there stays so
            b_first = tl.where(m_place[:, None], b_turned_first, b_first)
            b_second = tl.where(m_place[:, None], b_turned_second, b_second)
        if NORM != "none" and BACKWARD:
            o_in = i_b * stride_in_b + i_n.to(tl.int64) * stride_in_n + tl.cast(i_part, tl.int64) * stride_in_p
            b_hat_first, b_hat_second = load_pairs(
                p_input, o_in + i_h * stride_in_h, m_row, stride_in_k, K, BLOCK_K, HALF
            )
            b_hat_first, b_hat_second, b_rstd = _normed(
                b_hat_first, b_hat_second, eps, m_first, m_second, K, NORM == "layer_norm"
            )
            if p_sums is not None:
                b_dw_first += tl.sum(b_first * b_hat_first, 0)
                b_dw_second += tl.sum(b_second * b_hat_second, 0)
                b_db_first += tl.sum(b_first, 0)
                b_db_second += tl.sum(b_second, 0)
            b_g_first, b_g_second = b_first * b_weight_first, b_second * b_weight_second
            b_slope = _mean(b_g_first * b_hat_first, b_g_second * b_hat_second, K)
            b_centre = _mean(b_g_first, b_g_second, K) if NORM == "layer_norm" else 0.0
            b_g_first = (b_g_first - b_centre - b_hat_first * b_slope) * b_rstd
            b_g_second = (b_g_second - b_centre - b_hat_second * b_slope) * b_rstd
            b_first = tl.where(is_turned, b_g_first, b_first)
            b_second = tl.where(is_turned, b_g_second, b_second)
        if p_out is not None:
            o_out = ((i_row.to(tl.int64) * parts + i_part) * heads + i_h) * K
            store_pairs(p_out, o_out, m_row, b_first, b_second, K, BLOCK_K, HALF)
    if p_sums is not None:  # noqa: SIM102  (decided when compiled)
        if is_turned:
            programs = tl.num_programs(0) * tl.num_programs(1)
            i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            o_sum = (tl.cast(2 * i_part, tl.int64) * programs + i_program) * K + tl.zeros([1], tl.int64)
            m_sum = tl.full([1], 1, tl.int1)
            store_pairs(p_sums, o_sum, m_sum, b_dw_first[None, :], b_dw_second[None, :], K, BLOCK_K, HALF)
            o_sum += tl.cast(programs, tl.int64) * K
            store_pairs(p_sums, o_sum, m_sum, b_db_first[None, :], b_db_second[None, :], K, BLOCK_K, HALF)


def why_not(direction: str, call: Any) -> str | None:
    return why_not_width((call.qkv if direction == "forward" else call.dout).shape[-1])


def _launch(
    x: Tensor, given: Tensor | None, sin: Tensor | None, cos: Tensor | None, prefix: int, half: bool, norm: str,
    vectors: tuple[Tensor | None, ...], eps: float, out: Tensor | None, sums: bool, backward: bool,
) -> Tensor | None:  # fmt: skip
    """Write `out`; returns the partial sums [q and k, weight and bias, programs, K] where they are asked for."""
    batch, tokens, parts, heads, width = x.shape
    tile = configs.ROTARY.pick(capability(x.device), width=width)
    grid = (cdiv(batch * tokens, tile.tokens), cdiv(heads, tile.heads), parts)
    partial = x.new_empty(2, 2, grid[0] * grid[1], width, dtype=torch.float32) if sums else None
    if x.numel() == 0:
        return partial
    strides = (
        *x.stride(),
        *((0,) * 5 if given is None else given.stride()),
        *((0,) * 4 if sin is None else strides_of(sin)),
        *((0,) * 4 if cos is None else strides_of(cos)),
    )
    launch(
        rotary_qkv_kernel, grid,
        x, given, sin, cos, *(None if each is None else each.contiguous() for each in vectors), out, partial,
        batch * tokens, tokens, heads, parts, prefix, eps, *strides,
        K=width, BLOCK_K=max(2, next_power_of_2(width)), TOKENS=tile.tokens, HEADS=tile.heads,
        HALF=half and sin is not None, BACKWARD=backward,
        SHARED=sin is None or cos is None or sin.shape[1] == cos.shape[1] == 1, NORM=norm, num_warps=tile.warps,
    )  # fmt: skip
    return partial


def forward(
    qkv: Tensor, sin: Tensor | None, cos: Tensor | None, prefix: int, half: bool, norm: str, q_weight: Tensor | None,
    q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    out = qkv.new_empty(qkv.shape)
    _launch(
        qkv,
        None,
        sin,
        cos,
        prefix,
        half,
        norm,
        (q_weight, q_bias, k_weight, k_bias),
        eps,
        out,
        sums=False,
        backward=False,
    )
    return out


def backward(
    dout: Tensor, qkv: Tensor | None, sin: Tensor | None, cos: Tensor | None, prefix: int, half: bool, norm: str,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    dqkv = dout.new_empty(dout.shape) if needs[0] else None
    vectors = (q_weight, None, k_weight, None)
    partial = _launch(dout, qkv, sin, cos, prefix, half, norm, vectors, eps, dqkv, sums=any(needs[1:]), backward=True)
    grads = [nothing(dout) if dqkv is None else dqkv]
    for index, (need, like) in enumerate(zip(needs[1:], (q_weight, q_weight, k_weight, k_weight), strict=True)):
        if need and like is not None and partial is not None:
            grads.append(column_sum(partial[index // 2, index % 2], like.dtype))
        else:
            grads.append(nothing(dout))
    return tuple(grads)


# -------------------------------------------------------------------------------------------------------- the audit

_TOKENS, _HEADS = 64 * 256, 16  # of 64 images in one batch


def _variant(tile: RotaryTile, width: int, dtype: str, half: bool, backward: bool, norm: str, shared: bool) -> Variant:
    """The kernel at a row of its table, on a projection of q, k and v and with a row of positions a token."""
    names = rotary_qkv_kernel.arg_names
    integers = [name for name in names if name.startswith("stride")]
    types = dict.fromkeys(("p_x", "p_input", "p_out"), f"*{dtype}")
    types |= dict.fromkeys([name for name in names if name.startswith("p_") and name not in types], "*fp32")
    types |= dict.fromkeys(("rows", "tokens", "heads", "parts", "prefix", *integers), "i32") | {"eps": "fp32"}
    constants: dict[str, Any] = {name: 1 for name in integers if name.endswith("_k")}
    constants |= {"K": width, "BLOCK_K": next_power_of_2(width), "TOKENS": tile.tokens, "HEADS": tile.heads}
    constants |= {"HALF": half, "BACKWARD": backward, "SHARED": shared, "NORM": norm}
    absent = ["p_input", "p_sums"] if not backward or norm == "none" else []
    absent += ["p_q_bias", "p_k_bias"] if backward or norm != "layer_norm" else []
    absent += ["p_q_weight", "p_k_weight"] if norm == "none" else []
    constants |= dict.fromkeys(absent)
    elements, size = 3 * _TOKENS * _HEADS * width, 4 if dtype == "fp32" else 2
    return Variant(
        name=f"rotary_qkv {'backward' if backward else 'forward'}, {norm}, {'halves' if half else 'pairs'}"
        f"{'' if shared else ' of each head'}, {dtype}, {_TOKENS}x3x{_HEADS}x{width}",
        kernel=rotary_qkv_kernel,
        signature={name: types[name] for name in names if name in types and name not in constants},
        constants=constants,
        num_warps=tile.warps,
        divisible=tuple(name for name in integers if name not in constants),
        moved=float((3 if "p_input" not in absent else 2) * size * elements + 8 * _TOKENS * width),
    )


def variants(capability: Capability) -> list[Variant]:
    """Each row of the table in bfloat16, each way, with each norm; pairs of neighbours, a padded head, float32."""
    found = [
        _variant(row.tile, row.limits["width"], "bf16", True, backward, norm, True)
        for row in configs.ROTARY.of(capability)
        for norm in ("none", "rms_norm", "layer_norm")
        for backward in (False, True)
    ]
    for backward in (False, True):
        found += [
            _variant(configs.ROTARY.pick(capability, width=64), 64, "bf16", False, backward, "layer_norm", True),
            _variant(configs.ROTARY.pick(capability, width=72), 72, "bf16", True, backward, "rms_norm", True),
            _variant(configs.ROTARY.pick(capability, width=64), 64, "fp32", True, backward, "layer_norm", True),
            _variant(configs.ROTARY.pick(capability, width=64), 64, "bf16", True, backward, "rms_norm", False),
        ]
    return found
