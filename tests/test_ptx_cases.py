"""The case list on the compiled kernels, executed by the machine in `ptx`: numbers, races, bounds, hangs.

`make emulate` runs all of it; here are sm_90 in bfloat16 and a few cases of the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkernels import kernels

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from ptx.trials import Trial, attempt, quick  # noqa: E402  # needs triton


@pytest.mark.parametrize("trial", quick(), ids=str)
def test_case(trial: Trial) -> None:
    outcome = attempt(trial)
    assert not outcome.faults, "\n".join(outcome.faults)


def emulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "ptx.emulate", *arguments],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command() -> None:
    """make emulate: a table and exit code 0 where all is well; 2 where nothing is called so."""
    done = emulate("--quick", "--only", "x1 bfloat16 linear: one row")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_90" in done.stdout
    assert "linear" in done.stdout
    assert emulate("--only", "no such case").returncode == 2
