"""cvt, and cvta, which turns addresses of one state space into generic ones and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import floats
from ptx.operands import Instruction
from ptx.regions import WINDOWS
from ptx.step import DTYPES, Step, define, simple

_INTEGERS = "u8 s8 u16 s16 u32 s32 u64 s64"
_ROUNDING: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(rounding: str, dtype: str) -> Callable[[Any], Any]:
    """Floats to integers: rounded, clamped to the range, NaN to 0."""
    limits = np.iinfo(dtype)
    # the nearest float64 to the largest 64-bit integer is past it
    highest = float(limits.max) if limits.bits < 64 else np.nextafter(float(limits.max), 0)

    def convert(x: Any) -> Any:
        whole = _ROUNDING[rounding](x.astype("f8"))
        inside = np.clip(np.where(np.isnan(whole), 0, whole), float(limits.min), highest).astype(dtype)
        return np.where(whole > highest, dtype_max, inside)

    dtype_max = np.array(limits.max, dtype)
    return convert


def toward_zero(x: Any) -> Any:
    """float64 to float32, cut instead of rounded."""
    out = x.astype("f4")
    return np.where(np.abs(out.astype("f8")) > np.abs(x), np.nextafter(out, np.float32(0)), out)


def saturated(dtype: str) -> Callable[[Any], Any]:
    limits = np.iinfo(dtype)

    def convert(x: Any) -> Any:
        low = max(limits.min, int(np.iinfo(x.dtype).min))
        high = min(limits.max, int(np.iinfo(x.dtype).max))
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return convert


def _bf16_toward_zero(x: Any) -> Any:
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.view("u4") >> np.uint32(16)).astype("u2")


def _tf32(x: Any) -> Any:
    """To nearest, ties away from zero, 10 bits of fraction."""
    return np.where(np.isfinite(x), ((x.view("u4") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view("f4"), x)


@define("cvt")
def _(i: Instruction) -> Step:
    to = i.one_of(f"{_INTEGERS} f16 bf16 f32 f64 f16x2 bf16x2 tf32")
    source = i.one_of(f"{_INTEGERS} f16 bf16 f32 f64")
    rounding = i.one_of("rn rz rm rp rni rzi rmi rpi rna", "")
    ftz, sat, relu = i.flag("ftz"), i.flag("sat"), i.flag("relu")
    step = _between(i, to, source, rounding, sat, relu)
    if ftz:
        inner = step.function
        first = floats.flush if source == "f32" else lambda x: x
        last = floats.flush if to == "f32" else lambda x: x
        step.function = lambda *values: last(inner(*(first(value) for value in values)))
    step.wide = True
    return step


def _between(i: Instruction, to: str, source: str, rounding: str, sat: bool, relu: bool) -> Step:
    a, b = DTYPES[source], DTYPES.get(to, "f4")
    if to == "tf32":
        if rounding != "rna":
            raise i.refuse("rounding")
        return simple(i, _tf32, "f4", "f4")
    if relu and to not in ("f16", "bf16", "f16x2", "bf16x2"):
        raise i.refuse("relu")
    positive = (lambda x: np.where(x < 0, np.float32(0), x)) if relu else lambda x: x
    if to in ("f16x2", "bf16x2"):
        if sat or rounding != "rn" or source != "f32":
            raise i.refuse("form of cvt")
        return simple(i, lambda high, low: floats.pack(positive(low), positive(high), to[:-2]), "u4", "f4", "f4")
    if source in ("f16", "bf16", "f32", "f64"):
        widen = {"bf16": floats.from_bf16, "f16": lambda x: x.astype("f4")}.get(source, lambda x: x)
        if to in _INTEGERS.split():
            if rounding not in _ROUNDING:
                raise i.refuse("rounding")
            convert = to_integer(rounding, b)
            return simple(i, lambda x: convert(widen(x)), b, a)
        return simple(i, _to_float(i, to, source, rounding, sat, widen, positive), "u2" if to == "f16" else b, a)
    if to in ("f32", "f64", "f16", "bf16"):
        if rounding not in ("rn", "rz") or sat:
            raise i.refuse("form of cvt")
        if to == "f64":
            return simple(i, lambda x: x.astype("f8"), "f8", a)
        if to == "f32" and rounding == "rn":
            return simple(i, lambda x: x.astype("f4"), "f4", a)
        if to == "f32" and a in ("i4", "u4", "i2", "u2", "i1", "u1"):
            return simple(i, lambda x: toward_zero(x.astype("f8")), "f4", a)
        if rounding == "rn" and a[1] in "124":
            # float64 holds 32 bits; to odd on the way, so that only the last rounding counts
            return simple(i, lambda x: floats.half_bits(floats.to_odd(x.astype("f8")), to), "u2", a)
        raise i.refuse("form of cvt")
    if rounding:
        raise i.refuse("rounding")
    return simple(i, saturated(b) if sat else lambda x: x.astype(b), b, a)


def _to_float(
    i: Instruction, to: str, source: str, rounding: str, sat: bool,
    widen: Callable[[Any], Any], positive: Callable[[Any], Any],
) -> Callable[[Any], Any]:  # fmt: skip
    clamp = (lambda x: np.clip(np.where(np.isnan(x), x.dtype.type(0), x), 0, 1)) if sat else lambda x: x
    if rounding in _ROUNDING:
        whole = _ROUNDING[rounding]
        if to != source or to not in ("f32", "f64"):
            raise i.refuse("form of cvt")
        return lambda x: clamp(whole(x))
    if to == "f64":
        return lambda x: clamp(widen(x).astype("f8"))
    if to == "f32":
        if source == "f64" and rounding == "rz":
            return lambda x: clamp(toward_zero(x))
        if source == "f64" and rounding != "rn":
            raise i.refuse("rounding")
        return lambda x: clamp(widen(x).astype("f4"))
    if to == "bf16" and rounding == "rz" and source == "f32" and not sat:
        return lambda x: _bf16_toward_zero(positive(x))
    if rounding != "rn" and source != to:
        raise i.refuse("rounding")
    odd = floats.to_odd if source == "f64" else lambda x: x
    return lambda x: floats.half_bits(positive(clamp(odd(widen(x)))), to)


@define("cvta")
def _(i: Instruction) -> Step:
    back = i.flag("to")
    space = i.one_of("global shared local const param")
    space = "shared" if i.flag("shared::cta") else space
    i.one_of("u64")
    offset = np.int64(WINDOWS[space])
    return simple(i, (lambda a: a - offset) if back else (lambda a: a + offset), "i8", "i8")
