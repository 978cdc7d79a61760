"""The extension's CUDA kernels on a GPU: the case list in every dtype, and that nothing waits for the device.

Without a GPU `test_cuda_cases` has them executed by the machine in `ptx`.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import check_case
from case import Case
from cases import CASES, SMALL
from graphs import check_replay

from vitkernels import dispatch, ext_cuda

REASON = dispatch.why_not("ext") or ext_cuda.Cuda().why_not()
if REASON is not None:
    pytest.skip(f"the extension's CUDA half: {REASON}", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
TRIALS = [(case, dtype) for case in CASES for dtype in (torch.float32, *HALVES) if dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), TRIALS, ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    try:
        check_case(case, dtype, "ext", device="cuda")
    except dispatch.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_in_a_graph(case: Case) -> None:
    check_replay(case, torch.float32, "ext")
