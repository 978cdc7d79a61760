"""Which cases of the list the extension's CUDA C++ leaves to others, each with the sentence that says so."""

from __future__ import annotations

import torch
from case import Case, T

from vitkernels import ext_cuda


def reason_of(case: Case) -> str | None:
    """What `why_not` ends with; None where its kernels serve the case."""
    if case.op in ext_cuda.ABSENT:
        return f"has no {ext_cuda.ABSENT[case.op]} yet"
    if case.op == "add_layer_norm":
        if case.tensors["weight"] is None:
            return "has no LayerNorm without a weight yet"
        if any(len(_shape(case, name)) == 2 for name in ("weight", "scale") if name in case.tensors):
            return "has no weights or scales by sample yet"
    if case.op == "attention" and _shape(case, "q")[1] != _shape(case, "k")[1]:
        return "has no heads of q that share heads of k and v yet"
    return None


def why_not_on(capability: tuple[int, int], case: Case, dtype: torch.dtype) -> str | None:
    """The same for a dtype on GPUs of one capability."""
    reason = reason_of(case)
    if reason is not None or capability >= (8, 0):
        return reason
    if case.op in ext_cuda.ATTENTION and dtype != torch.float32:
        return "needs compute capability 8.0 or later"
    if case.op in ext_cuda.PRODUCTS and dtype == torch.bfloat16:
        return "bfloat16 products need compute capability 8.0 or later"
    return None


def _shape(case: Case, name: str) -> tuple[int, ...]:
    given = case.tensors[name]
    assert isinstance(given, T)
    return given.shape
