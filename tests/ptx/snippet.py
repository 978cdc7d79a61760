"""Small kernels for tests: one instruction on given values, or a body of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx.launch import Loaded, run
from ptx.step import DTYPES

_STORED = {"pred": "u32", "f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}
_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(
    body: str, parameters: Sequence[str] = (), threads: int = 32, target: str = "sm_90a", outside: str = ""
) -> str:
    """PTX of a kernel `k` whose parameters are 64-bit unless named as "name.type"; common registers are declared."""
    listed = ", ".join(f".param .{[*each.split('.'), 'u64'][1]} {each.split('.')[0]}" for each in parameters)
    return f"""
.version 8.7
.target sm_90a
.address_size 64
{outside}
.visible .entry k({listed})
.reqntid {threads}
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<60>;
    .reg .f64 %fd<20>;
{body}
    ret;
}}
"""


def _own(kind: str) -> str:
    """The type with which a value of a PTX type is loaded and stored."""
    return _STORED.get(kind, kind)


def compute(
    opcode: str, result: str, sources: Sequence[str], *columns: Sequence[Any], tail: str = "", destination: str = "%y"
) -> list[Any]:
    """One instruction for each thread: `opcode %d, %a, %b, %c`.

    Args:
        opcode: with all its modifiers.
        result: PTX type of the result; halves and packed pairs are given as bits.
        sources: PTX types of the operands.
        columns: their values, one list an operand, as many as threads are wanted.
        tail: constant operands after these.
        destination: what stands for the result, where there is more than %y.

    Returns:
        The results, as Python numbers.
    """
    threads = len(columns[0])
    lines = ["    mov.u32 %r0, %tid.x;"]
    names = []
    arrays = []
    for number, (kind, column) in enumerate(zip(sources, columns, strict=True)):
        dtype = np.dtype(DTYPES[_own(kind)])
        arrays.append(np.array([_wrapped(value, dtype) for value in column], dtype))
        register = f"%x{number}"
        lines += [
            f"    .reg .{_REGISTER[dtype.itemsize] if kind != 'f64' else 'f64'} {register};",
            f"    ld.param.u64 %rd0, [in{number}];",
            f"    mad.wide.u32 %rd0, %r0, {dtype.itemsize}, %rd0;",
            f"    ld.global.{_own(kind)} {register}, [%rd0];",
        ]
        if kind == "pred":
            lines.append(f"    .reg .pred %q{number}; setp.ne.u32 %q{number}, {register}, 0;")
            register = f"%q{number}"
        names.append(register)
    out = np.zeros(threads, DTYPES[_own(result)])
    register = f".reg .{'pred' if result == 'pred' else 'f64' if result == 'f64' else _REGISTER[out.itemsize]} %y;"
    operands = ", ".join([destination, *names, *([tail] if tail else [])])
    lines += [f"    {register}", f"    {opcode} {operands};"]
    if result == "pred":
        lines += ["    selp.u32 %r1, 1, 0, %y;"]
    lines += [
        "    ld.param.u64 %rd1, [out];",
        f"    mad.wide.u32 %rd1, %r0, {out.itemsize}, %rd1;",
        f"    st.global.{_own(result)} [%rd1], {'%r1' if result == 'pred' else '%y'};",
    ]
    parameters = ["out", *(f"in{number}" for number in range(len(arrays)))]
    launch = run(kernel("\n".join(lines), parameters, threads), "k", (1,), (threads,), 0, [out, *arrays])
    assert not len(launch.findings), list(map(str, launch.findings))
    return [value.item() for value in out]


def _wrapped(value: Any, dtype: Any) -> Any:
    """An integer as the type's own: 2^32 - 1 may be given for -1."""
    if dtype.kind == "f":
        return value
    bits = 8 * dtype.itemsize
    value &= 2**bits - 1
    return value - 2**bits if dtype.kind == "i" and value >> (bits - 1) else value


def execute(
    body: str, arguments: Sequence[Any], grid: int = 1, threads: int = 32, shared: int = 0, outside: str = "",
    parameters: Sequence[str] | None = None, text: str = "",
) -> Loaded:  # fmt: skip
    """Run a body, or a whole text; its parameters are p0, p1, ..."""
    names = [f"p{number}" for number in range(len(arguments))] if parameters is None else parameters
    text = text or kernel(body, names, threads, outside=outside)
    return run(text, "k", (grid,), (threads,), shared, arguments)


def kinds(launch: Loaded) -> list[str]:
    return sorted({each.kind for each in launch.findings})
