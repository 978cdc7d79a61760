"""Why the Triton backend is not there, or cannot serve a call: a sentence each time, and never a crash at import."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vitkernels import dispatch, kernels
from vitkernels.kernels.device import Cuda, Interpreter, current, stand_in

IMAGE, WEIGHT = torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 4, 4)
for page, _ in kernels.PAGES.values():
    # triton reads TRITON_INTERPRET where a kernel is defined, so no page may be first imported by a test
    importlib.import_module(f"vitkernels.kernels.{page}")


@pytest.fixture(autouse=True)
def _fresh_reasons() -> Iterator[None]:
    """A device of the test's own, of which the backend remembers nothing yet."""
    with stand_in(Cuda()):
        yield


class Gpu(Interpreter):
    """A GPU of some capability, whose kernels the interpreter would run."""

    def __init__(self, *capability: int) -> None:
        self.answer = capability

    def capability(self, device: torch.device) -> tuple[int, int]:
        major, minor = self.answer
        return major, minor


@pytest.fixture
def interpreter() -> Iterator[None]:
    with stand_in(Interpreter()):
        yield


def declined(op: str, direction: str, *args: object) -> str | None:
    """An op's reason not to run on Triton."""
    found = dispatch.OPS[op]
    return found.implementations["triton"].why_not(direction, found.call(direction, args))


def declined_image(image: torch.Tensor = IMAGE, weight: torch.Tensor = WEIGHT) -> str | None:
    """patch_embed's reason, for an image and a weight alone."""
    return declined("patch_embed", "forward", image, weight, *[None] * 6)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that does not interpret kernels and sees no GPU."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "VITKERNELS"))}
    environment = inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.why_not() == (
        "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    )


def test_interpreting_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with stand_in(Interpreter()):
        assert kernels.why_not() is None


def test_which_device_launches_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that stands in, the innermost first; else the interpreter where it is asked for; else CUDA."""
    first, second = Gpu(8, 0), Gpu(9, 0)
    with stand_in(first):
        with stand_in(second):
            assert current() is second
            assert kernels.capability(torch.device("cpu")) == (9, 0)
        assert current() is first
    answer = "from vitkernels.kernels.device import current; print(current().title)"
    assert run(answer).stdout.strip() == "CUDA"
    assert run(answer, TRITON_INTERPRET="1").stdout.strip() == "the CPU (interpreting)"


@pytest.mark.parametrize("version", ["2.1.0", "3.5.1", "3.10.0", "4.0.0+git1234"])
def test_versions_that_are_not_served(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert kernels.why_not() == f"triton is {version}; needs 3.6 to 3.9"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0+git1234"])
def test_versions_that_are_served(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.why_not() is None


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = kernels.why_not()
    assert reason is not None
    assert reason.startswith("triton did not import (")


@pytest.mark.parametrize("capability", [(5, 2), (7, 0), (7, 5)])
def test_old_gpus(capability: tuple[int, int]) -> None:
    major, minor = capability
    with stand_in(Gpu(*capability)):
        reason = declined_image()
    assert reason == (f"the kernels need compute capability 8.0 or later, and cpu has {major}.{minor}")


def test_tensors_on_another_device() -> None:
    assert declined_image() == "the kernels run on CUDA, not on cpu"
    with stand_in(Interpreter()):
        assert declined_image(IMAGE.to("meta")) == "the kernels run on the CPU (interpreting), not on meta"
        assert declined_image() is None


@pytest.mark.usefixtures("interpreter")
def test_float64() -> None:
    assert declined_image(weight=WEIGHT.double()) == "the kernels have no float64"


@pytest.mark.usefixtures("interpreter")
def test_more_patches_than_rows_can_be_numbered() -> None:
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(2**15, 3, 2**8, 2**8)
    reason = declined_image(image, torch.zeros(8, 3, 1, 1))
    assert reason == f"the kernels number rows in 32 bits, and the batch has {2**31} patches"


@pytest.mark.usefixtures("interpreter")
def test_what_rotary_leaves_to_the_reference() -> None:
    x, wide = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 258)
    assert declined("rotary", "forward", x, x, x, 0, False) is None
    assert declined("rotary", "backward", x, None, x, x, 0, False, [True, False, False]) is None
    learned = declined("rotary", "backward", x, x, x, x, 0, False, [True, False, True])
    assert learned == "the kernels have no gradients of sin and cos"
    reason = declined("rotary", "forward", wide, wide, wide, 0, False)
    assert reason == "the kernels hold heads in registers, at most 256 wide, and the last axis has 258"


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "served"),
    [
        ("cuda", torch.float32, "ieee", True),
        ("cuda", torch.float32, "tf32", False),
        ("cuda", torch.bfloat16, "tf32", True),
        ("cpu", torch.float32, "tf32", True),
    ],
)
def test_float32_patches_go_to_a_library_where_tf32_is_allowed(
    device: str, dtype: torch.dtype, precision: str, served: bool
) -> None:
    pytest.importorskip("triton")
    from vitkernels.kernels import patch_embed

    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = precision
    try:
        with FakeTensorMode():
            image, weight = (torch.empty(1, 3, 4, 4, device=device, dtype=dtype) for _ in range(2))
            call = SimpleNamespace(image=image, weight=weight)
            reasons = [patch_embed.why_not(direction, call) for direction in ("forward", "backward")]
    finally:
        products.fp32_precision = before
    sentence = "torch.backends.cuda.matmul allows TF32, and the kernels multiply float32 exactly"
    assert reasons == 2 * [None if served else sentence]


def test_asking_for_it_on_the_cpu_raises_its_sentence() -> None:
    code = """
import torch
import vitkernels as vk
from vitkernels import BackendError
try:
    with vk.use("triton"):
        vk.ops.patch_embed(torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 4, 4))
except BackendError as error:
    print(error)
with vk.record() as calls:
    vk.ops.patch_embed(torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 4, 4))
print(calls[0].backend)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    refused, ran = done.stdout.splitlines()
    assert "patch_embed (forward): no backend in use can serve this call. triton: torch sees no CUDA device" in refused
    assert ran in ("ext", "reference")


def test_importing_touches_neither_triton_nor_a_gpu() -> None:
    code = """
import sys, torch, vitkernels
from vitkernels import kernels
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "triton was imported"
assert not torch.cuda.is_initialized()
sys.modules["triton"] = None
print(vitkernels.backends()["triton"])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("triton did not import (")
