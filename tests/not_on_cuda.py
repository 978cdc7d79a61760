"""Which cases of the list the extension's CUDA C++ leaves to others, on which GPUs, with the sentence that says so."""

from __future__ import annotations

import torch
from case import Case, T

from vitkernels import ext_cuda


def why_not_on(capability: tuple[int, int], case: Case, dtype: torch.dtype) -> str | None:
    """What `why_not` says for a dtype on GPUs of one capability; None where the kernels serve the case."""
    if capability >= (8, 0):
        return None
    if case.op in ext_cuda.ATTENTION and dtype != torch.float32:
        return "needs compute capability 8.0 or later"
    if case.op in ext_cuda.ATTENTION and _width_of_heads(case) > ext_cuda.WIDEST_TURING_HEAD:
        return f"attention of heads over {ext_cuda.WIDEST_TURING_HEAD} wide needs compute capability 8.0 or later"
    dtypes = {spec.dtype or dtype for spec in case.tensors.values() if spec is not None}
    if case.op in ext_cuda.PRODUCTS and torch.bfloat16 in dtypes:
        return "bfloat16 products need compute capability 8.0 or later"
    return None


def _width_of_heads(case: Case) -> int:
    given = case.tensors["q" if "q" in case.tensors else "qkv"]
    assert isinstance(given, T)
    width = given.shape[-1]
    return width // (3 * case.options["num_heads"]) if case.op == "attention_qkv" else width
