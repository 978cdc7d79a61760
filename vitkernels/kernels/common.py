"""`triton.jit` helpers that at least two pages use."""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.kernels import interpreting

# bf16 tl.dot, add and compare are silently wrong in the interpreter: under it, tiles are float32
INTERPRETING: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; float32 operands are multiplied exactly, not as TF32."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)
