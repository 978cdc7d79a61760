"""Copies into shared memory that go on while threads compute: cp.async, and the copy engine (bulk copies, TMA).

`cp.async` belongs to the thread that issued it: it has written when that thread's `wait_group` says so, and other
threads see it after a barrier that follows. Bulk copies count their bytes on an mbarrier: they have written for
whoever has waited for that mbarrier's phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.findings import ALIGNMENT, BOUNDS, UNDEFINED
from ptx.operands import Address, Immediate, Instruction, Operand
from ptx.regions import WINDOWS
from ptx.spaces import grains, shared_offset
from ptx.state import SHARED, Strand
from ptx.step import Step, define, number
from ptx.sync import mbarrier_at, threads_of

_SHIFT = {2: 1, 4: 2, 8: 3}


@dataclass(frozen=True)
class TensorMap:
    """A descriptor of TMA: a matrix in global memory, and the box of it that one copy moves.

    Args:
        matrix: numpy view [rows, columns] of the elements' bits; rows may be apart.
        box: (rows, columns).
        swizzle: 0 for none, 1, 2, 3 for 32, 64, 128 bytes.
    """

    matrix: np.ndarray
    box: tuple[int, int]
    swizzle: int


def swizzled(address: Any, mode: int) -> Any:
    """Where a byte lies in shared memory: bits 4 to 6 of its address change with bits 7 to 9."""
    return address ^ ((address >> 7 & ((1 << mode) - 1)) << 4)


@define("cp")
def _(i: Instruction) -> Step:
    i.one_of("async")
    if i.flag("commit_group"):
        bulk = i.flag("bulk")
        return Step(lambda strand, guard: _queue(strand, bulk).commit(strand.everywhere(guard)), machine=True)
    if i.flag("wait_group"):
        bulk, newest = i.flag("bulk"), number(i, i.operands[0])
        i.flag("read")
        return Step(lambda strand, guard: _queue(strand, bulk).wait(strand.everywhere(guard), newest), machine=True)
    if i.flag("wait_all"):
        return Step(_wait_all, machine=True)
    if i.flag("bulk"):
        return _tensor(i) if i.flag("tensor") else _bulk(i)
    i.one_of("ca cg")
    i.flag("shared", "shared::cta")
    i.one_of("global")
    i.cached()
    size = number(i, i.operands[2])
    taken: Operand = i.operands[3] if len(i.operands) > 3 else Immediate(size)

    def run(strand: Strand, to: Any, source: Any, count: Any, guard: Any) -> None:
        _copy(strand, to, source, count, size, strand.active(guard), i)

    sources = ((i.operands[0], "at"), (i.operands[1], "at"), (taken, "u4"))
    return Step(run, sources, machine=True)


def _queue(strand: Strand, bulk: bool) -> Any:
    return strand.group.cohort.bulk if bulk else strand.group.cohort.copies


def _wait_all(strand: Strand, guard: Any) -> None:
    mask = strand.everywhere(guard)
    strand.group.cohort.copies.commit(mask)
    strand.group.cohort.copies.wait(mask, 0)


def _copy(strand: Strand, to: Any, source: Any, count: Any, size: int, active: Any, instruction: Instruction) -> None:
    """cp.async: `count` bytes come from global memory, zeros follow up to `size`."""
    if active is not None and not active.any():
        return
    group, cohort = strand.group, strand.group.cohort
    order, launch = cohort.order, strand.group.launch
    offset = np.broadcast_to(shared_offset(strand, to, size, active, instruction), (group.count, group.threads))
    count = strand.full(count)
    if (count > size).any():
        raise launch.findings.fail(UNDEFINED, instruction, f"{int(count.max())} bytes of {size}")
    word = 4 if not (count & 3).any() else 1
    values = []
    for n in range(size // word):
        some = count > n * word
        some = some if active is None else some & active
        value = np.zeros((1, 1), "i4" if word == 4 else "u1")
        if some.any():
            launch.partial.add(instruction.line)
            loaded = launch.memory.load(strand, source + n * word, word, 1, None if some.all() else some, instruction)
            value = np.where(some, loaded[0], value)
        values.append(strand.full(value))
    if not (source & (size - 1) == 0).all() if active is None else ((source & (size - 1) != 0) & active).any():
        raise launch.findings.fail(ALIGNMENT, instruction, f"{size} bytes of global memory")
    touched, rows, warps = grains(strand, offset, size, active)
    order.on_copy(launch, instruction, touched, rows, warps)
    index = (offset >> (2 if word == 4 else 0)) + group.base[word]
    array = cohort.shared[word]
    who = np.broadcast_to(warps, touched.shape)

    def land(done: Any) -> None:
        mine = done[group.rows]
        for n, value in enumerate(values):
            array[index[mine] + n] = value[mine]
        order.landed(touched[mine], who[mine])

    cohort.copies.issue(strand.everywhere() if active is None else _everywhere(strand, active), land)


def _everywhere(strand: Strand, active: Any) -> Any:
    full = np.zeros(strand.group.cohort.exited.shape, bool)
    full[strand.group.rows] = active
    return full


# ------------------------------------------------------------------------------------------------------ bulk copies


def _shared_to(i: Instruction) -> str:
    """Take the direction: "load" into shared memory, "store" out of it."""
    spaces = [each for each in i.opcode.split(".") if each in ("global", "shared", "shared::cta", "shared::cluster")]
    i.flag("global", "shared", "shared::cta", "shared::cluster")
    if len(spaces) != 2 or (spaces[0] == "global") == (spaces[1] == "global"):
        raise i.refuse("spaces of a bulk copy")
    return "store" if spaces[0] == "global" else "load"


def _bulk(i: Instruction) -> Step:
    """cp.async.bulk: bytes in a row."""
    direction = _shared_to(i)
    i.cached()
    if direction == "store":
        i.one_of("bulk_group")

        def store(strand: Strand, to: Any, source: Any, count: Any, guard: Any) -> None:
            to, source, count = strand.full(to), strand.full(source), strand.full(count)
            for line, thread in threads_of(strand, guard):
                nbytes = int(count[line, thread])
                _aligned(strand, i, int(to[line, thread]), int(source[line, thread]), nbytes)
                pieces = int(to[line, thread]) + np.arange(0, nbytes, 4)
                _store(strand, line, thread, int(source[line, thread]) + np.arange(0, nbytes, 4), _writer(pieces, 4), i)

        return Step(store, tuple((each, kind) for each, kind in zip(i.operands, ("at", "at", "u4"), strict=True)),
                    machine=True)  # fmt: skip
    i.one_of("mbarrier::complete_tx::bytes")

    def load(strand: Strand, to: Any, source: Any, count: Any, barrier: Any, guard: Any) -> None:
        to, source, count, barrier = (strand.full(each) for each in (to, source, count, barrier))
        for line, thread in threads_of(strand, guard):
            nbytes = int(count[line, thread])
            _aligned(strand, i, int(to[line, thread]), int(source[line, thread]), nbytes)
            pieces = int(source[line, thread]) + np.arange(0, nbytes, 4)
            read = strand.group.launch.memory.read_bytes(strand, pieces, 4, i)
            offset = int(to[line, thread]) - SHARED + np.arange(0, nbytes, 4)
            _load(strand, line, thread, offset, read, 4, int(barrier[line, thread]), i)

    kinds = ("at", "at", "u4", "at")
    return Step(load, tuple(zip(i.operands, kinds, strict=True)), machine=True)


def _aligned(strand: Strand, i: Instruction, to: int, source: int, nbytes: int) -> None:
    if to % 16 or source % 16 or nbytes % 16:
        raise strand.group.launch.findings.fail(ALIGNMENT, i, f"a bulk copy of {nbytes} bytes from {source} to {to}")


def _load(
    strand: Strand, line: int, thread: int, offset: Any, values: Any, size: int, barrier: int, instruction: Instruction
) -> None:
    """Begin a bulk copy into shared memory, which lands when its mbarrier's phase has been waited for."""
    group, cohort = strand.group, strand.group.cohort
    order, row = cohort.order, int(group.rows[line])
    if offset.min() < 0 or offset.max() + size > group.launch.shared:
        raise group.launch.findings.fail(BOUNDS, instruction, f"byte {int(offset.max())} of shared memory")
    touched = np.unique(offset >> order.shift) + row * order.each
    order.on_copy(group.launch, instruction, touched, row, thread // 32)
    found = mbarrier_at(group, barrier, row, instruction)
    index = (offset >> _SHIFT[size]) + row * (cohort.bytes // size)

    def land() -> None:
        cohort.shared[size][index] = values
        order.landed(touched, order.warps)

    found.copies.append((row, int(found.phase[row]), land))
    found.bytes[row] -= len(values) * size
    found.settle(cohort, row)


def _store(
    strand: Strand, line: int, thread: int, offset: Any, write: Callable[..., None], instruction: Instruction
) -> None:
    """Begin a bulk copy out of shared memory, which reads at the last moment: when its group is waited for."""
    group, cohort = strand.group, strand.group.cohort
    order, row, warp = cohort.order, int(group.rows[line]), thread // 32
    offset = offset - SHARED
    if offset.min() < 0 or offset.max() + 4 > group.launch.shared:
        raise group.launch.findings.fail(BOUNDS, instruction, f"byte {int(offset.max())} of shared memory")
    touched = np.unique(offset >> order.shift) + row * order.each
    order.on_async_read(group.launch, instruction, touched, row, warp, warp + 1)
    write(strand, line, cohort.shared[4][(offset >> 2) + row * (cohort.bytes // 4)], instruction)
    mask = np.zeros(cohort.exited.shape, bool)
    mask[row, thread] = True
    cohort.bulk.issue(mask, lambda done: order.async_read_ended(touched, warp, warp + 1))


def _writer(addresses: Any, size: int) -> Callable[..., None]:
    def write(strand: Strand, line: int, values: Any, instruction: Instruction) -> None:
        strand.group.launch.memory.write_bytes(strand, line, addresses, values, size, instruction)

    return write


# --------------------------------------------------------------------------------------------------------------- TMA


def _tensor(i: Instruction) -> Step:
    """cp.async.bulk.tensor.2d: a box of a matrix; what lies outside of the matrix is read as 0 and not written."""
    i.one_of("2d")
    i.flag("tile")
    direction = _shared_to(i)
    i.cached()
    tensor, inside = (i.operands[0], i.operands[1]) if direction == "store" else (i.operands[1], i.operands[0])
    if not isinstance(tensor, Address) or len(tensor.coordinates) != 2:
        raise i.refuse("coordinates")
    sources: list[tuple[Operand, str]] = [
        (inside, "at"),
        (tensor, "i8"),
        *((each, "i4") for each in tensor.coordinates),
    ]
    if direction == "store":
        i.one_of("bulk_group")
        return Step(_tensor_store(i), tuple(sources), machine=True)
    i.one_of("mbarrier::complete_tx::bytes")
    return Step(_tensor_load(i), (*sources, (i.operands[2], "at")), machine=True)


def _box(strand: Strand, address: int, at: int, instruction: Instruction) -> tuple[TensorMap, Any]:
    """A descriptor, and the offsets of its box's elements in shared memory."""
    found = strand.group.launch.tensor_maps.get(address - WINDOWS["param"])
    if found is None:
        raise strand.group.launch.findings.fail(UNDEFINED, instruction, f"no tensor map at {address:#x}")
    size = found.matrix.itemsize
    if at % 128 or (found.swizzle and found.box[1] * size > 16 << found.swizzle):
        note = f"a box {found.box} of {size} bytes at {at}, swizzle {found.swizzle}"
        raise strand.group.launch.findings.fail(ALIGNMENT, instruction, note)
    return found, swizzled(at + np.arange(found.box[0] * found.box[1]) * size, found.swizzle) - SHARED


def _overlap(found: TensorMap, x: int, y: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the matrix that the box covers, and where it is in the box."""
    top, bottom = max(y, 0), max(min(y + found.box[0], found.matrix.shape[0]), max(y, 0))
    left, right = max(x, 0), max(min(x + found.box[1], found.matrix.shape[1]), max(x, 0))
    return (slice(top, bottom), slice(left, right)), (slice(top - y, bottom - y), slice(left - x, right - x))


def _tensor_load(i: Instruction) -> Callable[..., None]:
    def run(strand: Strand, to: Any, tensor: Any, x: Any, y: Any, barrier: Any, guard: Any) -> None:
        to, tensor, x, y, barrier = (strand.full(each) for each in (to, tensor, x, y, barrier))
        for each in threads_of(strand, guard):
            found, offset = _box(strand, int(tensor[each]), int(to[each]), i)
            values = np.zeros(found.box, found.matrix.dtype)
            inside, part = _overlap(found, int(x[each]), int(y[each]))
            values[part] = found.matrix[inside]
            _load(strand, *each, offset, values.reshape(-1), found.matrix.itemsize, int(barrier[each]), i)

    return run


def _tensor_store(i: Instruction) -> Callable[..., None]:
    def run(strand: Strand, source: Any, tensor: Any, x: Any, y: Any, guard: Any) -> None:
        source, tensor, x, y = (strand.full(each) for each in (source, tensor, x, y))
        for each in threads_of(strand, guard):
            found, offset = _box(strand, int(tensor[each]), int(source[each]), i)
            size = found.matrix.itemsize
            inside, part = _overlap(found, int(x[each]), int(y[each]))
            words = offset.reshape(-1, 4 // size)[:, 0] if size < 4 else offset

            def write(strand: Strand, line: int, values: Any, instruction: Instruction,
                      found: TensorMap = found, inside: Any = inside, part: Any = part) -> None:  # fmt: skip
                found.matrix[inside] = values.view(found.matrix.dtype).reshape(found.box)[part]

            _store(strand, *each, words + SHARED, write, i)

    return run
