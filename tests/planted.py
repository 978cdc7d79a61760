"""Kernels that the audit must pass, and kernels with one fault each that it must name: a page for `test_audit.py`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from vitkernels.kernels.fences import FENCED
from vitkernels.kernels.variants import Variant


@triton.jit
def copy(p_in, p_out, count, BLOCK: tl.constexpr):
    """An elementwise kernel; nothing is wrong with it."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_in + o, mask=o < count), mask=o < count)


@triton.jit
def product(p_a, p_b, p_out, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a matrix product."""
    o_m, o_n, o_k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, depth, BLOCK):
        b_a = tl.load(p_a + o_m[:, None] * depth + k + o_k[None, :])
        b_b = tl.load(p_b + o_n[None, :] * depth + k + o_k[:, None])
        acc = tl.dot(b_a, b_b, acc)
    tl.store(p_out + o_m[:, None] * COLUMNS + o_n[None, :], acc)


def _product(name: str, rows: int = 64, columns: int = 64, block: int = 64, **more: Any) -> Variant:
    types = {"p_a": "*bf16", "p_b": "*bf16", "p_out": "*fp32", "depth": "i32"}
    constants = {"ROWS": rows, "COLUMNS": columns, "BLOCK": block}
    return Variant(name, product, types, constants, divisible=("depth",), matrix=True, **more)


def variants(capability: tuple[int, int]) -> list[Variant]:
    types = {"p_in": "*bf16", "p_out": "*bf16", "count": "i32"}
    crowded: dict[str, Any] = {"num_warps": 1, "maxnreg": 32}  # 128 registers' worth of numbers a thread
    return [
        Variant("good copy", copy, types, {"BLOCK": 2048}, divisible=("count",), moved=3e9),
        _product("good product", flops=1e12, useful=5e11, num_stages=2 if FENCED else 1),
        Variant("spilling copy", copy, types, {"BLOCK": 8192}, divisible=("count",), **crowded),
        Variant("admitted spill", copy, types, {"BLOCK": 8192}, divisible=("count",), spills=4096, **crowded),
        _product("product of 16 rows", rows=16),
        _product("greedy product", 128, 128, 128, num_warps=8, num_stages=5),
        _product("product of 100 rows", rows=100),
        Variant("misnamed copy", copy, types, {"WIDTH": 2048}),
    ]
