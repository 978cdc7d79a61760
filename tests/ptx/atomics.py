"""atom and red: read, change and write in one, thread after thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import floats
from ptx.memory import ordering, space_of
from ptx.operands import Address, Instruction
from ptx.spaces import grains, local_index, shared_offset, windows
from ptx.state import Strand
from ptx.step import DTYPES, Result, Step, define, register

_SHIFT = {2: 1, 4: 2, 8: 3}
_TYPES = "b32 u32 s32 f32 b64 u64 s64 f64 f16x2 bf16x2 f16 bf16"


def _wrapping_up(old: Any, limit: Any) -> Any:
    """inc"""
    return old.dtype.type(0) if old >= limit else old + old.dtype.type(1)


def _wrapping_down(old: Any, limit: Any) -> Any:
    """dec"""
    return limit if old == 0 or old > limit else old - old.dtype.type(1)


_CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new, "inc": _wrapping_up, "dec": _wrapping_down,
}  # fmt: skip


def _add_halves(kind: str) -> Callable[[Any, Any], Any]:
    def add(old: Any, new: Any) -> Any:
        base = kind.removesuffix("x2")
        if kind == "f16":
            return (old.astype("f4") + new.astype("f4")).astype("f2")
        if kind == "bf16":
            wide = floats.from_bf16(np.atleast_1d(old)) + floats.from_bf16(np.atleast_1d(new))
            return floats.bf16_bits(wide)[0]
        pairs = [floats.unpack(base)(np.atleast_1d(x)) for x in (old, new)]
        return floats.pack(pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1], base)[0]

    return add


def _places(strand: Strand, space: str, address: Any, active: Any, size: int, i: Instruction) -> tuple[Any, Any]:
    """The array that holds the elements, and each thread's index in it; notes the access."""
    group, cohort = strand.group, strand.group.cohort
    if space == "shared":
        offset = shared_offset(strand, address, size, active, i)
        cohort.order.on_atomic(group.launch, i, *grains(strand, offset, size, active))
        return cohort.shared[size], strand.full((offset >> _SHIFT[size]) + group.base[size])
    if space == "local":
        index = local_index(strand, address, size, active, i) >> _SHIFT[size]
        return cohort.local.view(f"i{size}"), index
    region, offset = group.launch.memory.place(strand, address, active, size, i)
    elements = strand.full(offset // region.item)
    group.launch.memory.learn(group.numbers[:, 0])
    region.note_atomic(elements if active is None else elements[active], max(1, size // region.item))
    return region.arrays[size], strand.full(offset >> _SHIFT[size])


@define("atom", "red")
def _(i: Instruction) -> Step:
    space = space_of(i)
    ordering(i)
    how = i.one_of("add min max and or xor exch inc dec cas")
    i.flag("noftz")
    kind = i.one_of(_TYPES)
    dtype = DTYPES[kind]
    size = int(dtype[1])
    change = _add_halves(kind) if "f16" in kind else _CHANGES.get(how)
    if "f16" in kind and how != "add":
        raise i.refuse("form of atom")
    result = register(i, i.operands[0]) if i.name == "atom" else None
    address, *values = i.operands[1:] if result else i.operands
    if not isinstance(address, Address):
        raise i.refuse("address")

    def run(strand: Strand, where: Any, value: Any, *swap: Any, guard: Any) -> Any:
        active = strand.active(guard)
        out = np.zeros((strand.group.count, strand.group.threads), dtype)
        if active is None or active.any():
            parts = windows(strand, where, active) if space == "generic" else [(space, where, active)]
            for each, at, who in parts:
                array, index = _places(strand, each, at, who, size, i)
                chosen = np.nonzero(strand.full(True) if who is None else who)
                array = array.view(dtype)
                new, wanted = strand.full(value), strand.full(swap[0]) if swap else None
                for cta, thread in zip(*chosen, strict=True):
                    place = index[cta, thread]
                    old = array[place]
                    out[cta, thread] = old
                    if wanted is not None:
                        array[place] = wanted[cta, thread] if old == new[cta, thread] else old
                    else:
                        array[place] = change(old, new[cta, thread])  # type: ignore[misc]
        return out

    results: tuple[Result, ...] = ((result, dtype),) if result else ()
    return Step(run, ((address, "at"), *((each, dtype) for each in values)), results, machine=True, wide=True)
