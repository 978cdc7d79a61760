"""Rounding by exact rational arithmetic: what the floating-point instructions are held to."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

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
