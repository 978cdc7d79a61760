"""Integer instructions of the machine against the definitions of the PTX manual, in Python's own integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ptx.snippet import compute

EDGES = [0, 1, 2, 3, 5, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x12345678, 0x7FFFFFFF, 0x80000000]
EDGES += [0xFFFFFFFF, 0xDEADBEEF, 0x123456789ABCDEF0, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF]
COUNTS = [0, 1, 4, 7, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000]


def bits_of(kind: str) -> int:
    return int(kind[1:])


def value(number: int, kind: str) -> int:
    """What the bits of a number mean as a type."""
    number &= 2 ** bits_of(kind) - 1
    return number - 2 ** bits_of(kind) if kind[0] == "s" and number >> (bits_of(kind) - 1) else number


def pairs(*sets: list[int]) -> list[list[int]]:
    """Every combination, as one column an operand."""
    rows: list[tuple[int, ...]] = [()]
    for each in sets:
        rows = [(*row, number) for row in rows for number in each]
    return [list(column) for column in zip(*rows, strict=True)]


def hold(opcode: str, result: str, sources: list[str], columns: list[list[int]], expected: Callable[..., int]) -> None:
    """The instruction gives what the definition gives, on every row of operands."""
    given = [[value(number, kind) for number in column] for kind, column in zip(sources, columns, strict=True)]
    rows = list(zip(*given, strict=True))
    for begin in range(0, len(rows), 512):
        part = rows[begin : begin + 512]
        got = compute(opcode, result, sources, *map(list, zip(*part, strict=True)))
        want = [value(int(expected(*row)), result) for row in part]
        wrong = [(row, a, b) for row, a, b in zip(part, got, want, strict=True) if value(a, result) != b]
        assert not wrong, f"{opcode} {wrong[:3]}"


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


WIDTHS = ["u16", "s16", "u32", "s32", "u64", "s64"]
TWO: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("name", TWO)
def test_arithmetic(name: str, kind: str) -> None:
    hold(f"{name}.{kind}", kind, [kind, kind], pairs(EDGES, EDGES), TWO[name])


@pytest.mark.parametrize("kind", WIDTHS)
def test_upper_half_of_a_product(kind: str) -> None:
    """mul.hi: bits n to 2n - 1 of the product."""
    hold(f"mul.hi.{kind}", kind, [kind, kind], pairs(EDGES, EDGES), lambda a, b: (a * b) >> bits_of(kind))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    wide = f"{kind[0]}{2 * bits_of(kind)}"
    hold(f"mul.wide.{kind}", wide, [kind, kind], pairs(EDGES, EDGES), lambda a, b: a * b)
    few = EDGES[::3]
    hold(f"mad.wide.{kind}", wide, [kind, kind, wide], pairs(few, few, few), lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", WIDTHS)
def test_products_and_sums(kind: str) -> None:
    few = EDGES[::3]
    hold(f"mad.lo.{kind}", kind, [kind] * 3, pairs(few, few, few), lambda a, b, c: a * b + c)
    hold(f"mad.hi.{kind}", kind, [kind] * 3, pairs(few, few, few), lambda a, b, c: (a * b >> bits_of(kind)) + c)


@pytest.mark.parametrize("kind", WIDTHS)
def test_division(kind: str) -> None:
    """Toward zero; the remainder has the sign of the dividend."""
    divisors = [each for each in EDGES if value(each, kind)]
    hold(f"div.{kind}", kind, [kind, kind], pairs(EDGES, divisors), toward_zero)
    hold(f"rem.{kind}", kind, [kind, kind], pairs(EDGES, divisors), lambda a, b: a - b * toward_zero(a, b))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind: str) -> None:
    hold(f"neg.{kind}", kind, [kind], [EDGES], lambda a: -a)
    hold(f"abs.{kind}", kind, [kind], [EDGES], abs)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    kind, same = f"b{bits}", f"u{bits}"
    for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        hold(f"{name}.{kind}", same, [same, same], pairs(EDGES, EDGES), function)
    hold(f"not.{kind}", same, [same], [EDGES], lambda a: ~a)
    hold(f"cnot.{kind}", same, [same], [EDGES], lambda a: a == 0)


def test_logic_of_predicates() -> None:
    a, b = [0, 0, 1, 1], [0, 1, 0, 1]
    assert compute("and.pred", "pred", ["pred", "pred"], a, b) == [0, 0, 0, 1]
    assert compute("or.pred", "pred", ["pred", "pred"], a, b) == [0, 1, 1, 1]
    assert compute("xor.pred", "pred", ["pred", "pred"], a, b) == [0, 1, 1, 0]
    assert compute("not.pred", "pred", ["pred"], a) == [1, 1, 0, 0]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits: int) -> None:
    """Counts above the width are clamped to it; a signed shift to the right is filled with the sign."""
    for kind in (f"u{bits}", f"s{bits}"):
        hold(f"shr.{kind}", kind, [kind, "u32"], pairs(EDGES, COUNTS), lambda a, n: a >> min(n, bits))
    same = f"u{bits}"
    hold(f"shr.b{bits}", same, [same, "u32"], pairs(EDGES, COUNTS), lambda a, n: a >> min(n, bits))
    hold(f"shl.b{bits}", same, [same, "u32"], pairs(EDGES, COUNTS), lambda a, n: a << min(n, bits))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode: str) -> None:
    def count(c: int) -> int:
        return c & 31 if mode == "wrap" else min(c, 32)

    columns = pairs(EDGES[::2], EDGES[1::3], COUNTS)
    words = ["u32"] * 3
    # shf.l: d = (b << n) | (a >> (32 - n)); shf.r: d = (b << (32 - n)) | (a >> n)
    hold(f"shf.l.{mode}.b32", "u32", words, columns, lambda a, b, c: (b << count(c)) | (a >> (32 - count(c))))
    hold(f"shf.r.{mode}.b32", "u32", words, columns, lambda a, b, c: (b << (32 - count(c))) | (a >> count(c)))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    """The manual's pseudocode, bit by bit."""
    top = bits_of(kind) - 1

    def defined(a: int, b: int, c: int) -> int:
        position, length = b & 0xFF, c & 0xFF
        word = a & 2 ** (top + 1) - 1
        sign = 0 if kind[0] == "u" or length == 0 else word >> min(position + length - 1, top) & 1
        return sum(
            (word >> (position + i) & 1 if i < length and position + i <= top else sign) << i for i in range(top + 1)
        )

    hold(f"bfe.{kind}", kind, [kind, "u32", "u32"], pairs(EDGES[::2], COUNTS, COUNTS), defined)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    def defined(a: int, b: int, c: int, d: int) -> int:
        position, length, out = c & 0xFF, d & 0xFF, b
        for i in range(length):
            if position + i < bits:
                out = out & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
        return out

    kind = f"u{bits}"
    columns = pairs(EDGES[::4], EDGES[1::4], COUNTS, COUNTS)
    hold(f"bfi.b{bits}", kind, [kind, kind, "u32", "u32"], columns, defined)


def test_byte_permute() -> None:
    """Each result byte: three bits of selector choose among eight bytes, the fourth repeats the byte's sign."""

    def defined(a: int, b: int, c: int) -> int:
        source = (a | b << 32).to_bytes(8, "little")
        out = 0
        for i in range(4):
            pick = c >> 4 * i & 15
            byte = source[pick & 7]
            out |= (0xFF * (byte >> 7) if pick & 8 else byte) << 8 * i
        return out

    selectors = [0x3210, 0x7654, 0x5410, 0x7773, 0xFEDC, 0xBA98, 0x0000, 0x1032, 0x8F81]
    hold("prmt.b32", "u32", ["u32"] * 3, pairs(EDGES[3:20:2], EDGES[2:20:3], selectors), defined)


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1D, 0x00, 0xFF])
def test_three_input_logic(table: int) -> None:
    columns = pairs([0x0F0F00FF, 0xDEADBEEF], [0x33335555, 0x12345678], [0xAAAACCCC, 0x80000001])

    def defined(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    got = compute("lop3.b32", "u32", ["u32"] * 3, *columns, tail=f"{table:#x}")
    assert got == [defined(*row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits: int) -> None:
    kind = f"u{bits}"
    hold(f"popc.b{bits}", "u32", [kind], [EDGES], lambda a: a.bit_count())
    hold(f"clz.b{bits}", "u32", [kind], [EDGES], lambda a: bits - a.bit_length())
    hold(f"brev.b{bits}", kind, [kind], [EDGES], lambda a: int(f"{a:0{bits}b}"[::-1], 2))
    hold(f"bfind.{kind}", "u32", [kind], [EDGES], lambda a: a.bit_length() - 1)


@pytest.mark.parametrize("kind", WIDTHS)
def test_comparisons(kind: str) -> None:
    defined: dict[str, Any] = {
        "eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__
    }  # fmt: skip
    if kind[0] == "u":
        defined |= {"lo": int.__lt__, "ls": int.__le__, "hi": int.__gt__, "hs": int.__ge__}
    columns = pairs(EDGES, EDGES)
    rows = list(zip(*([value(each, kind) for each in column] for column in columns), strict=True))
    for how, function in defined.items():
        for form in (kind, f"b{kind[1:]}") if how in ("eq", "ne") else (kind,):
            got = compute(f"setp.{how}.{form}", "pred", [kind, kind], *columns)
            assert got == [function(*row) for row in rows], (how, form)


def test_comparisons_with_a_predicate() -> None:
    """setp.cmp.boolop: the comparison and a third operand."""
    a, b, c = [1, 1, 2, 2], [1, 1, 1, 1], [0, 1, 0, 1]
    assert compute("setp.eq.and.s32", "pred", ["s32", "s32", "pred"], a, b, c) == [0, 1, 0, 0]
    assert compute("setp.eq.or.s32", "pred", ["s32", "s32", "pred"], a, b, c) == [1, 1, 0, 1]
    assert compute("setp.eq.xor.s32", "pred", ["s32", "s32", "pred"], a, b, c) == [1, 0, 0, 1]


def test_selection() -> None:
    for kind, form in (("u16", "b16"), ("u32", "b32"), ("f32", "f32")):
        assert compute(f"selp.{form}", kind, [kind, kind, "pred"], [1, 2], [3, 4], [1, 0]) == [1, 4]
    assert compute("slct.u32.s32", "u32", ["u32", "u32", "s32"], [1, 2, 3], [4, 5, 6], [0, -1, 7]) == [1, 5, 3]
