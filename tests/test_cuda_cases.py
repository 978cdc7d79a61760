"""The case list on the extension's CUDA kernels, as nvcc compiles them, launched by their own C++ and executed by the
machine in `ptx`: numbers, races, bounds, hangs."""

from __future__ import annotations

import pytest
import torch
from accuracy import check_case
from case import Case
from cases import ADD_LAYER_NORM, STRIDES_16
from ptx import cuda

if cuda.why_not() is not None:
    pytest.skip(f"{cuda.why_not()}", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
FEW = STRIDES_16[::12]  # of the layouts


def _trials() -> list[tuple[Case, torch.dtype]]:
    """Every case in one dtype, by turns; layouts in a sample."""
    trials = []
    for number, case in enumerate([*ADD_LAYER_NORM, *FEW]):
        if case.op == "add_layer_norm":
            dtypes = [each for each in (torch.float32, *HALVES) if each in case.dtypes]
            trials.append((case, dtypes[number % len(dtypes)]))
    return trials


@pytest.mark.parametrize(("case", "dtype"), _trials(), ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    with cuda.activate() as record:
        check_case(case, dtype, "ext")
    assert not record.findings, "\n".join(map(str, record.findings))
