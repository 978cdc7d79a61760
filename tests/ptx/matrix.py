"""ldmatrix, stmatrix and mma.sync: matrices that lie in the registers of a warp.

Lane 4 r + c of a warp holds, of each 8x8 tile of 16-bit elements, row r and columns 2c and 2c + 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx import floats
from ptx.operands import Instruction, Operand, Register, Vector
from ptx.schedule import meet
from ptx.spaces import shared_offset
from ptx.state import Strand
from ptx.step import Layout, Packed, Step, define, registers

# -------------------------------------------------------------------------------------------------- 8x8 tiles, moved


def _rows(strand: Strand, address: Any, count: int, guard: Any, instruction: Instruction) -> tuple[Any, Any]:
    """Offsets [CTAs, warps, tiles, 8] of the rows that lanes point at, eight lanes a tile; who of the warps acts."""
    if guard is not None:
        raise instruction.refuse("a guard")
    meet(strand, None)
    group = strand.group
    used = np.arange(group.threads) % 32 < 8 * count
    active = strand.full(used[None, :]) if strand.mask is None else strand.mask & used[None, :]
    offset = strand.full(
        shared_offset(strand, address, 16, None if used.all() and strand.mask is None else active, instruction)
    )
    rows = offset.reshape(group.count, group.warps, 32)[:, :, : 8 * count].reshape(group.count, group.warps, count, 8)
    warps = None if strand.mask is None else strand.mask.reshape(group.count, group.warps, 32)[:, :, 0]
    return rows, warps


def _shadow(strand: Strand, rows: Any, warps: Any) -> tuple[Any, Any, Any]:
    """Grains, rows and warps of 16 bytes for each row of the tiles."""
    group, order = strand.group, strand.group.cohort.order
    first = (rows >> order.shift) + (group.rows * np.int64(order.each))[:, None, None, None]
    touched = first[..., None] + np.arange(16 >> order.shift)
    if warps is not None:
        touched = np.where(warps[:, :, None, None, None], touched, order.nowhere)
    return touched, group.rows[:, None, None, None, None], np.arange(group.warps)[None, :, None, None, None]


def _words(strand: Strand, rows: Any) -> Any:
    """Indices of the four words of each row, [CTAs, warps, tiles, 8, 4]."""
    base = strand.group.base[4][:, :, None, None, None]
    return (rows >> 2)[..., None] + np.arange(4) + base


def _tile_turn(words: Any) -> Any:
    """8x8 tiles of 16 bits transposed, as words [..., 8, 4]."""
    halves = np.ascontiguousarray(words).view("u2")
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).view("i4")


@define("ldmatrix")
def _(i: Instruction) -> Step:
    count, turn = _form(i)
    destinations = registers(i, i.operands[0])
    if len(destinations) != count:
        raise i.refuse(f"{len(destinations)} destinations")

    def run(strand: Strand, address: Any, guard: Any) -> Any:
        group, cohort = strand.group, strand.group.cohort
        rows, warps = _rows(strand, address, count, guard, i)
        cohort.order.on_read(group.launch, i, *_shadow(strand, rows, warps))
        words = cohort.shared[4].take(_words(strand, rows))
        words = _tile_turn(words) if turn else words
        out = words.reshape(group.count, group.warps, count, 32).transpose(2, 0, 1, 3)
        out = out.reshape(count, group.count, group.threads)
        return list(out) if count > 1 else out[0]

    return Step(run, ((i.operands[1], "at"),), tuple((each, "i4") for each in destinations), True, "warp")


@define("stmatrix")
def _(i: Instruction) -> Step:
    count, turn = _form(i)
    values = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    if len(values) != count:
        raise i.refuse(f"{len(values)} sources")

    def run(strand: Strand, address: Any, *items: Any, guard: Any) -> None:
        group, cohort = strand.group, strand.group.cohort
        rows, warps = _rows(strand, address, count, guard, i)
        parts = np.stack([strand.full(each) for each in items]).reshape(count, group.count, group.warps, 8, 4)
        words = np.ascontiguousarray(parts.transpose(1, 2, 0, 3, 4))
        words = _tile_turn(words) if turn else words
        index = _words(strand, rows)
        if warps is not None:
            index = np.where(warps[:, :, None, None, None], index, cohort.nowhere[4])
        changed = cohort.shared[4][index] != words
        cohort.shared[4][index] = words
        lost = cohort.shared[4][index] != words
        changed, lost = (each.any(-1, keepdims=True) for each in (changed, lost))
        cohort.order.on_write(group.launch, i, *_shadow(strand, rows, warps), changed, lost if lost.any() else None)

    return Step(run, ((i.operands[0], "at"), *((each, "i4") for each in values)), (), True, "warp")


def _form(i: Instruction) -> tuple[int, bool]:
    i.one_of("sync")
    i.one_of("aligned")
    i.one_of("m8n8")
    count = int(i.one_of("x1 x2 x4")[1])
    turn = i.flag("trans")
    i.flag("shared", "shared::cta")
    i.one_of("b16")
    return count, turn


# ------------------------------------------------------------------------------------------------------ mma operands


def halves(words: Any, kind: str) -> Any:
    """Words of two 16-bit elements [..., threads] to float32 [..., threads, 2]."""
    pairs = words.view("u2").reshape(*words.shape, 2)
    return floats.from_bf16(pairs) if kind == "bf16" else pairs.view("f2").astype("f4")


def stack(strand: Strand, values: tuple[Any, ...], dtype: str = "i4") -> Any:
    out = np.empty((len(values), strand.group.count, strand.group.threads), dtype)
    for n, value in enumerate(values):
        out[n] = value
    return out


def gather_a(kind: str) -> Any:
    """A, 16x16: tiles (upper, left), (lower, left), (upper, right), (lower, right)."""

    def gather(strand: Strand, *values: Any) -> Any:
        count, warps = strand.group.count, strand.group.warps
        parts = halves(stack(strand, values), kind).reshape(2, 2, count, warps, 8, 8)
        return np.ascontiguousarray(parts.transpose(2, 3, 1, 4, 0, 5)).reshape(count, warps, 16, 16)

    return gather


def gather_b(kind: str) -> Any:
    """B, 16x8 column by column: the upper eight rows, the lower ones."""

    def gather(strand: Strand, *values: Any) -> Any:
        count, warps = strand.group.count, strand.group.warps
        parts = halves(stack(strand, values), kind).reshape(2, count, warps, 8, 8)
        return np.ascontiguousarray(parts.transpose(1, 2, 0, 4, 3)).reshape(count, warps, 16, 8)

    return gather


def gather_c(strand: Strand, *values: Any) -> Any:
    """C, 16x8 of float32: two columns of the upper eight rows, two of the lower ones."""
    count, warps = strand.group.count, strand.group.warps
    parts = stack(strand, values, "f4").reshape(2, 2, count, warps, 8, 4)
    return np.ascontiguousarray(parts.transpose(2, 3, 0, 4, 5, 1)).reshape(count, warps, 16, 8)


def scatter_c(strand: Strand, matrix: Any) -> Any:
    count, warps = strand.group.count, strand.group.warps
    parts = matrix.reshape(count, warps, 2, 8, 4, 2).transpose(2, 5, 0, 1, 3, 4)
    return np.ascontiguousarray(parts).reshape(4, count, strand.group.threads)


def gather_tf32_a(strand: Strand, *values: Any) -> Any:
    """A, 16x8 of TF32, a word each: columns 0 to 3 of the upper and lower rows, then columns 4 to 7."""
    count, warps = strand.group.count, strand.group.warps
    parts = _tf32(stack(strand, values)).reshape(2, 2, count, warps, 8, 4)
    return np.ascontiguousarray(parts.transpose(2, 3, 1, 4, 0, 5)).reshape(count, warps, 16, 8)


def gather_tf32_b(strand: Strand, *values: Any) -> Any:
    count, warps = strand.group.count, strand.group.warps
    parts = _tf32(stack(strand, values)).reshape(2, count, warps, 8, 4)
    return np.ascontiguousarray(parts.transpose(1, 2, 0, 4, 3)).reshape(count, warps, 8, 8)


def _tf32(words: Any) -> Any:
    """The bits that a product of TF32 looks at."""
    return (words.view("u4") & np.uint32(0xFFFFE000)).view("f4")


C = Layout("mma c", gather_c, scatter_c, "f4")
_A = {kind: Layout(f"mma a {kind}", gather_a(kind)) for kind in ("bf16", "f16")} | {"tf32": Layout("a", gather_tf32_a)}
_B = {kind: Layout(f"mma b {kind}", gather_b(kind)) for kind in ("bf16", "f16")} | {"tf32": Layout("b", gather_tf32_b)}


def packed(i: Instruction, operand: Operand, layout: Layout, count: int) -> Packed:
    items = registers(i, operand)
    if len(items) != count or not all(isinstance(each, Register) for each in items):
        raise i.refuse(f"{len(items)} registers; needs {count}")
    return Packed(layout, items)


@define("mma")
def _(i: Instruction) -> Step:
    i.one_of("sync")
    i.one_of("aligned")
    shape = i.one_of("m16n8k16 m16n8k8")
    i.one_of("row")
    i.one_of("col")
    kinds = i.opcode.split(".")[-4:]
    i.flag(*kinds)
    kind = kinds[1]
    if kinds != ["f32", kind, kind, "f32"] or (shape, kind) not in (
        ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"),
    ):  # fmt: skip
        raise i.refuse("form of mma")
    a, b = packed(i, i.operands[1], _A[kind], 4), packed(i, i.operands[2], _B[kind], 2)

    def run(strand: Strand, a: Any, b: Any, c: Any, guard: Any) -> Any:
        meet(strand, None)
        return np.matmul(a, b) + c

    c, d = packed(i, i.operands[3], C, 4), packed(i, i.operands[0], C, 4)
    return Step(run, (a, b, c), (d,), True, "warp")
