"""A Triton driver whose GPU is not there: `kernel[grid](...)` compiles to PTX for a target, and a launcher takes it.

    with activate(Gpu(capability=(9, 0), processors=132)) as record:
        check_case(case, torch.bfloat16, "triton")
    assert not record.findings

The launcher is an argument: `Emulated` runs the PTX on the machine, `Nothing` stops where a GPU would begin.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as runtime

from ptx.copies import TensorMap
from ptx.findings import Finding
from ptx.launch import Loaded, run
from ptx.order import Order
from ptx.text import without_comments
from vitkernels.kernels.device import stand_in

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB a program may have
ALIGNMENT = 64  # of what torch allocates on a CPU
CACHE = Path(__file__).parents[2] / "build" / "ptx-cache"


@dataclass(eq=False)
class Call:
    """A launch that can be made again."""

    ptx: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: list[Any]
    names: list[str]

    def run(self, ptx: str = "", order: type[Order] = Order) -> tuple[Loaded, list[Any]]:
        """Launch it, with other PTX if given; gives the launch and its arguments as they are after it."""
        arguments = copied(self.arguments)
        text = ptx or self.ptx
        launch = run(text, self.kernel, self.grid, (self.threads,), self.shared, arguments, self.names, order)
        return launch, arguments

    def description(self) -> tuple[Any, ...]:
        """All that the machine is given, but the elements of tensors; of the text what is executed."""
        storages: dict[int, int] = {}
        lines = map(str.strip, without_comments(self.ptx, []).split("\n"))
        text = "\n".join(line for line in lines if line and not line.startswith((".version", ".target")))
        kinds = [_kind(each, storages) for each in self.arguments]
        return text, self.kernel, self.grid, self.threads, self.shared, kinds


def _kind(argument: Any, storages: dict[int, int]) -> Any:
    """What a launch depends on of a tensor beside its elements: others in the same storage count."""
    if isinstance(argument, TensorMap):
        return argument.box, argument.swizzle, _kind(torch.from_numpy(argument.matrix), storages)
    if not isinstance(argument, torch.Tensor):
        return argument
    start = argument.untyped_storage().data_ptr()
    number = storages.setdefault(start, len(storages))
    offset = argument.data_ptr() - start
    return number, offset, start % ALIGNMENT, argument.dtype, tuple(argument.shape), argument.stride()


def copied(arguments: list[Any]) -> list[Any]:
    """Copies of tensors that keep strides and alignment."""
    return [_copy(each) for each in arguments]


def _copy(argument: Any) -> Any:
    if isinstance(argument, TensorMap):
        return dataclasses.replace(argument, matrix=_copy_tensor(torch.from_numpy(argument.matrix)).numpy())
    return _copy_tensor(argument) if isinstance(argument, torch.Tensor) else argument


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return tensor
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr() % ALIGNMENT // tensor.element_size()
    flat = torch.zeros(start + span, dtype=tensor.dtype)
    flat[start:] = torch.as_strided(tensor.detach(), (span,), (1,))
    return torch.as_strided(flat, tensor.shape, tensor.stride(), start)


@dataclass
class Record:
    """What was launched while a driver was active.

    Attributes:
        launches: what the launchers gave, in order.
        calls: what each launch was given, where `keeps` is set: tensors as they were before it.
    """

    launches: list[Any] = field(default_factory=list)
    keeps: bool = False
    calls: list[Call] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        return [each for launch in self.launches if isinstance(launch, Loaded) for each in launch.findings]


class Nothing:
    """A launcher that launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        runtime.active.record.launches.append(self.name)


class Launcher:
    """Takes apart what Triton gives a launcher, and hands it to `take` as a call."""

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
        self.take(Call(ptx, kernel, (x, y, z), self.threads, self.shared, arguments, names), runtime.active.record)

    def take(self, call: Call, record: Record) -> None:
        raise NotImplementedError


class Emulated(Launcher):
    """A launcher that runs the PTX on the machine, on tensors of the CPU."""

    def take(self, call: Call, record: Record) -> None:
        if record.keeps:
            record.calls.append(dataclasses.replace(call, arguments=copied(call.arguments)))
        launch = run(call.ptx, call.kernel, call.grid, (call.threads,), call.shared, call.arguments, call.names)
        record.launches.append(launch)


class Described(Launcher):
    """A launcher that launches nothing and records what the machine would be given."""

    def take(self, call: Call, record: Record) -> None:
        record.launches.append(call.description())


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
        major, minor = self.gpu.capability_
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> Any:
        return self.gpu.capability_, self.launcher_cls  # kernels are kept by device: those of two targets do not mix

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
def activate(gpu: Gpu, launcher: Callable[[Any, Any], Any] = Emulated) -> Iterator[Record]:
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
