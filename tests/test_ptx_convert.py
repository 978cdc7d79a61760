"""Conversions of the machine against exact arithmetic, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from ptx.rounding import HALVES, number_of, numbers, rounded, same
from ptx.snippet import compute

NAN, INF = math.nan, math.inf
AWKWARD = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49, -3.51, 1e10, -1e10, 3e38, -3e38, INF, -INF, NAN, 255.5]


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_floats_to_integers(kind: str) -> None:
    """Rounded as named, clamped to the range; NaN is 0."""
    bits = int(kind[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    ways: dict[str, Callable[[float], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    given = [rounded(Fraction(x), "f32") if math.isfinite(x) and x else x for x in AWKWARD]
    for how, function in ways.items():
        want = [
            0 if x != x else low if x == -INF else high if x == INF else min(max(function(x), low), high) for x in given
        ]
        stored = kind if bits > 8 else f"{kind[0]}16"
        got = compute(f"cvt.{how}.{kind}.f32", stored, ["f32"], given)
        assert got == want, (how, kind)


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_to_floats(source: str) -> None:
    bits = int(source[1:])
    given = [0, 1, 2, 255, 2**15 - 1, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**53 + 1, 2**63 - 1]
    given = [each for each in given if each < 2 ** (bits - 1)] + ([-1, -(2 ** (bits - 1))] if source[0] == "s" else [])
    for kind in ("f32", "f64"):
        want = [rounded(Fraction(each), kind) for each in given]
        assert compute(f"cvt.rn.{kind}.{source}", kind, [source], given) == want
    if bits <= 32:
        want = [rounded(Fraction(each), "f32", "rz") for each in given]
        assert compute(f"cvt.rz.f32.{source}", "f32", [source], given) == want
        for kind in HALVES:
            got = compute(f"cvt.rn.{kind}.{source}", "b16", [source], given)
            assert [number_of(each, kind) for each in got] == [rounded(Fraction(each), kind) for each in given], kind


def test_integers_to_integers() -> None:
    """Widened by their own sign, cut to the width, clamped where .sat is asked for."""
    assert compute("cvt.s64.s32", "s64", ["s32"], [-1, 5]) == [-1, 5]
    assert compute("cvt.u64.u32", "u64", ["u32"], [0xFFFFFFFF]) == [0xFFFFFFFF]
    assert compute("cvt.u32.u64", "u32", ["u64"], [0x123456789A]) == [0x3456789A]
    assert compute("cvt.u64.u16", "u64", ["u16"], [0x8001]) == [0x8001]
    assert compute("cvt.u32.u16", "u32", ["u16"], [0x8001]) == [0x8001]
    assert compute("cvt.u16.u32", "u16", ["u32"], [0x18001]) == [0x8001]
    assert compute("cvt.u16.u64", "u16", ["u64"], [0x100018001]) == [0x8001]
    assert compute("cvt.s32.s8", "s32", ["s32"], [0x80, 0x17F]) == [-128, 127]
    assert compute("cvt.u32.u8", "u32", ["s32"], [0x180]) == [0x80]
    assert compute("cvt.s16.s32", "s16", ["s32"], [0x18000]) == [-32768]
    assert compute("cvt.sat.s16.s32", "s16", ["s32"], [40000, -40000, 7]) == [32767, -32768, 7]
    assert compute("cvt.sat.u16.s32", "u16", ["s32"], [-5, 70000]) == [0, 65535]


@pytest.mark.parametrize("kind", HALVES)
def test_halves(kind: str) -> None:
    """float32 to a half, to nearest even; a half to float32, exactly; two to a packed pair, the first one above."""
    wide = [*numbers("f32"), *numbers(kind), INF, -INF, 65519.0, 65520.0, 3.4e38, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25]
    wide = [rounded(Fraction(each), "f32") if math.isfinite(each) and each else each for each in wide]
    want = [rounded(Fraction(x), kind) if math.isfinite(x) and x else x for x in wide]
    got = compute(f"cvt.rn.{kind}.f32", "b16", ["f32"], wide)
    assert all(same(number_of(a, kind), b) for a, b in zip(got, want, strict=True))
    back = compute(f"cvt.f32.{kind}", "f32", [kind], got)
    assert all(same(a, b) for a, b in zip(back, want, strict=True))
    both = compute(f"cvt.rn.{kind}x2.f32", "u32", ["f32", "f32"], wide, wide[::-1])
    assert [each >> 16 for each in both] == got
    assert [each & 0xFFFF for each in both] == got[::-1]
    assert math.isnan(number_of(compute(f"cvt.rn.{kind}.f32", "b16", ["f32"], [NAN])[0], kind))


def test_float64_to_narrower() -> None:
    given = [1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1 + 2.0**-9, 1 + 2.0**-9 + 2.0**-40, -0.1, 1e300]
    assert compute("cvt.rn.f32.f64", "f32", ["f64"], given) == [rounded(Fraction(x), "f32") for x in given]
    assert compute("cvt.rz.f32.f64", "f32", ["f64"], given) == [rounded(Fraction(x), "f32", "rz") for x in given]
    assert compute("cvt.f64.f32", "f64", ["f32"], [0.5, -3.0]) == [0.5, -3.0]
    for kind in HALVES:
        got = compute(f"cvt.rn.{kind}.f64", "b16", ["f64"], given)
        assert [number_of(each, kind) for each in got] == [rounded(Fraction(x), kind) for x in given]


def test_whole_floats_and_tf32() -> None:
    assert compute("cvt.rni.f32.f32", "f32", ["f32"], [2.5, -1.2]) == [2.0, -1.0]
    assert compute("cvt.rmi.f32.f32", "f32", ["f32"], [2.5, -1.2]) == [2.0, -2.0]
    assert compute("cvt.rpi.f32.f32", "f32", ["f32"], [2.5, -1.2]) == [3.0, -1.0]
    assert compute("cvt.rzi.f32.f32", "f32", ["f32"], [2.5, -1.2]) == [2.0, -1.0]
    assert compute("cvt.sat.f32.f32", "f32", ["f32"], [2.5, -1.2, 0.25, NAN]) == [1.0, 0.0, 0.25, 0.0]
    tie = 1 + 2.0**-11  # ties go away from zero
    assert compute("cvt.rna.tf32.f32", "f32", ["f32"], [tie, -tie, 1 + 2.0**-12]) == [1 + 2.0**-10, -1 - 2.0**-10, 1.0]
