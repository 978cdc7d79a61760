"""A Triton driver whose GPU is not there: `kernel[grid](...)` compiles to PTX for a target, and a launcher takes it.

    with activate(Gpu(capability=(9, 0), processors=132)) as record:
        check_case(case, torch.bfloat16, "triton")
    assert not record.findings

The launcher is an argument: `EMULATED` runs the PTX on the machine, `Nothing` stops where a GPU would begin.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as runtime

from ptx.call import Call, Record, emulated
from ptx.copies import TensorMap
from vitkernels.kernels.device import stand_in

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB a program may have
CACHE = Path(__file__).parents[2] / "build" / "ptx-cache"


def compiled_for(capability: tuple[int, int]) -> tuple[int, int]:
    """Whose PTX a GPU is given: Triton tells sm_86 and sm_89 from sm_80 in 8-bit floats alone, which are not used."""
    return (8, 0) if capability[0] == 8 else capability


class Nothing:
    """A launcher that launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        runtime.active.record.launches.append(self.name)


class Launcher:
    """Takes apart what Triton gives a launcher, and hands it to `take` as a call."""

    take: Callable[[Call, Record], None]

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = dict(source.signature)
        self.descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        if metadata.global_scratch_size:
            raise NotImplementedError(f"{metadata.name} wants {metadata.global_scratch_size} bytes of scratch memory")

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        arguments: list[Any] = []
        names: list[str] = []
        maps = iter(self.descriptors)
        _, _, _, _, *given = rest  # packed metadata, launch metadata, hooks
        for (name, kind), value in zip(self.signature.items(), given, strict=True):
            for title, each in _flat(name, kind, value, maps):
                names.append(title)
                arguments.append(each)
        kernel, ptx = function
        arguments += [None, None]  # scratch memory, which no kernel here has
        self.take(Call(ptx, kernel, (x, y, z), (self.threads,), self.shared, arguments, names), runtime.active.record)


@functools.cache  # Triton keeps kernels by launcher
def taking(take: Callable[[Call, Record], None]) -> type[Launcher]:
    """The launcher that has `take` do what is to be done with a launch, such as `call.emulated`."""
    return type("Taking", (Launcher,), {"take": staticmethod(take)})


EMULATED = taking(emulated)  # runs the PTX on the machine, on tensors of the CPU


def _flat(name: str, kind: Any, value: Any, maps: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """The kernel's parameters that an argument of a Triton function becomes."""
    if kind == "constexpr":
        return
    if isinstance(kind, tuple):
        for number, (each, item) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{name}[{number}]", each, item, maps)
    elif kind.startswith("tensordesc"):
        meta = next(maps)
        matrix = torch.as_strided(value.base, value.shape, value.strides)
        bits = {2: torch.int16, 4: torch.int32}[matrix.element_size()]
        if matrix.data_ptr() % 16 or any(stride * matrix.element_size() % 16 for stride in value.strides[:-1]):
            raise ValueError(f"{name}: a TMA descriptor needs an address and strides of multiples of 16 bytes")
        yield name, TensorMap(matrix.view(bits).numpy(), tuple(meta["block_size"]), meta["swizzle"])
        for number in (*value.shape, *value.strides):
            yield name, number
    else:
        yield name, value


@dataclass(frozen=True)
class Gpu:
    """A GPU that is not there, as the package's launchers see it: `vitkernels.kernels.device.Device`."""

    capability_: tuple[int, int] = (9, 0)
    processors_: int = 1
    kind: str = "cpu"
    title: str = "a machine for PTX"

    def why_not(self) -> str | None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.capability_

    def processors(self, device: torch.device) -> int:
        return self.processors_

    def launching(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class Driver:
    """The part of a driver that Triton's JIT asks for."""

    def __init__(self, gpu: Gpu, launcher: Callable[[Any, Any], Any]) -> None:
        self.gpu, self.launcher_cls, self.record = gpu, launcher, Record()
        self.utils = SimpleNamespace(get_device_properties=self._properties, load_binary=self._load)

    def _properties(self, device: Any) -> dict[str, int]:
        shared = SHARED_MEMORY[self.gpu.capability_] * 1024
        return {"max_shared_mem": shared, "multiprocessor_count": self.gpu.processors_}

    @staticmethod
    def _load(name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return name, (name, binary.decode()), 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_target(self) -> GPUTarget:
        major, minor = compiled_for(self.gpu.capability_)
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> Any:
        # kernels are kept by device: those of two targets do not mix
        return self.gpu.capability_, compiled_for(self.gpu.capability_), self.launcher_cls

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _only_ptx(self: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None):  # type: ignore[no-untyped-def]
    """Triton's hook of the compiler: what it builds is the PTX. Asked for a key, it gives one of its own."""
    if self is None:
        return "vitkernels ptx", "vitkernels ptx"
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextlib.contextmanager
def activate(gpu: Gpu, launcher: Callable[[Any, Any], Any] = EMULATED) -> Iterator[Record]:
    """Let Triton and the package believe in a GPU, inside the block."""
    try:
        before = runtime.active
    except RuntimeError:  # there is no GPU at all
        before = None
    driver = Driver(gpu, launcher)
    hook, knobs.runtime.add_stages_inspection_hook = knobs.runtime.add_stages_inspection_hook, _only_ptx
    folder, knobs.cache.dir = knobs.cache.dir, str(CACHE)
    runtime.set_active(driver)
    try:
        with stand_in(gpu):
            yield driver.record
    finally:
        runtime.set_active(before)
        knobs.runtime.add_stages_inspection_hook = hook
        knobs.cache.dir = folder
