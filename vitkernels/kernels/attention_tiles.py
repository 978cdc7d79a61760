"""`triton.jit` helpers of the attention kernels: tiles in pieces of a head's width, masks, weights.

A head's width is covered by pieces of powers of two (72 is 64 + 16), so a tile is a tuple of blocks, one a piece.
Scores, `factor`, `unit` and the rows' statistics are those of `vitkernels.ops.attention.score_units`; exponentials are
of 2, so `unit` comes times log2(e). Strides of batch, head and row come divided by `ALIGN`, the largest power of two up
to 8 that divides them all: so the compiler knows, and loads 16 bytes at a time.
"""

# mypy: disable-error-code="assignment"
# tuples of blocks grow from empty ones; the compiler takes no annotation that says so
from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels.common import dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.constexpr_function
def begin_of(PIECES, i):
    """Where piece i begins."""
    return sum(PIECES[:i])


@triton.constexpr_function
def columns_of(MASK):
    """Of an image of keys (`masked`); 0 where they are none."""
    return int(MASK.split()[1]) if MASK.startswith("image") else 0


@triton.jit
def tiles_of(N, LONGEST, BLOCK: tl.constexpr):
    """How many tiles each head has: of N rows, or of the longest sequence's."""
    return tl.cdiv(N, BLOCK) if LONGEST is None else tl.cdiv(LONGEST, BLOCK)


@triton.jit
def sequence(p_cu, i_b, N):
    """What `head_of` takes for a batch, and its rows: its number and N, or a sequence's first token and its tokens."""
    begin, count = i_b, N
    if p_cu is not None:
        begin = tl.load(p_cu + i_b)
        count = tl.load(p_cu + i_b + 1) - begin
    return begin, count


@triton.jit
def head_of(p, i_b, i_h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Pointer to a head's first row."""
    return p + (tl.cast(i_b, tl.int64) * stride_b + tl.cast(i_h, tl.int64) * stride_h) * ALIGN


@triton.jit
def mask_of(p_mask, i_b, i_h, stride_b, stride_h, MASKS):
    """Pointer to a head's mask: of its own sequence, or of so many in turn."""
    i_mask = i_b
    if MASKS is not None:
        i_mask = i_b % MASKS
    return head_of(p_mask, i_mask, i_h, stride_b, stride_h, 1)


@triton.jit
def load(p, o_row, m_row, stride_n, stride_k, K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows of a head [rows, K]; zeros past K and, where `m_row` is given, in rows outside of it."""
    tile = ()
    p_row = p + (tl.cast(o_row, tl.int64) * stride_n * ALIGN)[:, None]
    for i in tl.static_range(len(WIDTHS)):
        o_k = begin_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        if m_row is not None:
            block = tl.load(
                p_row + (tl.cast(o_k, tl.int64) * stride_k)[None, :],
                mask=m_row[:, None] & (o_k < K)[None, :],
                other=0.0,
            )
        elif begin_of(WIDTHS, i + 1) > K:
            block = tl.load(p_row + (tl.cast(o_k, tl.int64) * stride_k)[None, :], mask=(o_k < K)[None, :], other=0.0)
        else:
            block = tl.load(p_row + (tl.cast(o_k, tl.int64) * stride_k)[None, :])
        tile = tile + (block,)  # noqa: RUF005  (the compiler has no unpacking)
    return tile


@triton.jit
def store(p, tile, factor, o_row, m_row, stride_n, K: tl.constexpr, ALIGN: tl.constexpr, WIDTHS: tl.constexpr):
    """Write rows of a head, multiplied by `factor` (a number, or one for each row as [rows, 1])."""
    p_row = p + (tl.cast(o_row, tl.int64) * stride_n * ALIGN)[:, None]
    for i in tl.static_range(len(WIDTHS)):
        o_k = begin_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        block = (tile[i] * factor).to(p.dtype.element_ty)
        tl.store(p_row + o_k[None, :], block, mask=m_row[:, None] & (o_k < K)[None, :])


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(WIDTHS)):
        tile = tile + (tl.full([ROWS, WIDTHS[i]], 0.0, tl.float32),)  # noqa: RUF005
    return tile


@triton.jit
def across(a, b, WIDTHS: tl.constexpr):
    """a b^T over the whole width: [rows of a, rows of b] in float32."""
    product = dot(a[0], tl.trans(b[0]), None)
    for i in tl.static_range(1, len(WIDTHS)):
        product = dot(a[i], tl.trans(b[i]), product)
    return product


@triton.jit
def along(weights, rows, total, WIDTHS: tl.constexpr):
    """total + weights rows, for each piece of the width; no total is a total of zeros."""
    tile = ()
    for i in tl.static_range(len(WIDTHS)):
        if total is None:  # noqa: SIM108  (decided when compiled)
            tile = tile + (dot(weights, rows[i], None),)  # noqa: RUF005
        else:
            tile = tile + (dot(weights, rows[i], total[i]),)  # noqa: RUF005
    return tile


@triton.jit
def scaled(tile, factor, WIDTHS: tl.constexpr):
    """Each row times its factor [rows]."""
    result = ()
    for i in tl.static_range(len(WIDTHS)):
        result = result + (tile[i] * factor[:, None],)  # noqa: RUF005
    return result


@triton.jit
def row_dot(a, b, WIDTHS: tl.constexpr):
    """Sum of a * b over the width: [rows] in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(WIDTHS)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def rows_of(p, p_cu, i_bh, i_h, begin, NQ, EACH: tl.constexpr):
    """Pointer to what a head has for its queries in a [B, H, EACH, NQ], or in an [H, EACH, NQ] of all sequences."""
    if p_cu is not None:
        p += tl.cast(i_h, tl.int64) * EACH * NQ + begin
    else:
        p += tl.cast(i_bh, tl.int64) * EACH * NQ
    return p


@triton.jit
def stats_of(p_stats, i_bh, NQ):
    """Pointer to a head's row statistics: the largest of each row, then the log-sums."""
    return p_stats + tl.cast(i_bh, tl.int64) * 2 * NQ


@triton.jit
def store_stats(p_stats, b_max, b_sum, o_m, m_m, NQ):
    """A row that sees nothing comes with a maximum of 0 and a sum of 0."""
    tl.store(p_stats + o_m, b_max, mask=m_m)
    tl.store(p_stats + NQ + o_m, tl.where(b_sum == 0, INF, tl.log2(b_sum) * LN2), mask=m_m)


@triton.jit
def load_stats(p_stats, o_m, m_m, NQ):
    """Largest and log-sum of rows, the latter times log2(e); queries that are not there see nothing."""
    b_max = tl.load(p_stats + o_m, mask=m_m, other=0.0)
    return b_max, tl.load(p_stats + NQ + o_m, mask=m_m, other=INF) * LOG2E


@triton.jit
def weights(s, b_max, b_log, unit):
    """The difference first: beside huge scores the log-sum would be rounded away."""
    return tl.exp2((s - b_max) * unit - b_log)


@triton.jit
def masked(s, p_mask, o_m, o_n, stride_mm, stride_mn, NQ, NK, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Scores with the mask on them.

    `o_m` and `o_n` are the queries' and the keys' indices, shaped to broadcast to `s`. `MASK` is "none", "bool" or
    "add"; without `MASK_ROWS` all queries share one row of it. "image 14" is of keys that are an image of 14 columns: a
    row of the mask has what is added to the image's rows, then what is added to its columns.
    """
    if columns_of(MASK) > 0:
        p_row = p_mask + tl.cast(o_m, tl.int64) * stride_mm
        there = (o_m < NQ) & (o_n < NK)
        of_row = tl.load(p_row + o_n // columns_of(MASK), mask=there, other=0).to(tl.float32)
        p_row += NK // columns_of(MASK)
        s += of_row + tl.load(p_row + o_n % columns_of(MASK), mask=there, other=0).to(tl.float32)
    elif MASK != "none":
        if MASK_ROWS:
            p_at = p_mask + tl.cast(o_m, tl.int64) * stride_mm + tl.cast(o_n, tl.int64) * stride_mn
            values = tl.load(p_at, mask=(o_m < NQ) & (o_n < NK), other=0)
        else:
            values = tl.load(p_mask + tl.cast(o_n, tl.int64) * stride_mn, mask=o_n < NK, other=0)
        if MASK == "bool":
            s += tl.where(values != 0, 0.0, -INF)
        else:
            s += values.to(tl.float32)
    return s


@triton.jit
def hidden(s, o_m, o_n, NK, CAUSAL: tl.constexpr):
    """-inf for keys that are not there, or that come after the query."""
    if CAUSAL:
        s = tl.where(o_n <= o_m, s, -INF)
    return tl.where(o_n < NK, s, -INF)
