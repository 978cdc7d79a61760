"""mov and selp: values from one register to another, packed and unpacked, and addresses of variables."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.operands import Immediate, Instruction, Register, Special, Vector
from ptx.step import DTYPES, Step, define, register, registers, simple, unsigned

_KINDS = "pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64"


@define("mov")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(f"{_KINDS} b128")] if "b128" not in i.opcode else "i8"
    destination, source = i.operands
    size = int(dtype[1])
    if isinstance(destination, Vector):
        parts = registers(i, destination)
        part, wide = f"u{size // len(parts)}", unsigned(dtype)
        bits = 8 * (size // len(parts))

        def split(value: Any) -> list[Any]:
            return [(value >> np.array(bits * n, wide)).astype(part) for n in range(len(parts))]

        return Step(split, ((source, wide),), tuple((each, part) for each in parts))
    if isinstance(source, Vector):
        count = len(source.items)
        part, wide = f"u{size // count}", unsigned(dtype)

        def join(*values: Any) -> Any:
            whole = values[0].astype(wide)
            for n, value in enumerate(values[1:], 1):
                whole = whole | (value.astype(wide) << np.array(8 * size // count * n, wide))
            return whole

        return simple_join(i, join, wide, part)
    if not isinstance(source, (Register, Immediate, Special)):
        dtype = f"i{size}"  # an address
    return simple(i, lambda value: value, dtype, dtype)


def simple_join(i: Instruction, join: Any, wide: str, part: str) -> Step:
    destination, source = i.operands
    assert isinstance(source, Vector)
    return Step(join, tuple((each, part) for each in source.items), ((register(i, destination), wide),))


@define("selp")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(_KINDS)]
    destination, a, b, predicate = i.operands
    sources = ((predicate, "b1"), (a, dtype), (b, dtype))
    return Step(np.where, sources, ((register(i, destination), dtype),))


@define("slct")
def _(i: Instruction) -> Step:
    dtype, by = DTYPES[i.one_of(_KINDS)], i.one_of("s32 f32")
    # two types: the first found is the result's, so an s32 or f32 that stands last is the selector's
    return simple(i, lambda a, b, c: np.where(c >= 0, a, b), dtype, dtype, dtype, DTYPES[by])


@define("nanosleep", "griddepcontrol", "prefetch")
def _(i: Instruction) -> Step:
    """No effect here: waits for time, hints, and the order of launches."""
    i.begin()
    for each in i.opcode.split(".")[1:]:
        i.flag(each)
    return Step(lambda: None)
