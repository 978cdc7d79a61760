"""ld and st: scalars and vectors, of each state space."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.operands import Address, Instruction, Operand, Symbol, Vector
from ptx.regions import ACCESS
from ptx.spaces import LOADS, STORES
from ptx.state import Strand
from ptx.step import DTYPES, Step, define, registers

_TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"


def space_of(i: Instruction) -> str:
    """Take the state space; "generic" where none is named."""
    found = i.one_of("global shared shared::cta local const param param::entry param::func", "generic")
    return found.split("::")[0]


def ordering(i: Instruction) -> None:
    """Take how strong an access is: the machine is sequentially consistent, its races are found apart."""
    i.flag("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
    i.flag("cta", "cluster", "gpu", "sys")
    i.cached()


def address_of(i: Instruction, operand: Operand, space: str) -> tuple[Operand, str]:
    if not isinstance(operand, Address):
        raise i.refuse(f"address {operand}")
    return operand, "at"


def idle(mask: Any) -> bool:
    return mask is not None and not mask.any()


@define("ld")
def _(i: Instruction) -> Step:
    space = space_of(i)
    ordering(i)
    count = int(i.one_of("v2 v4 v8", "v1")[1])
    kind = i.one_of(_TYPES)
    dtype = DTYPES[kind]
    size = int(dtype[1])
    destinations = registers(i, i.operands[0])
    if len(destinations) != count:
        raise i.refuse(f"{len(destinations)} destinations")
    results = tuple((each, dtype) for each in destinations)
    address = i.operands[1]
    if space == "param" and isinstance(address, Address) and isinstance(address.base, Symbol):
        name, offset = address.base.name, address.offset

        def parameter(strand: Strand, guard: Any) -> Any:
            values = [strand.group.launch.parameter(name, offset + size * n, size, dtype, i) for n in range(count)]
            return values if count > 1 else values[0]

        return Step(parameter, (), results, machine=True)
    load = LOADS["const" if space == "param" else space]
    raw = ACCESS[size].str[1:]
    spread = space in ("global", "generic")

    def run(strand: Strand, where: Any, guard: Any) -> Any:
        active = strand.active(guard)
        if active is not None and spread:
            strand.group.launch.partial.add(i.line)
        values = [np.zeros((1, 1), raw)] * count if idle(active) else load(strand, where, size, count, active, i)
        values = [value.view(dtype) for value in values]
        return values if count > 1 else values[0]

    return Step(run, (address_of(i, address, space),), results, machine=True)


@define("st")
def _(i: Instruction) -> Step:
    space = space_of(i)
    ordering(i)
    count = int(i.one_of("v2 v4 v8", "v1")[1])
    size = int(DTYPES[i.one_of(_TYPES)][1])
    values = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    if len(values) != count:
        raise i.refuse(f"{len(values)} sources")
    if space not in STORES:
        raise i.refuse(f"a store to {space}")
    store = STORES[space]
    raw = ACCESS[size].str[1:]
    spread = space in ("global", "generic")

    def run(strand: Strand, where: Any, *items: Any, guard: Any) -> None:
        active = strand.active(guard)
        if active is not None and spread:
            strand.group.launch.partial.add(i.line)
        if not idle(active):
            store(strand, where, size, list(items), active, i)

    sources = (address_of(i, i.operands[0], space), *((value, raw) for value in values))
    return Step(run, sources, machine=True, wide=True)
