"""Rounding by exact rational arithmetic, and how the floating-point instructions are held to it."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction

from ptx.snippet import compute

HALVES = ["f16", "bf16"]
# bits of the fraction, smallest exponent of a normal number, largest exponent
FORMATS = {"f64": (52, -1022, 1023), "f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127)}
_CODES = {"f64": ("<d", "<Q"), "f32": ("<f", "<I"), "f16": ("<e", "<H")}


def bits_of(number: float, kind: str) -> int:
    """The bits of a number that the format holds exactly."""
    if kind == "bf16":
        return bits_of(number, "f32") >> 16
    code, unsigned = _CODES[kind]
    found: int = struct.unpack(unsigned, struct.pack(code, number))[0]
    return found


def number_of(bits: int, kind: str) -> float:
    if kind == "bf16":
        return number_of(bits << 16, "f32")
    code, unsigned = _CODES[kind]
    found: float = struct.unpack(code, struct.pack(unsigned, bits))[0]
    return found


def rounded(exact: Fraction, kind: str, how: str = "rn") -> float:
    """An exact number in a format: to nearest even, or toward zero ("rz")."""
    digits, lowest, highest = FORMATS[kind]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = max(math.floor(math.log2(size)) if size > Fraction(1, 2**1000) else -2000, lowest)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > lowest and size < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - digits)
    count = math.floor(size / step) if how == "rz" else round(size / step)  # Python rounds a tie to even
    found = count * step
    sign = -1 if exact < 0 else 1
    if found >= Fraction(2) ** (highest + 1):
        largest = (2 - Fraction(1, 2**digits)) * Fraction(2) ** highest
        return sign * (float(largest) if how == "rz" else math.inf)
    return sign * float(found)


def numbers(kind: str, count: int = 60) -> list[float]:
    """Finite numbers of a format: edges, neighbours of powers of two, and some by chance."""
    chance = random.Random(kind)
    found = [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, -2.5, 0.1, 1e-3, 1024.0, 65504.0, -7e-5, 5e-8]
    found += [1 + 2.0**-n for n in (7, 8, 10, 11, 12, 23)] + [1 - 2.0**-n for n in (8, 9, 11, 12, 24)]
    found += [chance.uniform(-4, 4) * 2.0 ** chance.randint(-12, 12) for _ in range(count)]
    return [rounded(Fraction(each), kind) if each else each for each in found]


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def hold(
    opcode: str, kind: str, rows: list[tuple[float, ...]], expected: Callable[..., float], result: str = ""
) -> None:
    """The instruction's results on rows of operands; halves travel as bits."""
    result = result or kind
    pack = (lambda each: bits_of(each, kind)) if kind in HALVES else (lambda each: each)
    columns = [[pack(each) for each in column] for column in zip(*rows, strict=True)]
    for begin in range(0, len(rows), 512):
        part = [column[begin : begin + 512] for column in columns]
        got = compute(opcode, result, [kind] * len(part), *part)
        got = [number_of(each, result) if result in HALVES else each for each in got]
        for row, a in zip(rows[begin : begin + 512], got, strict=True):
            b = expected(*row)
            assert same(a, b), f"{opcode} {row}: got {a!r}, needs {b!r}"


def exactly(function: Callable[..., Fraction], kind: str) -> Callable[..., float]:
    """An operation on exact numbers, rounded once; a result of zero has the sign that IEEE 754 says, as Python's."""

    def expected(*row: float) -> float:
        exact = function(*map(Fraction, row))
        return rounded(exact, kind) if exact else float(function(*row))

    return expected
