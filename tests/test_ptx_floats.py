"""Floating-point instructions of the machine against exact arithmetic, rounded once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from ptx.rounding import HALVES, bits_of, exactly, hold, number_of, numbers, rounded, same
from ptx.snippet import compute

NAN, INF = math.nan, math.inf


SUMS: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("name", SUMS)
def test_arithmetic(name: str, kind: str) -> None:
    rows = list(itertools.product(numbers(kind, 15), repeat=2))
    hold(f"{name}.{kind}", kind, rows, exactly(SUMS[name], kind))


def test_ties_of_a_fused_product() -> None:
    """a b + c is rounded once: cases that go wrong when the sum is rounded to float64 first."""
    big = 1 + 2.0**-12
    rows = [(big, big, 2.0**-54), (big, big, -(2.0**-54)), (1.0, 1 + 2.0**-23, 2.0**-24), (big, -big, 2.0**-60)]
    rows += [(2.0**-12 + 1, 2.0**-12 + 1, sign * 2.0**-n) for n in range(40, 70) for sign in (1, -1)]
    hold("fma.rn.f32", "f32", rows, exactly(lambda a, b, c: a * b + c, "f32"))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_fused_products(kind: str) -> None:
    rows = list(itertools.product(numbers(kind, 4)[::2], repeat=3))
    hold(f"fma.rn.{kind}", kind, rows, exactly(lambda a, b, c: a * b + c, kind))


def test_fused_products_of_float64() -> None:
    rows = [(1.5, 2.5, 0.25), (1 + 2.0**-30, 1 - 2.0**-30, -1.0), (3.0, 1 / 3, -1.0)]
    hold("fma.rn.f64", "f64", rows, exactly(lambda a, b, c: a * b + c, "f64"))


def test_packed_pairs() -> None:
    """Each half by itself."""
    for kind in HALVES:
        a, b = numbers(kind, 20), numbers(kind, 20)[::-1]

        def join(low: list[float], high: list[float], kind: str = kind) -> list[int]:
            return [bits_of(x, kind) | bits_of(y, kind) << 16 for x, y in zip(low, high, strict=True)]

        for name, function in SUMS.items():
            got = compute(f"{name}.{kind}x2", "u32", ["u32", "u32"], join(a, b), join(b, a))
            for word, x, y in zip(got, a, b, strict=True):
                assert same(number_of(word & 0xFFFF, kind), exactly(function, kind)(x, y)), (name, kind, x, y)
                assert same(number_of(word >> 16, kind), exactly(function, kind)(y, x)), (name, kind, x, y)


def test_division_and_roots() -> None:
    rows = [(a, b) for a in numbers("f32", 20) for b in numbers("f32", 20) if b]
    divide = exactly(lambda a, b: a / b, "f32")
    hold("div.rn.f32", "f32", rows, divide)
    for form in ("div.full.f32", "div.approx.f32"):  # within two units in the last place
        got = compute(form, "f32", ["f32", "f32"], *map(list, zip(*rows[:512], strict=True)))
        assert all(math.isclose(a, divide(*row), rel_tol=2**-22) for a, row in zip(got, rows, strict=False))
    positive = [(abs(a),) for a in numbers("f32") if a]
    hold("rcp.rn.f32", "f32", positive, exactly(lambda a: 1 / a, "f32"))
    for (a,) in positive:
        (root,) = compute("sqrt.rn.f32", "f32", ["f32"], [a])
        half = Fraction(2) ** (math.frexp(root)[1] - 25)  # of a unit in the last place
        assert (Fraction(root) - half) ** 2 <= Fraction(a) <= (Fraction(root) + half) ** 2


def test_approximations() -> None:
    """Correctly rounded here, so within what the manual allows."""
    given = [each for each in numbers("f32") if 0 < abs(each) < 50]
    functions: dict[str, Callable[[float], float]] = {
        "ex2.approx.ftz": lambda x: 2.0**x, "sin.approx": math.sin, "cos.approx": math.cos, "tanh.approx": math.tanh,
    }  # fmt: skip
    for name, function in functions.items():
        got = compute(f"{name}.f32", "f32", ["f32"], given)
        assert all(math.isclose(a, function(x), rel_tol=2**-23) for a, x in zip(got, given, strict=True)), name
    above = [abs(each) for each in given]
    for name, function in {"lg2.approx": math.log2, "rsqrt.approx": lambda x: x**-0.5}.items():
        got = compute(f"{name}.f32", "f32", ["f32"], above)
        assert all(math.isclose(a, function(x), rel_tol=2**-23, abs_tol=0) for a, x in zip(got, above, strict=True))
    assert compute("ex2.approx.f32", "f32", ["f32"], [-INF, INF, 0.0]) == [0.0, INF, 1.0]
    assert compute("lg2.approx.f32", "f32", ["f32"], [0.0, INF]) == [-INF, INF]


def test_denormals_are_flushed_where_asked_for() -> None:
    """.ftz takes operands below 2^-126 for zero, and gives zero for such results, with their sign."""
    tiny, least = 2.0**-130, 2.0**-126
    one = ["f32"]
    assert compute("abs.ftz.f32", "f32", one, [-tiny, -least, -3.0]) == [0.0, least, 3.0]
    assert compute("abs.f32", "f32", one, [-tiny]) == [tiny]
    rows = [(least, 0.25, 0.0), (-least, 0.25, 0.0), (tiny, 2.0**20, 1.0), (1.5, 2.0, tiny), (least, 1.0, least)]
    flushed = compute("fma.rn.ftz.f32", "f32", 3 * one, *map(list, zip(*rows, strict=True)))
    assert flushed == [0.0, 0.0, 1.0, 3.0, 2 * least]
    assert [math.copysign(1, each) for each in flushed[:2]] == [1.0, -1.0]
    assert compute("fma.rn.f32", "f32", 3 * one, [least], [0.25], [0.0]) == [least / 4]
    assert compute("rsqrt.approx.ftz.f32", "f32", one, [tiny, 4.0, INF]) == [INF, 0.5, 0.0]


def test_signs() -> None:
    for kind in ("f32", "f64", "f16", "bf16"):
        rows = [(each,) for each in [*numbers(kind, 5), INF, -INF]]
        hold(f"neg.{kind}", kind, rows, lambda a: -a)
        hold(f"abs.{kind}", kind, rows, abs)


def test_least_and_greatest() -> None:
    """A number before NaN, -0 before +0; with .NaN, NaN before all."""
    values = [0.0, -0.0, 1.0, -2.0, INF, -INF, NAN]

    def least(a: float, b: float) -> float:
        if math.isnan(a) or math.isnan(b):
            return b if math.isnan(a) else a
        return -0.0 if a == b == 0 and -1.0 in (math.copysign(1, a), math.copysign(1, b)) else min(a, b)

    def greatest(a: float, b: float) -> float:
        return -least(-a, -b)

    rows = list(itertools.product(values, repeat=2))
    for kind in ("f32", "f64", "f16", "bf16"):
        hold(f"min.{kind}", kind, rows, least)
        hold(f"max.{kind}", kind, rows, greatest)
    for kind in ("f32", "f16", "bf16"):
        hold(f"max.NaN.{kind}", kind, rows, lambda a, b: NAN if a != a or b != b else greatest(a, b))
        hold(f"min.NaN.{kind}", kind, rows, lambda a, b: NAN if a != a or b != b else least(a, b))


def test_subnormal_numbers_are_flushed_where_asked() -> None:
    tiny = 2.0**-130
    assert compute("add.f32", "f32", ["f32", "f32"], [tiny], [tiny]) == [2 * tiny]
    got = compute("add.ftz.f32", "f32", ["f32", "f32"], [tiny, -tiny, 2.0**-126], [0.0, -0.0, -(2.0**-127)])
    assert [same(a, b) for a, b in zip(got, [0.0, -0.0, 2.0**-126], strict=True)] == [True] * 3
    got = compute("mul.ftz.f32", "f32", ["f32", "f32"], [2.0**-100, -(2.0**-100)], [2.0**-30, 2.0**-30])
    assert [math.copysign(1, each) for each in got] == [1, -1]
    assert [abs(each) for each in got] == [0, 0]


def test_comparisons() -> None:
    values = [0.0, -0.0, 1.0, -2.0, INF, NAN]
    ordered: dict[str, Callable[[float, float], bool]] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    rows = list(itertools.product(values, repeat=2))
    columns = [list(each) for each in zip(*rows, strict=True)]
    for kind in ("f32", "f64", "f16", "bf16"):
        given = [[bits_of(each, kind) for each in column] for column in columns] if kind in HALVES else columns
        for how, function in ordered.items():
            unordered = [a != a or b != b for a, b in rows]
            want = [function(*row) for row in rows]
            assert compute(f"setp.{how}.{kind}", "pred", [kind, kind], *given) == want, (how, kind)
            either = [x or y for x, y in zip(want, unordered, strict=True)]
            assert compute(f"setp.{how}u.{kind}", "pred", [kind, kind], *given) == either, (how, kind)
        assert compute(f"setp.nan.{kind}", "pred", [kind, kind], *given) == unordered
        assert compute(f"setp.num.{kind}", "pred", [kind, kind], *given) == [not each for each in unordered]


def test_two_floats_in_64_bits() -> None:
    """f32x2 of sm_100 and later: each half as by itself."""
    values = [1.5, -0.0, 3e38, 1 + 2.0**-23]
    rows = [(a, b, c) for a in values for b in values for c in values[:2]]

    def pack(low: float, high: float) -> int:
        return bits_of(low, "f32") | bits_of(high, "f32") << 32

    columns = [[pack(row[n], row[(n + 1) % 3]) for row in rows] for n in range(3)]
    for name in ("add", "sub", "mul", "fma"):
        count = 3 if name == "fma" else 2
        got = compute(f"{name}.rn.f32x2", "u64", ["u64"] * count, *columns[:count])
        plain = f"{name}.rn.f32"
        low = compute(plain, "f32", ["f32"] * count, *([row[n] for row in rows] for n in range(count)))
        high = compute(plain, "f32", ["f32"] * count, *([row[(n + 1) % 3] for row in rows] for n in range(count)))
        assert got == [pack(*both) for both in zip(low, high, strict=True)], name


@pytest.mark.parametrize("kind", HALVES)
def test_halves_and_a_float(kind: str) -> None:
    """Mixed operands of sm_100 and later: add.f32.bf16 d, a, c; fma.rn.f32.bf16 d, a, b, c."""
    a, b, c = [1.5, -2.0, 0.25], [3.0, 0.5, -8.0], [2.0**-24, 1e10, 7.0]
    x, y = ([bits_of(each, kind) for each in column] for column in (a, b))
    for name, function in (("add", lambda p, r: p + r), ("sub", lambda p, r: p - r)):
        got = compute(f"{name}.rn.f32.{kind}", "f32", [kind, "f32"], x, c)
        exact = [exactly(function, "f32")(p, rounded(Fraction(r), "f32")) for p, r in zip(a, c, strict=True)]
        assert got == exact, name
    got = compute(f"fma.rn.f32.{kind}", "f32", [kind, kind, "f32"], x, y, c)
    exact = [
        exactly(lambda p, q, r: p * q + r, "f32")(p, q, rounded(Fraction(r), "f32"))
        for p, q, r in zip(a, b, c, strict=True)
    ]
    assert got == exact


def test_the_greatest_of_three() -> None:
    rows = list(itertools.product([1.0, -2.0, NAN, 5.0], repeat=3))
    columns = [list(each) for each in zip(*rows, strict=True)]
    for name, function in (("max", max), ("min", min)):
        got = compute(f"{name}.f32", "f32", ["f32"] * 3, *columns)
        want = [function([x for x in row if x == x], default=NAN) for row in rows]
        assert all(same(x, y) for x, y in zip(got, want, strict=True)), name
    got = compute("max.NaN.f32", "f32", ["f32"] * 3, *columns)
    assert [math.isnan(x) for x in got] == [any(math.isnan(x) for x in row) for row in rows]


# ---------------------------------------------------------------------------------------------------- packed and relu


def joined(low: list[float], high: list[float], kind: str) -> list[int]:
    return [bits_of(x, kind) | bits_of(y, kind) << 16 for x, y in zip(low, high, strict=True)]


@pytest.mark.parametrize("kind", HALVES)
def test_packed_forms(kind: str) -> None:
    """What single halves have, for both halves of a word."""
    a = [1.0, -2.0, 0.5, NAN, -0.0, 3.0]
    b = [2.0, -2.0, NAN, 1.0, 0.0, -3.0]
    c = [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]
    x, y, z = joined(a, b, kind), joined(b, a, kind), joined(c, c[::-1], kind)

    def halves(opcode: str, *columns: list[int]) -> tuple[list[float], list[float]]:
        words = compute(f"{opcode}.{kind}x2", "u32", ["u32"] * len(columns), *columns)
        return [number_of(each & 0xFFFF, kind) for each in words], [number_of(each >> 16, kind) for each in words]

    def singles(opcode: str, *columns: list[float]) -> list[float]:
        bits = [[bits_of(each, kind) for each in column] for column in columns]
        return [number_of(each, kind) for each in compute(f"{opcode}.{kind}", kind, [kind] * len(bits), *bits)]

    exponential = "ex2.approx.ftz" if kind == "bf16" else "ex2.approx"
    for opcode, low, high in (
        ("min", (a, b), (b, a)), ("max", (a, b), (b, a)), ("max.NaN", (a, b), (b, a)), ("neg", (a,), (b,)),
        ("abs", (a,), (b,)), ("fma.rn", (a, b, c), (b, a, c[::-1])), (exponential, (a,), (b,)),
        ("tanh.approx", (a,), (b,)), ("fma.rn.relu", (a, b, c), (b, a, c[::-1])),
    ):  # fmt: skip
        got = halves(opcode, *(x, y, z)[: len(low)])
        for half, operands in zip(got, (low, high), strict=True):
            assert all(same(p, q) for p, q in zip(half, singles(opcode, *operands), strict=True)), (opcode, half)


@pytest.mark.parametrize("kind", HALVES)
def test_packed_comparisons(kind: str) -> None:
    """Two predicates: of the lower halves, and of the upper ones."""
    low, high, other = [1.0, 2.0, NAN], [3.0, -1.0, 1.0], [2.0, 2.0, 2.0]
    for how, function in (("lt", lambda p, q: p < q), ("gt", lambda p, q: p > q), ("eq", lambda p, q: p == q)):
        for number, given in enumerate((low, high)):
            names = "%y|%p9" if number == 0 else "%p9|%y"
            got = compute(
                f"setp.{how}.{kind}x2", "pred", ["u32", "u32"], joined(low, high, kind), joined(other, other, kind),
                destination=names,
            )  # fmt: skip
            assert got == [function(*row) for row in zip(given, other, strict=True)], (how, number)


def test_a_comparison_and_its_opposite() -> None:
    """setp p|q: q is the opposite, before the third operand comes in."""
    got = compute(
        "setp.lt.and.s32", "pred", ["s32", "s32", "pred"], [1, 1, 3], [2, 2, 2], [1, 0, 1], destination="%p9|%y"
    )
    assert got == [0, 0, 1]


def test_negative_results_to_zero() -> None:
    """.relu: -NaN apart, nothing below 0."""
    for kind in HALVES:
        got = compute(f"cvt.rn.relu.{kind}.f32", "b16", ["f32"], [-1.5, 2.5, -0.0])
        assert [abs(number_of(each, kind)) for each in got] == [0.0, 2.5, 0.0]
        words = compute(f"cvt.rn.relu.{kind}x2.f32", "u32", ["f32", "f32"], [-1.5, 2.5], [4.0, -1.0])
        assert [(number_of(each >> 16, kind), number_of(each & 0xFFFF, kind)) for each in words] == [
            (0.0, 4.0),
            (2.5, 0.0),
        ]


def test_approximations_of_halves() -> None:
    for kind in HALVES:
        for name, function in (("ex2.approx", lambda x: 2.0**x), ("tanh.approx", math.tanh)):
            form = "ex2.approx.ftz" if (kind, name) == ("bf16", "ex2.approx") else name
            given = [0.0, 1.0, -2.5, 0.125]
            got = compute(f"{form}.{kind}", kind, [kind], [bits_of(each, kind) for each in given])
            limit = 2.0**-7 if kind == "bf16" else 2.0**-10
            assert all(
                math.isclose(number_of(a, kind), function(x), rel_tol=limit) for a, x in zip(got, given, strict=True)
            )
