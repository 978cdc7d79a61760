"""Every example runs, on fewer steps than by itself, and holds itself to having learned."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest

FOLDER = Path(__file__).parent.parent / "examples"
pytest.importorskip("sklearn", reason="the examples' data is scikit-learn's")

# steps: enough to learn what the example asserts
STEPS = {
    "vit_tutorial": 100,
    "classification": 120,
    "language_model": 220,
    "reading": 150,
    "mae": 350,
    "dino": 120,
    "lora": 60,
}
TORCHRUN = {"distributed": 70}


@pytest.mark.parametrize("name", STEPS)
def test_it_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lora":
        peers.import_timm()
        pytest.importorskip("peft", reason="the example is peft's")
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module(name).main(STEPS[name])


@pytest.mark.parametrize("name", TORCHRUN)
def test_it_learns_in_two_processes(name: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(FOLDER / f"{name}.py"), "--steps", str(TORCHRUN[name])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_table_and_make_have_every_example() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"shared"}
    assert files == {*STEPS, *TORCHRUN}
    table = (FOLDER / "README.md").read_text()
    makefile = (FOLDER.parent / "Makefile").read_text()
    assert {name for name in files if f"[{name}.py]({name}.py)" not in table} == set()
    assert {name for name in files if name not in makefile} == set()
