"""The case list on the compiled kernels, executed by the machine in `ptx`: numbers, races, bounds, hangs.

`make emulate` runs all of it; here are sm_90 in bfloat16 and a few cases of the rest.
"""

from __future__ import annotations

import pytest

from vitkernels import kernels

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from ptx.trials import Trial, attempt, quick


@pytest.mark.parametrize("trial", quick(), ids=str)
def test_case(trial: Trial) -> None:
    outcome = attempt(trial)
    assert not outcome.faults, "\n".join(outcome.faults)
