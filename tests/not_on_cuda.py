"""Which cases of the list the extension's CUDA C++ leaves to others, each with the sentence that says so."""

from __future__ import annotations

import torch
from case import Case

from vitkernels import ext_cuda


def reason_of(case: Case) -> str | None:
    """What `why_not` ends with; None where its kernels serve the case."""
    if case.op in ext_cuda.ABSENT:
        return f"has no {ext_cuda.ABSENT[case.op]} yet"
    return None


def why_not_on(capability: tuple[int, int], case: Case, dtype: torch.dtype) -> str | None:
    """The same for a dtype on GPUs of one capability."""
    reason = reason_of(case)
    if reason is not None or capability >= (8, 0):
        return reason
    if case.op in ext_cuda.ATTENTION and dtype != torch.float32:
        return "needs compute capability 8.0 or later"
    dtypes = {spec.dtype or dtype for spec in case.tensors.values() if spec is not None}
    if case.op in ext_cuda.PRODUCTS and torch.bfloat16 in dtypes:
        return "bfloat16 products need compute capability 8.0 or later"
    return None
