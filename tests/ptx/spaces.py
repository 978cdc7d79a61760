"""Loads and stores by state space: global, shared, local, and generic addresses, which tell the space themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import ALIGNMENT, BOUNDS
from ptx.operands import Instruction
from ptx.regions import WINDOWS
from ptx.state import SHARED, Strand

_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}


def shared_offset(strand: Strand, address: Any, nbytes: int, mask: Any, instruction: Instruction) -> Any:
    """Offsets in shared memory, having seen that those of active threads are inside and aligned; 0 for idle threads."""
    offset = address - SHARED
    if mask is not None:
        offset = np.where(mask, offset, 0)
    launch = strand.group.launch
    if offset.min() < 0 or offset.max() + nbytes > launch.shared:
        bad = offset[(offset < 0) | (offset + nbytes > launch.shared)].flat[0]
        raise launch.findings.fail(BOUNDS, instruction, f"byte {int(bad)} of shared memory, which has {launch.shared}")
    off = offset & (nbytes - 1)
    if off.any():
        bad = offset[off != 0].flat[0]
        raise launch.findings.fail(ALIGNMENT, instruction, f"{nbytes} bytes at byte {int(bad)} of shared memory")
    return offset


def grains(strand: Strand, offset: Any, nbytes: int, mask: Any) -> tuple[Any, Any, Any]:
    """What an access of each thread touches in the shadows: grains, rows of the CTAs, warps, of one rank."""
    group, order = strand.group, strand.group.cohort.order
    first = (offset >> order.shift) + (group.lines * np.int64(order.each))
    if mask is not None:
        first = np.where(mask, first, order.nowhere)
    steps = nbytes >> order.shift
    if steps <= 1:
        return np.broadcast_to(first, (group.count, group.threads)), group.lines, group.warp
    spread = np.broadcast_to(first, (group.count, group.threads))[..., None] + np.arange(steps)
    if mask is not None:
        spread = np.minimum(spread, order.nowhere)
    return spread, group.lines[..., None], group.warp[..., None]


def load_shared(strand: Strand, address: Any, size: int, count: int, mask: Any, instruction: Instruction) -> list[Any]:
    group, cohort = strand.group, strand.group.cohort
    offset = shared_offset(strand, address, size * count, mask, instruction)
    cohort.order.on_read(group.launch, instruction, *grains(strand, offset, size * count, mask))
    index = (offset >> _SHIFT[size]) + group.base[size]
    array = cohort.shared[size]
    return [array.take(index + n if n else index) for n in range(count)]


def store_shared(
    strand: Strand, address: Any, size: int, values: list[Any], mask: Any, instruction: Instruction
) -> None:
    group, cohort = strand.group, strand.group.cohort
    nbytes = size * len(values)
    offset = shared_offset(strand, address, nbytes, mask, instruction)
    index = np.broadcast_to((offset >> _SHIFT[size]) + group.base[size], (group.count, group.threads))
    if mask is not None:
        index = np.where(mask, index, cohort.nowhere[size])
    array = cohort.shared[size]
    changed = np.zeros(index.shape, bool)
    for n, value in enumerate(values):
        changed |= array[index + n if mask is None else np.minimum(index + n, cohort.nowhere[size])] != value
    for n, value in enumerate(values):
        array[index + n if mask is None else np.minimum(index + n, cohort.nowhere[size])] = value
    lost = np.zeros(index.shape, bool)
    if group.warps > 1:
        for n, value in enumerate(values):
            lost |= array[index + n if mask is None else np.minimum(index + n, cohort.nowhere[size])] != value
        if mask is not None:
            changed, lost = changed & mask, lost & mask
    touched, rows, warps = grains(strand, offset, nbytes, mask)
    if touched.ndim > 2:
        changed, lost = changed[..., None], lost[..., None]
    cohort.order.on_write(
        group.launch, instruction, touched, rows, warps, changed, lost if group.warps > 1 and lost.any() else None
    )


def local_index(strand: Strand, address: Any, nbytes: int, mask: Any, instruction: Instruction) -> Any:
    group, cohort = strand.group, strand.group.cohort
    offset = strand.full(address - WINDOWS["local"] if (address >= WINDOWS["local"]).any() else address)
    if mask is not None:
        offset = np.where(mask, offset, 0)
    size = group.launch.program.local
    if offset.min() < 0 or offset.max() + nbytes > size:
        raise group.launch.findings.fail(BOUNDS, instruction, f"byte {int(offset.max())} of {size} of local memory")
    if (offset & (nbytes - 1)).any():
        raise group.launch.findings.fail(ALIGNMENT, instruction, f"{nbytes} bytes of local memory")
    each = np.int64(cohort.local_bytes)
    return offset + (group.lines * np.int64(group.threads) + np.arange(group.threads)) * each


def load_local(strand: Strand, address: Any, size: int, count: int, mask: Any, instruction: Instruction) -> list[Any]:
    index = local_index(strand, address, size * count, mask, instruction) >> _SHIFT[size]
    array = strand.group.cohort.local.view(f"i{size}" if size > 2 else f"u{size}")
    return [array[index + n] for n in range(count)]


def store_local(
    strand: Strand, address: Any, size: int, values: list[Any], mask: Any, instruction: Instruction
) -> None:
    index = local_index(strand, address, size * len(values), mask, instruction) >> _SHIFT[size]
    array = strand.group.cohort.local.view(f"i{size}" if size > 2 else f"u{size}")
    for n, value in enumerate(values):
        value = strand.full(value)
        array[index + n if mask is None else (index + n)[mask]] = value if mask is None else value[mask]


def load_global(strand: Strand, address: Any, size: int, count: int, mask: Any, instruction: Instruction) -> list[Any]:
    return strand.group.launch.memory.load(strand, address, size, count, mask, instruction)


def store_global(
    strand: Strand, address: Any, size: int, values: list[Any], mask: Any, instruction: Instruction
) -> None:
    strand.group.launch.memory.store(strand, address, size, values, mask, instruction)


LOADS = {"global": load_global, "const": load_global, "shared": load_shared, "local": load_local}
STORES = {"global": store_global, "shared": store_shared, "local": store_local}


def windows(strand: Strand, address: Any, mask: Any) -> list[tuple[str, Any, Any]]:
    """A generic access by space: (space, addresses there, who of the threads goes there)."""
    where = strand.full(address)
    active = np.ones(where.shape, bool) if mask is None else mask
    local, shared = where >= WINDOWS["local"], where >= WINDOWS["shared"]
    found = []
    for space, inside in (("local", local), ("shared", shared & ~local), ("global", ~shared)):
        who = inside & active
        if who.any():
            found.append((space, where - WINDOWS[space], None if who.all() else who))
    return found


def load_generic(strand: Strand, address: Any, size: int, count: int, mask: Any, instruction: Instruction) -> list[Any]:
    out: list[Any] = []
    for space, where, who in windows(strand, address, mask):
        values = LOADS[space](strand, where, size, count, who, instruction)
        out = values if not out else [np.where(who, new, old) for new, old in zip(values, out, strict=True)]
    return out


def store_generic(
    strand: Strand, address: Any, size: int, values: list[Any], mask: Any, instruction: Instruction
) -> None:
    for space, where, who in windows(strand, address, mask):
        STORES[space](strand, where, size, values, who, instruction)


LOADS["generic"], STORES["generic"] = load_generic, store_generic
