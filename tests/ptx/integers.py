"""Integer arithmetic, logic, shifts, bit fields and comparisons of integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.operands import Instruction
from ptx.step import BITS, DTYPES, INTEGERS, Step, define, number, simple, unsigned

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def low_product(a: Any, b: Any) -> Any:
    return a * b


def high_product(a: Any, b: Any) -> Any:
    """The upper half of a product of twice the bits."""
    dtype = a.dtype
    bits = 8 * dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(dtype)
    # 64 bits by parts of 32, carries kept; a negative factor takes the other one off the upper half
    x, y, half, mask = a.view("u8"), b.view("u8"), np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(dtype)


def wide_product(a: Any, b: Any) -> Any:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def quotient(a: Any, b: Any) -> Any:
    """Toward zero. Division by zero is undefined in PTX; GPUs give all ones."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = floor + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, np.array(-1).astype(a.dtype), floor).astype(a.dtype)


def remainder(a: Any, b: Any) -> Any:
    """What `quotient` leaves; its sign is the dividend's."""
    return a - quotient(a, b) * b


def shift_left(a: Any, count: Any) -> Any:
    """Counts past the width give 0."""
    bits = 8 * a.dtype.itemsize
    safe = np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
    return np.where(count < bits, a << safe, a.dtype.type(0))


def shift_right(a: Any, count: Any) -> Any:
    """Signed numbers are filled with their sign; counts past the width are clamped to it."""
    bits = 8 * a.dtype.itemsize
    safe = np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
    return a >> safe if a.dtype.kind == "i" else np.where(count < bits, a >> safe, a.dtype.type(0))


def funnel(left: bool, wrap: bool) -> Any:
    def shift(a: Any, b: Any, count: Any) -> Any:
        """[b, a] as 64 bits, shifted: its upper half to the left, its lower half to the right."""
        n = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype("u8")
        both = a.astype("u8") | (b.astype("u8") << np.uint64(32))
        out = (both << n) >> np.uint64(32) if left else both >> n
        return out.astype("u4")

    return shift


def extract(a: Any, position: Any, length: Any) -> Any:
    """bfe: `length` bits from `position` on; signed ones are filled with the field's, or the number's, last bit."""
    bits = 8 * a.dtype.itemsize
    position, length = (each & np.uint32(255) for each in (position, length))
    out = np.zeros(np.broadcast_shapes(a.shape, position.shape, length.shape), unsigned(a.dtype.str[1:]))
    pattern = a.view(out.dtype)
    one = out.dtype.type(1)
    last = np.minimum(position + np.maximum(length, 1) - np.uint32(1), np.uint32(bits - 1)).astype(out.dtype)
    sign = np.where(length == 0, out.dtype.type(0), (pattern >> last) & one) if a.dtype.kind == "i" else out
    for i in range(bits):
        at = position + np.uint32(i)
        inside = (np.uint32(i) < length) & (at < bits)
        bit = (pattern >> np.minimum(at, np.uint32(bits - 1)).astype(out.dtype)) & one
        out = out | (np.where(inside, bit, sign) << out.dtype.type(i))
    return out.view(a.dtype)


def insert(a: Any, b: Any, position: Any, length: Any) -> Any:
    """bfi: the low `length` bits of a put into b at `position`."""
    bits = 8 * a.dtype.itemsize
    position, length = (each & np.uint32(255) for each in (position, length))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, position.shape, length.shape), a.dtype)
    for i in range(bits):
        inside = (np.uint32(i) >= position) & (np.uint32(i) < position + length)
        at = np.minimum(np.uint32(i) - np.minimum(position, np.uint32(i)), np.uint32(bits - 1)).astype(a.dtype)
        bit = np.where(inside, a >> at, b >> a.dtype.type(i)) & a.dtype.type(1)
        out = out | (bit << a.dtype.type(i))
    return out


def permute(a: Any, b: Any, selector: Any) -> Any:
    """prmt: each byte of the result is one of the eight of [b, a]; bit 3 of its selector repeats that byte's sign."""
    both = a.astype("u8") | (b.astype("u8") << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), "u4")
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((pick & np.uint32(7)).astype("u8") * np.uint64(8))) & np.uint64(255)).astype("u4")
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return out


def truth_table(table: int) -> Any:
    def logic(a: Any, b: Any, c: Any) -> Any:
        """lop3: bit (a b c) of the table, for each bit."""
        out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return logic


def ones(a: Any) -> Any:
    """popc"""
    out = np.zeros(a.shape, "u4")
    for i in range(8 * a.dtype.itemsize):
        out += ((a >> a.dtype.type(i)) & a.dtype.type(1)).astype("u4")
    return out


def leading_zeros(a: Any) -> Any:
    """clz"""
    return np.uint32(8 * a.dtype.itemsize - 1) - highest_bit(a)


def highest_bit(a: Any) -> Any:
    """bfind: position of the highest bit, all ones where there is none."""
    out = np.full(a.shape, 0xFFFFFFFF, "u4")
    for i in range(8 * a.dtype.itemsize):
        out = np.where((a >> a.dtype.type(i)) & a.dtype.type(1), np.uint32(i), out)
    return out


def shift_to_highest(a: Any) -> Any:
    """bfind.shiftamt: by how much a shift makes the highest bit the leftmost, all ones where there is none."""
    return np.where(a == 0, np.uint32(0xFFFFFFFF), leading_zeros(a))


def reversed_bits(a: Any) -> Any:
    """brev"""
    bits = 8 * a.dtype.itemsize
    out = np.zeros(a.shape, a.dtype)
    for i in range(bits):
        out = out | (((a >> a.dtype.type(i)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - i))
    return out


# ------------------------------------------------------------------------------------------------------ definitions


@define("and", "or", "xor")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(f"pred {BITS}")]
    return simple(i, LOGIC[i.name], dtype, dtype, dtype)


@define("not")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(f"pred {BITS}")]
    return simple(i, np.invert, dtype, dtype)


@define("cnot")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(BITS)]
    return simple(i, lambda a: (a == 0).astype(dtype), dtype, dtype)


@define("rem")
def divide(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of(INTEGERS)]
    return simple(i, quotient if i.name == "div" else remainder, dtype, dtype, dtype)


@define("shl", "shr")
def _(i: Instruction) -> Step:
    kind = i.one_of(BITS if i.name == "shl" else f"{BITS} {INTEGERS}")
    dtype = unsigned(DTYPES[kind]) if kind[0] == "b" else DTYPES[kind]
    return simple(i, shift_left if i.name == "shl" else shift_right, dtype, dtype, "u4")


@define("shf")
def _(i: Instruction) -> Step:
    left, wrap = i.one_of("l r") == "l", i.one_of("wrap clamp") == "wrap"
    i.one_of("b32")
    return simple(i, funnel(left, wrap), "u4", "u4", "u4", "u4")


@define("bfe")
def _(i: Instruction) -> Step:
    dtype = DTYPES[i.one_of("u32 u64 s32 s64")]
    return simple(i, extract, dtype, dtype, "u4", "u4")


@define("bfi")
def _(i: Instruction) -> Step:
    dtype = unsigned(DTYPES[i.one_of("b32 b64")])
    return simple(i, insert, dtype, dtype, dtype, "u4", "u4")


@define("prmt")
def _(i: Instruction) -> Step:
    i.one_of("b32")
    return simple(i, permute, "u4", "u4", "u4", "u4")


@define("lop3")
def _(i: Instruction) -> Step:
    i.one_of("b32")
    table = number(i, i.operands[-1])
    i.operands = i.operands[:4]
    return simple(i, truth_table(table), "u4", "u4", "u4", "u4")


@define("popc", "clz", "brev", "bfind")
def _(i: Instruction) -> Step:
    dtype = unsigned(DTYPES[i.one_of("b32 b64" if i.name != "bfind" else "u32 u64")])
    found = shift_to_highest if i.name == "bfind" and i.flag("shiftamt") else highest_bit
    function = {"popc": ones, "clz": leading_zeros, "brev": reversed_bits, "bfind": found}[i.name]
    return simple(i, function, dtype if i.name == "brev" else "u4", dtype)


def arithmetic(i: Instruction) -> Step:
    """add, sub, mul, mad, min, max, neg, abs of integers; `floats` sends them here."""
    kind = i.one_of(INTEGERS)
    dtype = DTYPES[kind]
    if i.name in ("mul", "mad"):
        part = i.one_of("lo hi wide")
        product = {"lo": low_product, "hi": high_product, "wide": wide_product}[part]
        result = f"{dtype[0]}{2 * int(dtype[1])}" if part == "wide" else dtype
        if i.name == "mul":
            return simple(i, product, result, dtype, dtype)
        return simple(i, lambda a, b, c: product(a, b) + c, result, dtype, dtype, result)
    if i.name in ("neg", "abs"):
        return simple(i, {"neg": np.negative, "abs": np.abs}[i.name], dtype, dtype)
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[i.name]
    return simple(i, function, dtype, dtype, dtype)
