"""Floating-point arithmetic and comparisons: float32 and float64, halves one by one or packed in pairs.

Where the manual rounds once, so does this. Approximations (`.approx`) are given correctly rounded: a GPU may differ by
the error that the manual allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import integers
from ptx.operands import Instruction
from ptx.step import DTYPES, INTEGERS, Step, define, register, registers, simple

_SMALLEST = np.float32(2.0**-126)
_HALVES = "f16 bf16 f16x2 bf16x2"


def flush(x: Any) -> Any:
    """Subnormal float32 to zero, the sign kept."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def bf16_bits(x: Any) -> Any:
    """float32 to bfloat16, to nearest even."""
    bits = x.view("u4")
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype("u2")


def from_bf16(bits: Any) -> Any:
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def narrowed(wide: Any, low: Any) -> Any:
    """The sum wide + low of a float64 and its rounding error, rounded once to float32.

    Rounding twice is wrong only where the float64 lies halfway between two float32: its error then breaks the tie.
    """
    out = wide.astype("f4")
    tie = (wide.view("i8") & np.int64(0x1FFFFFFF)) == np.int64(0x10000000)
    if tie.any():
        odd = np.nextafter(wide, np.where(low > 0, np.inf, -np.inf))
        out = np.where(tie & (low != 0), odd.astype("f4"), out)
    return out


def fused(a: Any, b: Any, c: Any) -> Any:
    """float32 a b + c, rounded once: the product is exact in float64, and so is what the sum loses."""
    product = np.multiply(a, b, dtype="f8")
    wide = product + c
    out = wide.astype("f4")
    tie = (wide.view("i8") & np.int64(0x1FFFFFFF)) == np.int64(0x10000000)
    if not tie.any():
        return out
    product, c = np.broadcast_arrays(product, c.astype("f8"))
    back = wide - product
    return narrowed(wide, (product - (wide - back)) + (c - back))


def fused64(a: Any, b: Any, c: Any) -> Any:
    """float64 a b + c, rounded once where 80-bit floats are wide enough to see it."""
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype("f8")


def smaller(a: Any, b: Any) -> Any:
    """min: a number before NaN, -0 before +0."""
    return np.where((a == b) & np.signbit(a), a, np.fmin(a, b))


def larger(a: Any, b: Any) -> Any:
    """max: a number before NaN, +0 before -0."""
    return np.where((a == b) & ~np.signbit(a), a, np.fmax(a, b))


def _with_nan(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """NaN where any is: 0x7FFFFFFF."""
    nan = np.array(0x7FFFFFFF, "u4").view("f4")

    def either(a: Any, b: Any) -> Any:
        return np.where(np.isnan(a) | np.isnan(b), nan, function(a, b))

    return either


def reciprocal_root(x: Any) -> Any:
    return (1 / np.sqrt(x.astype("f8"))).astype("f4")


def _approximation(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: function(x.astype("f8")).astype("f4")


_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative, "abs": np.abs, "rcp": lambda x: x.dtype.type(1) / x, "sqrt": np.sqrt,
    "rsqrt": reciprocal_root, "ex2": _approximation(np.exp2), "lg2": _approximation(np.log2),
    "sin": _approximation(np.sin), "cos": _approximation(np.cos), "tanh": _approximation(np.tanh),
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": smaller, "max": larger,
}  # fmt: skip


def unpack(kind: str) -> Callable[[Any], tuple[Any, Any]]:
    """(lower, upper) float32 of pairs."""

    def halves(x: Any) -> tuple[Any, Any]:
        low, high = (x & np.uint32(0xFFFF)).astype("u2"), (x >> np.uint32(16)).astype("u2")
        if kind == "bf16":
            return from_bf16(low), from_bf16(high)
        return low.view("f2").astype("f4"), high.view("f2").astype("f4")

    return halves


def half_bits(x: Any, kind: str) -> Any:
    """float32 or float64 to the 16 bits of a half, rounded once."""
    if kind == "f16":
        return x.astype("f2").view("u2")
    return bf16_bits(x.astype("f4"))


def pack(low: Any, high: Any, kind: str) -> Any:
    return half_bits(low, kind).astype("u4") | (half_bits(high, kind).astype("u4") << np.uint32(16))


def _fused_half(a: Any, b: Any, c: Any) -> Any:
    """a b + c of halves in float64, rounded to odd: the next rounding is then as if it were the only one."""
    product = a.astype("f8") * b.astype("f8")
    wide = product + c
    back = wide - product
    lost = (product - (wide - back)) + (c - back)
    even = (wide.view("i8") & np.int64(1)) == 0
    wide = np.where((lost != 0) & even, np.nextafter(wide, np.where(lost > 0, np.inf, -np.inf)), wide)
    return wide


def to_odd(wide: Any) -> Any:
    """float64 to float32 by rounding to odd: a later rounding to bfloat16 is as if there had been no first one."""
    out = wide.astype("f4")
    error = wide - out
    toward = np.where(error > 0, np.float32(np.inf), np.float32(-np.inf))
    even = (out.view("u4") & np.uint32(1)) == 0
    return np.where((error != 0) & even & np.isfinite(out), np.nextafter(out, toward), out)


def _half_step(i: Instruction, kind: str, function: Callable[..., Any], count: int) -> Step:
    """An operation on halves: in float32 or float64, then rounded."""
    base = kind.removesuffix("x2")
    relu = i.flag("relu")

    def one(*values: Any) -> Any:
        out = function(*values)
        if relu:
            out = np.where(np.isnan(out), out, np.maximum(out, 0))
        return to_odd(out) if out.dtype == np.float64 and base == "bf16" else out

    if kind.endswith("x2"):
        split = unpack(base)

        def pairs(*values: Any) -> Any:
            parts = [split(value) for value in values]
            return pack(one(*(low for low, _ in parts)), one(*(high for _, high in parts)), base)

        return simple(i, pairs, "u4", *["u4"] * count)
    dtype = DTYPES[kind]

    def single(*values: Any) -> Any:
        wide = [from_bf16(value) if base == "bf16" else value.astype("f4") for value in values]
        return half_bits(one(*wide), base)

    return simple(i, single, "u2", *[dtype] * count)


# ------------------------------------------------------------------------------------------------------ definitions


@define("add", "sub", "mul", "min", "max", "neg", "abs", "mad", "fma", "div")
def _(i: Instruction) -> Step:
    kind = i.one_of(f"f32 f64 f32x2 {_HALVES} {INTEGERS}")
    mixed = i.one_of("f16 bf16", "") if kind == "f32" else ""
    i.begin()
    if kind in INTEGERS.split():
        return integers.divide(i) if i.name == "div" else integers.arithmetic(i)
    if kind == "f32x2" or mixed:
        return _two_floats(i) if kind == "f32x2" else _mixed(i, mixed)
    i.one_of(kind)
    nan = i.flag("NaN")
    if i.name in ("add", "sub", "mul", "fma", "mad", "div"):
        i.one_of("rn approx full", "rn")
    i.flag("sat") and _refuse_saturation(i)
    ftz = i.flag("ftz")
    count = 1 if i.name in ("neg", "abs") else 3 if i.name in ("fma", "mad") else 2
    if kind in _HALVES.split():
        function = _fused_half if count == 3 else _UNARY[i.name] if count == 1 else _BINARY[i.name]
        return _half_step(i, kind, _with_nan(function) if nan else function, count)
    dtype = DTYPES[kind]
    if i.name in ("min", "max") and dtype == "f4" and len(i.operands) == 4:
        return simple(i, _of_three(i.name, nan, ftz), "f4", "f4", "f4", "f4")
    if count == 3:
        function = fused if dtype == "f4" else fused64
    else:
        function = _UNARY[i.name] if count == 1 else _BINARY[i.name]
    function = _with_nan(function) if nan else function
    return simple(i, _flushed(function) if ftz else function, dtype, *[dtype] * count)


def _two_floats(i: Instruction) -> Step:
    """Packed float32 of sm_100 and later: two in 64 bits."""
    i.one_of("f32x2")
    i.one_of("rn", "rn")
    count = 3 if i.name == "fma" else 2
    function = fused if count == 3 else _BINARY[i.name]
    function = _flushed(function) if i.flag("ftz") else function

    def pairs(*words: Any) -> Any:
        parts = [np.ascontiguousarray(word).view("f4") for word in words]
        low, high = (function(*(part[..., n::2] for part in parts)) for n in (0, 1))
        return np.stack([low, high], -1).reshape(*low.shape[:-1], -1).view("i8")

    return simple(i, pairs, "i8", *["i8"] * count)


def _mixed(i: Instruction, kind: str) -> Step:
    """float32 with halves as the first operands, of sm_100 and later: they are widened, and the result rounded once."""
    i.one_of("f32")
    i.one_of(kind)
    i.one_of("rn", "rn")
    widen = from_bf16 if kind == "bf16" else lambda x: x.astype("f4")
    half = DTYPES[kind]
    if i.name == "fma":
        return simple(i, lambda a, b, c: fused(widen(a), widen(b), c), "f4", half, half, "f4")
    if i.name not in ("add", "sub"):
        raise i.refuse("mixed operands")
    return simple(i, lambda a, b: _BINARY[i.name](widen(a), b), "f4", half, "f4")


def _of_three(name: str, nan: bool, ftz: bool) -> Callable[[Any, Any, Any], Any]:
    """min and max of three, of sm_100 and later."""
    of_two = _with_nan(_BINARY[name]) if nan else _BINARY[name]
    of_two = _flushed(of_two) if ftz else of_two
    return lambda a, b, c: of_two(of_two(a, b), c)


def _refuse_saturation(i: Instruction) -> None:
    raise i.refuse("saturation")


def _flushed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: flush(function(*(flush(value) for value in values)))


@define("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _(i: Instruction) -> Step:
    kind = i.one_of(f"f32 f64 {_HALVES}")
    if kind == "f64" and i.name not in ("rcp", "sqrt"):
        raise i.refuse("float64")
    i.one_of("rn approx", "rn" if i.name in ("rcp", "sqrt") else None)
    ftz = i.flag("ftz")
    function = _UNARY[i.name]
    if kind in _HALVES.split():
        return _half_step(i, kind, function, 1)
    return simple(i, _flushed(function) if ftz else function, DTYPES[kind], DTYPES[kind])


# setp -------------------------------------------------------------------------------------------------------------

_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(how: str, floating: bool) -> Callable[[Any, Any], Any]:
    """A comparison by PTX's name; those of floats are false, those that end in `u` true, where one is NaN."""
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    if floating and how == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if how in _ORDERED:
        return _ORDERED[how]
    ordered = _ORDERED[how.removesuffix("u")]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


@define("setp")
def _(i: Instruction) -> Step:
    kind = i.one_of(f"f32 f64 {_HALVES} {INTEGERS} b16 b32 b64")
    floating = kind[0] == "f" or kind.startswith("bf")
    names = "eq ne lt le gt ge" + (" equ neu ltu leu gtu geu num nan" if floating else " lo ls hi hs")
    compare = comparison(i.one_of(names), floating)
    combine = i.one_of("and or xor", "")
    ftz = i.flag("ftz")
    dtype = DTYPES[kind]
    base = kind.removesuffix("x2")
    destinations = registers(i, i.operands[0])
    sources = [(operand, dtype) for operand in i.operands[1:3]]
    if kind.endswith("x2"):
        split = unpack(base)
        both = lambda a, b: [compare(x, y) for x, y in zip(split(a), split(b), strict=True)]  # noqa: E731
        return Step(both, tuple(sources), tuple((each, "b1") for each in destinations))

    def test(a: Any, b: Any, *more: Any) -> Any:
        if base == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        if ftz:
            a, b = flush(a), flush(b)
        answers = [compare(a, b)]
        if len(destinations) > 1:
            answers.append(~answers[0])
        if more:
            answers = [integers.LOGIC[combine](each, more[0]) for each in answers]
        return answers if len(destinations) > 1 else answers[0]

    if combine:
        sources.append((register(i, i.operands[3]), "b1"))
    if not combine and not ftz and base != "bf16" and len(destinations) == 1:
        return Step(compare, tuple(sources), ((destinations[0], "b1"),))
    return Step(test, tuple(sources), tuple((each, "b1") for each in destinations))
