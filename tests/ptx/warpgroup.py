"""wgmma: products of a warp group (four warps, 128 threads), asynchronous, with operands in shared memory.

A descriptor says where an operand lies: bits 0 to 13 its first byte, 16 to 29 the leading and 32 to 45 the stride
byte offset, all in units of 16 bytes, 62 and 63 the swizzle. What is multiplied is made of core matrices of 8 rows by
16 bytes. K-major: rows of a core matrix lie one swizzle pitch apart, eight rows further one stride. MN-major: a row
of K holds a pitch of elements along M or N; a leading offset leads to the next such pitch, a stride to the next eight
rows of K.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx import floats
from ptx.copies import swizzled
from ptx.findings import BOUNDS
from ptx.matrix import gather_a, packed, stack
from ptx.operands import Immediate, Instruction, Vector
from ptx.schedule import meet
from ptx.state import SHARED, Strand
from ptx.step import Layout, Step, define, number

GROUP = 128


def gather_c(strand: Strand, *values: Any) -> Any:
    """D, 64 x 8n of float32: each warp 16 rows; of each eight columns four registers as mma's."""
    count, groups, n = strand.group.count, strand.group.warps // 4, len(values) // 4
    parts = stack(strand, values, "f4").reshape(n, 2, 2, count, groups, 4, 8, 4)
    return np.ascontiguousarray(parts.transpose(3, 4, 5, 1, 6, 0, 7, 2)).reshape(count, groups, 64, 8 * n)


def scatter_c(strand: Strand, matrix: Any) -> Any:
    count, groups, n = strand.group.count, strand.group.warps // 4, matrix.shape[-1] // 8
    parts = matrix.reshape(count, groups, 4, 2, 8, n, 4, 2).transpose(5, 3, 7, 0, 1, 2, 4, 6)
    return np.ascontiguousarray(parts).reshape(4 * n, count, strand.group.threads)


def _gather_a(kind: str) -> Any:
    """A, 64x16: each warp 16 rows, as mma's."""
    of_warps = gather_a(kind)

    def gather(strand: Strand, *values: Any) -> Any:
        return of_warps(strand, *values).reshape(strand.group.count, strand.group.warps // 4, 64, 16)

    return gather


C = Layout("wgmma c", gather_c, scatter_c, "f4")
A = {kind: Layout(f"wgmma a {kind}", _gather_a(kind)) for kind in ("bf16", "f16")}


def element_addresses(descriptor: Any, rows: int, mn_major: bool) -> Any:
    """Addresses [..., rows, 16] of an operand's 16-bit elements.

    Args:
        descriptor: int64 [...].
        rows: along M or N.
        mn_major: whether elements along M or N, and not along K, are neighbours.
    """
    start, lead, stride = (((descriptor >> bit & 0x3FFF) << 4)[..., None, None] for bit in (0, 16, 32))
    mode = int(descriptor.flat[0] >> 62 & 3)
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[mode]  # the hardware's code to log2 of the pitch in units of 16 bytes
    pitch = 16 << swizzle
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if not mn_major:
        at = start + r // 8 * stride + r % 8 * pitch + k * 2
        if not swizzle:
            at = start + r // 8 * stride + r % 8 * 16 + k // 8 * lead + k % 8 * 2
    elif swizzle:
        unit, units = r // 8, pitch // 16
        at = start + unit % units * 16 + unit // units * lead + r % 8 * 2 + k % 8 * pitch + k // 8 * stride
    else:
        at = start + r // 8 * stride + r % 8 * 2 + k % 8 * 16 + k // 8 * lead
    return swizzled(at, swizzle)


def _operand(strand: Strand, descriptor: Any, rows: int, mn_major: bool, kind: str, i: Instruction) -> tuple[Any, Any]:
    """An operand from shared memory as float32 [CTAs, groups, rows, 16], and its offsets there."""
    group, cohort = strand.group, strand.group.cohort
    each = strand.full(descriptor).reshape(group.count, -1, GROUP)
    first = each[..., 0]
    if (each != first[..., None]).any():
        raise i.refuse("a descriptor that differs within a warp group")
    if (first >> 49 & 7).any() or len(np.unique(first >> 62 & 3)) > 1:
        raise i.refuse("base offset of a descriptor, or several swizzles")
    offset = element_addresses(first, rows, mn_major) - SHARED
    if strand.mask is not None:
        idle = ~strand.mask.reshape(group.count, -1, GROUP)[..., 0]
        offset = np.where(idle[..., None, None], 0, offset)
    if offset.min() < 0 or offset.max() + 2 > group.launch.shared:
        raise group.launch.findings.fail(BOUNDS, i, f"byte {int(offset.max())} of shared memory")
    raw = cohort.shared[2].take((offset >> 1) + group.base[2][:, :, None, None])
    return (floats.from_bf16(raw) if kind == "bf16" else raw.view("f2").astype("f4")), offset


def _flight(strand: Strand, offsets: list[Any], i: Instruction) -> None:
    """The operands in shared memory are read until the product has been waited for."""
    group, cohort = strand.group, strand.group.cohort
    order = cohort.order
    touched: dict[tuple[int, int], Any] = {}
    alike = all((each == each[:1]).all() for each in offsets)  # CTAs mostly read at the same offsets
    read: dict[tuple[int, int], Any] = {}
    for line, row in enumerate(map(int, group.rows)):
        for number_ in range(group.threads // GROUP):
            if strand.mask is not None and not strand.mask[line, number_ * GROUP]:
                continue
            key = (0 if alike else line, number_)
            if key not in read:
                read[key] = np.unique(np.concatenate([each[line, number_].ravel() for each in offsets]) >> order.shift)
            grains = read[key] + row * order.each
            order.on_async_read(group.launch, i, grains, row, 4 * number_, 4 * number_ + 4)
            touched[row, number_] = grains

    def land(done: Any) -> None:
        for (row, number_), grains in touched.items():
            if done[row, number_ * GROUP]:
                order.async_read_ended(grains, 4 * number_, 4 * number_ + 4)

    cohort.products.issue(strand.everywhere(), land)


@define("wgmma")
def _(i: Instruction) -> Step:
    what = i.one_of("mma_async fence commit_group wait_group")
    i.one_of("sync")
    i.one_of("aligned")
    if what == "fence":
        return Step(lambda strand, guard: meet(strand, None, GROUP), (), (), True, "warp")
    if what == "commit_group":
        return Step(_commit, (), (), True, "warp")
    if what == "wait_group":
        newest = number(i, i.operands[0])
        return Step(lambda strand, guard: _wait(strand, newest), (), (), True, "warp")
    return _product(i)


def _commit(strand: Strand, guard: Any) -> None:
    meet(strand, None, GROUP)
    strand.group.cohort.products.commit(strand.everywhere())


def _wait(strand: Strand, newest: int) -> None:
    meet(strand, None, GROUP)
    strand.group.cohort.products.wait(strand.everywhere(), newest)


def _product(i: Instruction) -> Step:
    shape = i.one_of(" ".join(f"m64n{n}k16" for n in range(8, 257, 8)))
    columns = int(shape[4:-3])
    kinds = i.opcode.split(".")[-3:]
    i.flag(*kinds)
    kind = kinds[1]
    if kinds != ["f32", kind, kind] or kind not in A:
        raise i.refuse("form of wgmma")
    destination, a, b, scale, *flags = i.operands
    in_registers = isinstance(a, Vector)
    bits = [number(i, each) for each in flags]
    if len(bits) != (3 if in_registers else 4) or bits[:2] != [1, 1]:
        raise i.refuse("flags")
    turned_a, turned_b = (False, bits[2]) if in_registers else (bool(bits[2]), bits[3])
    first: Any = packed(i, a, A[kind], 4) if in_registers else (a, "i8")
    result = packed(i, destination, C, columns // 2)
    fresh = isinstance(scale, Immediate) and not scale.bits

    def run(strand: Strand, a: Any, b: Any, *more: Any, guard: Any) -> Any:
        if guard is not None:
            raise i.refuse("a guard")
        meet(strand, None, GROUP)
        offsets = []
        if not in_registers:
            a, offset = _operand(strand, a, 64, turned_a, kind, i)
            offsets.append(offset)
        b, offset = _operand(strand, b, columns, bool(turned_b), kind, i)
        _flight(strand, [*offsets, offset], i)
        product = np.matmul(a, b.swapaxes(-1, -2))
        if fresh:
            return product
        keeps, c = more
        keeps = strand.full(keeps).reshape(strand.group.count, -1, GROUP)[..., :1, None]
        return np.where(keeps, c, np.float32(0)) + product if not keeps.all() else c + product

    sources: tuple[Any, ...] = (first, (b, "i8"))
    if not fresh:
        sources += ((scale, "b1"), result)
    return Step(run, sources, (result,), True, "warp")
