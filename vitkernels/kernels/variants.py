"""What `make audit` compiles: a kernel at a row of `configs`, with what the row admits and its roofline needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation.

    Args:
        name: op, kernel and shape, as a row of the table names it.
        kernel: the `triton.jit` function.
        signature: type of each argument that is no constexpr, in order: "*bf16", "*fp32", "i32", "fp32"; a
            tuple of types for an argument that is a tuple.
        constants: value of each constexpr argument.
        num_warps, num_stages, maxnreg: launch options of the config row.
        divisible: integer arguments known to be multiples of 16, beside all pointers.
        matrix: whether it multiplies matrices, and so must use HGMMA on sm_90.
        spills: bytes of spilled registers that the row admits.
        moved: bytes read and written at the shape in `name`.
        flops: floating-point operations there, the waste of partial tiles included.
        useful: those without the waste.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    divisible: tuple[str, ...] = ()
    matrix: bool = False
    spills: int = 0
    moved: float = 0.0
    flops: float = 0.0
    useful: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
