"""The extension's CUDA half from outside: which toolkit builds it and for what, who is declined and why, what fails."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import SMALL
from ptx import cuda

import vitkernels as vk
from vitkernels import dispatch, ext, ext_cuda
from vitkernels.kernels import device

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
import nvcc

NO_COMPILER = pytest.mark.skipif(cuda.why_not() is not None, reason=f"{cuda.why_not()}")


def _toolkit(home: Path) -> Path:
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "nvcc"
    program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    program.chmod(0o755)
    return home


def test_the_toolkit_that_cuda_home_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes before all others, and where it has no nvcc nothing else stands in."""
    monkeypatch.setenv("CUDA_HOME", str(_toolkit(tmp_path / "named")))
    found = nvcc.find()
    assert found is not None
    assert str(found) == f"CUDA 12.8 at {tmp_path / 'named'} (CUDA_HOME)"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert nvcc.why_not() == f"CUDA_HOME is {tmp_path}, which has no bin/nvcc"


def test_the_toolkit_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    _toolkit(tmp_path / "nvidia" / "cu12")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    folders = [str(each.home) for each in nvcc._candidates() if "package" in each.source]
    assert str(tmp_path / "nvidia" / "cu12") in folders


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [
        (None, "torch was built without CUDA"),
        ("13.0", "the toolkit is CUDA 12.8 at {home} (CUDA_HOME); needs the major version of torch's CUDA 13.0"),
        ("12.6", None),
    ],
)
def test_why_it_is_not_built(
    torch_cuda: str | None, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert nvcc.why_not() == (reason and reason.format(home=home))


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("8.0;9.0+PTX", "sm_80 sm_90 compute_90"),
        ("7.5 8.6", "sm_75 sm_86"),
        ("", "sm_75 sm_80 sm_86 sm_89 sm_90 compute_90"),
    ],
)
def test_architectures(asked: str, built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = nvcc.targets()
    assert flags[-1] == f'-DVITKERNELS_TARGETS="{built}"'
    assert [flag.split(",code=")[1] for flag in flags[:-1]] == built.split()


def test_architectures_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST holds 'Hopper'; needs numbers such as"):
        nvcc.targets()


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
    ],
)
def test_which_gpus_a_build_serves(target: str, capability: tuple[int, int], runs: bool) -> None:
    assert ext_cuda._runs_on(target, capability) == runs


class Gpu(ext_cuda.Cuda):
    """A GPU that is not there, for tensors of the CPU."""

    kind = "cpu"

    def __init__(self, capability: tuple[int, int], targets: tuple[str, ...] = ("sm_75", "compute_80")) -> None:
        self.given, self.built = capability, targets

    def why_not(self) -> str | None:
        return None

    def _targets(self) -> tuple[str, ...]:
        return self.built

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.given

    def serves(self, capability: tuple[int, int]) -> bool:
        return any(ext_cuda._runs_on(target, capability) for target in self.built)


HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def declined(gpu: Gpu, op: str, **given: Any) -> str | None:
    """Why a forward call with these arguments alone is not served."""
    empty = dispatch.OPS[op].call("forward", ())
    return ext_cuda.why_not_call(gpu, op, empty._replace(**{key: given[key] for key in given if key in empty._fields}))


@pytest.mark.parametrize(
    ("op", "dtype", "gpu", "reason"),
    [
        ("linear", HALF, Gpu((7, 5)), "bfloat16 products need compute capability 8.0 or later, and cpu has 7.5"),
        ("linear", FLOAT, Gpu((7, 5)), None),
        ("add_layer_norm", HALF, Gpu((7, 5)), None),
        ("mlp", FLOAT, Gpu((7, 0)), "the CUDA C++ kernels need compute capability 7.5 or later, and cpu has 7.0"),
        ("mlp", DOUBLE, Gpu((8, 0)), "the CUDA C++ kernels have no float64"),
        (
            "mlp",
            FLOAT,
            Gpu((8, 0), ("sm_90",)),
            "the CUDA C++ kernels were not built for compute capability 8.0 of cpu",
        ),
    ],
)
def test_who_is_declined(op: str, dtype: torch.dtype, gpu: Gpu, reason: str | None) -> None:
    case = next(case for case in SMALL if case.op == op)
    assert declined(gpu, op, **case.build(dtype), **case.options) == reason


def test_rows_and_channels_beyond_what_kernels_take() -> None:
    gpu = Gpu((8, 0))
    reason = declined(gpu, "add_layer_norm", x=torch.zeros(1, 6145), weight=torch.zeros(6145))
    assert reason == "the CUDA C++ kernels take rows of up to 6144 columns; got 6145"
    image, weight = torch.zeros(1, 65, 4, 4), torch.zeros(8, 65, 4, 4)
    reason = declined(gpu, "patch_embed", image=image, weight=weight, mean=[0.5] * 65)
    assert reason == "the CUDA C++ kernels normalise up to 64 channels; got 65"
    assert declined(gpu, "patch_embed", image=image, weight=weight) is None
    reason = declined(gpu, "rotary_qkv", qkv=torch.zeros(1, 1, 3, 1, 257))
    assert reason == "the CUDA C++ kernels turn heads up to 256 wide, and these are 257"


def test_backends_say_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.why_not("ext") is not None:
        pytest.skip(f"ext: {dispatch.why_not('ext')}")
    if torch.version.cuda is None:
        assert "CUDA C++ is not there: torch was built without CUDA" in str(vk.backends())
        assert ext_cuda.Cuda().why_not() == "torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "vitkernels._cuda", None)
    reason = ext_cuda.Cuda().why_not()
    assert reason is not None
    assert "pip install -e ." in reason


@NO_COMPILER
def test_a_launch_that_fails_raises() -> None:
    """With the kernel's name, grid, block and the tensors' shapes; the next call is as if nothing had been."""
    if dispatch.why_not("ext") is not None:
        pytest.skip(f"ext: {dispatch.why_not('ext')}")
    x, weight = torch.randn(2, 3, 64), torch.randn(64)
    before = x.clone()
    with cuda.activate() as record, vk.use("ext"):
        record.refuses = True
        with pytest.raises(RuntimeError) as error:
            vk.ops.add_layer_norm(x, None, weight)
        for part in (
            "add_layer_norm: kernel layer_norm_forward did not launch: invalid configuration argument",
            "grid 2 x 1 x 1, block 32 x 4 x 1",
            "[2, 3, 64]",
        ):
            assert part in str(error.value)
        assert torch.equal(x, before)
        record.refuses = False
        _, normed = vk.ops.add_layer_norm(x, None, weight)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x, (64,), weight, None, 1e-6))


@NO_COMPILER
@pytest.mark.parametrize("refuses", [False, True])
def test_devices_that_were_entered_are_left(refuses: bool) -> None:
    """A launch without a guard of the device, or past torch's current stream, fails on the stand-in for the runtime."""
    x, weight = torch.randn(3, 64), torch.randn(64)
    runtime = cuda.stand_in()
    with cuda.activate() as record, vk.use("ext"), contextlib.suppress(RuntimeError):
        record.refuses = refuses
        vk.ops.add_layer_norm(x, None, weight)
    assert record.names
    assert runtime.vitkernels_guards() == 0


@NO_COMPILER
def test_parts_of_a_sum_fit_a_grid() -> None:
    """However many rows and images there are; nothing is run, for it would take minutes."""
    rows, images = 2**26, 2**21
    dy = torch.zeros(rows, 1, dtype=torch.float16)
    dout, image, keep = torch.zeros(images, 1, 1), torch.zeros(images, 1, 1, 1), torch.zeros(images, 1).long()
    with cuda.activate(take=lambda call, record: None) as record, vk.use("ext"):
        dispatch.OPS["linear"].backward(dy, dy, dy[:1], [False, False, True])
        needs = [False, False, False, False, True]
        dispatch.OPS["patch_embed"].backward(dout, image, image[:1], None, None, None, dout[0], keep, needs)
    most = {"column_sums_kernel": 0, "sum_by_position": 0}
    for name, (grid, _, _) in zip(record.names, record.shapes, strict=True):
        kernel = next(each for each in most if each in name)
        most[kernel] = max(most[kernel], *grid[1:])
    assert all(30_000 < each <= 65_535 for each in most.values()), most


@NO_COMPILER
def test_nothing_waits_for_the_device_or_allocates() -> None:
    """So that CUDA graphs can capture every op: of CUDA's runtime the module calls nothing else. How many blocks fit a
    multiprocessor is reckoned on the host."""
    objects = cuda.build().parent.glob("*.o")
    listed = subprocess.run(["nm", "--undefined-only", *objects], capture_output=True, text=True, check=True).stdout
    called = set(re.findall(r"\bU (cuda\w+)", listed))
    assert called == {
        "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError", "cudaLaunchKernel",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    }  # fmt: skip


# --------------------------------------------------------------------------------------- where Triton cannot serve


def _has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> device.Device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return device.Cuda()


def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> device.Device:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return _has_a_gpu(monkeypatch)


def _without_triton(monkeypatch: pytest.MonkeyPatch) -> device.Device:
    monkeypatch.setitem(sys.modules, "triton", None)
    return _has_a_gpu(monkeypatch)


def _with_another_triton(monkeypatch: pytest.MonkeyPatch) -> device.Device:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="4.0.0"))
    return _has_a_gpu(monkeypatch)


@NO_COMPILER
@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (_without_a_compiler, "triton finds no C compiler for its launchers; needs gcc or clang, or one that CC names"),
        (_without_triton, "triton did not import (import of triton halted; None in sys.modules)"),  # as on Windows
        (_with_another_triton, "triton is 4.0.0; needs 3.6 to 3.9"),
    ],
)
def test_it_serves_where_triton_is_not_there(
    machine: Callable[[pytest.MonkeyPatch], device.Device], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the default order of CUDA, and `vk.backends()` says why."""
    assert dispatch.order("cuda") == ("triton", "ext", "reference")
    x, weight = torch.randn(3, 64), torch.randn(64)
    with cuda.activate() as record, device.stand_in(machine(monkeypatch)):
        assert vk.backends()["triton"] == reason
        assert vk.backends()["ext"] == "available"
        with dispatch.scope(("triton", "ext", "reference")), vk.record() as calls:
            vk.ops.add_layer_norm(x, None, weight)
    assert [(call.backend, call.declined) for call in calls] == [("ext", (("triton", reason),))]
    assert record.names


class Turing(device.Interpreter):
    def capability(self, device: torch.device) -> tuple[int, int]:
        return (7, 5)


@NO_COMPILER
def test_it_serves_capability_7_5() -> None:
    pytest.importorskip("triton")
    x, weight = torch.randn(3, 64), torch.randn(64)
    order = dispatch.scope(("triton", "ext", "reference"))
    with cuda.activate((7, 5)) as record, device.stand_in(Turing()), order, vk.record() as calls:
        vk.ops.add_layer_norm(x, None, weight)
    reason = "the kernels need compute capability 8.0 or later, and cpu has 7.5"
    assert [(call.backend, call.declined) for call in calls] == [("ext", (("triton", reason),))]
    assert record.names


def test_backends_say_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.why_not("ext") is not None:
        pytest.skip(f"ext: {dispatch.why_not('ext')}")
    monkeypatch.setitem(sys.modules, "vitkernels._cuda", SimpleNamespace(TARGETS="sm_80 compute_90"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ext, "_CUDA", ext_cuda.Cuda())
    assert "CUDA C++ for sm_80, compute_90" in str(vk.backends())


@NO_COMPILER
def test_the_machine_stands_in_for_the_block_alone() -> None:
    if dispatch.why_not("ext") is not None:
        pytest.skip(f"ext: {dispatch.why_not('ext')}")
    before = dispatch.OPS["mlp"].implementations["ext"].forward
    with cuda.activate():
        assert dispatch.OPS["mlp"].implementations["ext"].forward is not before
    assert dispatch.OPS["mlp"].implementations["ext"].forward == before
    assert ext._gpu is ext._CUDA
