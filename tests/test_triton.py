"""The Triton kernels on the case list of every other backend: on a GPU where there is one, else interpreted on the CPU.

Interpreted, float32 and float16 only: the interpreter's bf16 products are silently wrong (the offline compile of
`make audit` and a GPU's own run cover bf16).
"""

from __future__ import annotations

import os

import pytest
import torch
from accuracy import check_case
from case import Case
from cases import CASES

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when vitkernels.kernels first imports triton

from vitkernels import dispatch, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in DTYPES if case.op in kernels.PAGES and dtype in case.dtypes],
    ids=str,
)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    reason = dispatch.why_not("triton")
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    check_case(case, dtype, "triton", device=DEVICE)
