"""What launches are for: a CUDA device, the CPU under Triton's interpreter, or what a test puts in their place."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from vitkernels import dispatch


class Device(Protocol):
    """What the launchers ask of a kind of device. Answers of `why_not` are kept by object.

    Attributes:
        kind: the torch device type of the tensors that its kernels take.
        title: what a sentence calls it.
    """

    @property
    def kind(self) -> str: ...

    @property
    def title(self) -> str: ...

    def __hash__(self) -> int: ...

    def why_not(self) -> str | None:
        """A sentence that says why no kernel can run on it in this process, or None."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of one of them."""

    def processors(self, device: torch.device) -> int:
        """Its multiprocessors."""

    def launching(self, device: torch.device) -> AbstractContextManager[object]:
        """A context in which launches go to it."""


class Cuda:
    """The NVIDIA GPUs that torch sees."""

    kind, title = "cuda", "CUDA"

    def why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        if os.name == "posix" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "triton finds no C compiler for its launchers; needs gcc or clang, or one that CC names"
        return None

    @functools.cache  # noqa: B019  # one object for the life of the process
    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    @functools.cache  # noqa: B019
    def processors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def launching(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.device(device)  # Triton launches on the current device, whatever its tensors are on


class Interpreter:
    """The CPU under Triton's interpreter, posing as an H100 with one multiprocessor: persistent programs loop."""

    kind, title = "cpu", "the CPU (interpreting)"

    def why_not(self) -> str | None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return (9, 0)

    def processors(self, device: torch.device) -> int:
        return 1

    def launching(self, device: torch.device) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


_CUDA, _INTERPRETER = Cuda(), Interpreter()
_standing_in: Device | None = None


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests; read when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def current() -> Device:
    """What launches are for now."""
    return _standing_in or (_INTERPRETER if interpreting() else _CUDA)


@contextlib.contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Let the launchers take `device` for the real one inside the block, in every thread: for tests and measurements.

    What compiles and launches is Triton's active driver, which has to fit it.
    """
    global _standing_in
    before, _standing_in = _standing_in, device
    dispatch.backends_changed()
    try:
        yield
    finally:
        _standing_in = before
        dispatch.backends_changed()
