"""setup.py where torch has CUDA: what it builds, with which toolkit, for which GPUs, and what the module needs to load.

Here torch has none, and gets a version of CUDA and a libtorch_cuda of what the module takes from one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx import cuda
from ptx.cuda import nvcc

ROOT = Path(__file__).parents[1]
# setup.py as a CUDA torch would run it; the CPU half is another test's business
SETUP = """
import runpy, sys, torch
from torch.utils.cpp_extension import BuildExtension
torch.version.cuda = {version!r}
torch.cuda.is_available = lambda: False
BuildExtension.build_extension = lambda self, extension: print("built:", extension.name)
sys.argv = ["setup.py", "build_ext", "--build-lib", {folder!r}, "--build-temp", {folder!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
# a compiler that says what it was asked for, one line each, and makes the file
NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac
echo "begin $*" >> {log}
sleep 0.05
for word; do [ "$before" = -o ] && echo made > "$word"; before=$word; done
echo "end" >> {log}
"""


def setup(folder: Path, version: str | None = "13.0", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py; what is built lies in the folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "VITKERNELS"))}
    code = SETUP.format(version=version, folder=str(folder))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | variables, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC.format(log=tmp_path / "log"))
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_the_module_is_built(tmp_path: Path, toolkit: Path) -> None:
    """With the toolkit that CUDA_HOME names, which is printed, for TORCH_CUDA_ARCH_LIST, MAX_JOBS compilers at once."""
    done = setup(tmp_path, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", MAX_JOBS="2")
    assert done.returncode == 0, done.stderr
    assert f"CUDA C++ is built with CUDA 13.0 at {toolkit} (CUDA_HOME) for sm_80 sm_90 compute_90" in done.stderr, (
        done.stderr
    )
    assert "built: vitkernels._C" in done.stdout
    assert list((tmp_path / "vitkernels").glob("_cuda.*"))
    lines = (tmp_path / "log").read_text().splitlines()
    asked = [line for line in lines if line.startswith("begin")]
    *compiled, linked = asked
    assert len(compiled) == len(nvcc.sources())
    for line in compiled:
        assert "-gencode=arch=compute_80,code=sm_80" in line
        assert "-gencode=arch=compute_90,code=compute_90" in line
        assert 'TARGETS="sm_80 sm_90 compute_90"' in line
    assert all(library in linked for library in (*nvcc.TORCH, *nvcc.RUNTIME))
    at_once = most = 0
    for line in lines:
        at_once += 1 if line.startswith("begin") else -1
        most = max(most, at_once)
    assert most == 2


@pytest.mark.parametrize(
    ("version", "variables", "reason"),
    [
        (None, {}, "torch was built without CUDA"),
        ("13.0", {"CUDA_HOME": "/nowhere"}, "CUDA_HOME is /nowhere, which has no bin/nvcc"),
        ("13.0", {"VITKERNELS_BUILD_CUDA": "0"}, "VITKERNELS_BUILD_CUDA is 0"),
    ],
)
def test_without_it_the_rest_is_built(
    version: str | None, variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    done = setup(tmp_path, version, **variables)
    assert done.returncode == 0, done.stderr
    assert f"CUDA C++ is not built: {reason}" in done.stderr
    assert done.stdout.count("built: ") == 1
    assert not list(tmp_path.rglob("_cuda.*"))


def test_without_any_extension_nothing_is_said(tmp_path: Path) -> None:
    done = setup(tmp_path, VITKERNELS_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    assert "CUDA C++" not in done.stderr
    assert "built: " not in done.stdout


TORCH_CUDA = """
extern "C" {
int aoti_torch_create_cuda_guard(int, void**) { return 1; }
int aoti_torch_delete_cuda_guard(void*) { return 0; }
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
}
"""
IMPORT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import _cuda
print(repr(_cuda.TARGETS))
"""


@pytest.mark.skipif(cuda.why_not() is not None, reason=f"{cuda.why_not()}")
def test_the_module_links_and_loads(tmp_path: Path) -> None:
    """With NVIDIA's own runtime inside: all else that it needs is in libtorch, or in what libtorch_cuda adds."""
    found = nvcc.find()
    assert found is not None
    (tmp_path / "torch_cuda.cpp").write_text(TORCH_CUDA)
    stub = tmp_path / "libtorch_cuda.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "torch_cuda.cpp", "-o", stub], check=True)
    objects = sorted(cuda.build().parent.glob("*.o"))
    nvcc.link(found, objects, tmp_path / "_cuda.abi3.so", [f"-L{tmp_path}", *nvcc.TORCH, *nvcc.RUNTIME])
    command = [sys.executable, "-c", IMPORT, tmp_path]
    loader = {"LD_LIBRARY_PATH": str(tmp_path), "LD_BIND_NOW": "1"}  # what nobody defines is found at once
    done = subprocess.run(command, env=os.environ | loader, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "''", "the tests' own build holds PTX alone"
