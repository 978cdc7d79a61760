"""The text of PTX: what the parser makes of it, and that every opcode which is defined is tested."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ptx import launch
from ptx.operands import Immediate, Unsupported
from ptx.snippet import execute, kernel
from ptx.step import DEFINITIONS
from ptx.text import Module

TESTS = Path(__file__).parent


def test_every_opcode_is_tested() -> None:
    """Each has a snippet, or comes in the PTX of a kernel, in a test of its family."""
    assert launch.FAMILIES
    texts = "\n".join(path.read_text() for path in TESTS.glob("test_ptx_*.py") if path.name != Path(__file__).name)
    without = [name for name in DEFINITIONS if not re.search(rf"\b{name}[.\"]", texts)]
    assert set(without) == {"nanosleep", "griddepcontrol", "prefetch"}  # here, below


def test_hints_change_nothing() -> None:
    body = """ld.param.u64 %rd0, [p0]; prefetch.global.L2 [%rd0]; nanosleep.u32 20; griddepcontrol.wait;
    griddepcontrol.launch_dependents; st.global.b32 [%rd0], 7;"""
    out = np.zeros(1, "i4")
    execute(body, [out], threads=1)
    assert out[0] == 7


def test_immediates() -> None:
    parsed = Module(
        kernel("mov.f32 %r0, 0fBF800000; mov.b32 %r1, -5; mov.b32 %r2, 0x1F; mov.b32 %r3, 017; mov.f64 %fd1, 1.5;")
    )
    values = [each.operands[1] for each in parsed.kernel().body if not isinstance(each, str) and each.operands]
    assert [type(each) for each in values] == [Immediate] * 5
    kinds = ["f4", "i4", "u4", "u4", "f8"]
    assert [each.of(kind) for each, kind in zip(values, kinds, strict=True)] == [-1.0, -5, 31, 15, 1.5]


def test_where_an_instruction_comes_from() -> None:
    """Its line in the text, and the compiler's .loc."""
    text = kernel("\n    .loc 1 20 4 // kernel.py:20:4\n    add.s32 %r1, %r2, 3; // a comment; with a semicolon\n")
    add = next(each for each in Module(text).kernel().body if not isinstance(each, str))
    assert add.source == "kernel.py:20:4"
    assert text.splitlines()[add.line - 1].strip().startswith("add.s32")
    assert str(add) == f"line {add.line}: add.s32 %r1, %r2, 3  (kernel.py:20:4)"


def test_functions_that_are_not_there_or_call_themselves() -> None:
    outside = ".func again() { call.uni again, (); ret; }"
    with pytest.raises(Unsupported, match="again calls itself"):
        execute("call.uni again, ();", [], outside=outside)
    with pytest.raises(Unsupported, match="no body of the function vprintf"):
        execute("call.uni vprintf, ();", [])


def test_labels_that_are_not_there() -> None:
    with pytest.raises(Unsupported, match="no label NOWHERE"):
        execute("bra NOWHERE;", [])


def test_a_block_larger_than_the_kernel_was_compiled_for() -> None:
    with pytest.raises(ValueError, match="block: got"):
        launch.run(kernel("ret;"), "k", (1,), (64,), 0, [])
