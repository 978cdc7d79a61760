"""CUDA C++ without a GPU: the extension's CUDA module as nvcc compiles it, its launches executed by the machine.

    with activate() as record:
        check_case(case, torch.bfloat16, "ext")
    assert not record.findings

The module is the real one, launchers included, on a stand-in for CUDA's runtime (cudart.cpp): each launch arrives here
with its kernel, grid, block, bytes of shared memory and arguments. The PTX is what the module holds. Its ops take
tensors of the CPU, under a namespace of their own; what they ask torch for, cuBLAS's products included, torch does on
the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptx.call import Call, Record, emulated
from ptx.launch import Packed, program
from vitkernels import dispatch, ext

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

CACHE = ROOT / "build" / "ptx-cuda"
ARCHITECTURE = 80
BLOCKS_AT_ONCE = 4  # of every kernel on a multiprocessor, as the stand-in says
_LAUNCH = ctypes.CFUNCTYPE(  # cudart.cpp's Launch
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def why_not() -> str | None:
    """A sentence that says why nothing can be compiled here, or None."""
    return None if nvcc.find() else "no CUDA toolkit: pip install -r requirements-cuda.txt, or set CUDA_HOME"


def _namespace(architecture: int) -> str:
    return f"vitkernels_on_the_machine_{architecture}"


def _flags(architecture: int) -> list[str]:
    name = f"-DVITKERNELS_NAMESPACE={_namespace(architecture)}"
    return [*nvcc.WARNINGS, *nvcc.ptx(architecture), name, "-DVITKERNELS_KEY=CPU"]


def _objects(toolkit: nvcc.Toolkit, architecture: int) -> list[Path]:
    return nvcc.compile_all(toolkit, _flags(architecture), CACHE / f"sm_{architecture}")


@functools.cache
def build(architecture: int = ARCHITECTURE) -> Path:
    """Compile the module with the stand-in for its runtime, or find it compiled.

    Args:
        architecture: whose PTX the module holds, 80 for sm_80.
    """
    toolkit = nvcc.find()
    assert toolkit is not None, why_not()
    source = Path(__file__).with_name("cudart.cpp")
    with _locked(CACHE):
        objects = _objects(toolkit, architecture)
        key = b"".join(each.name.encode() for each in objects) + source.read_bytes()
        module = _current(f"sm_{architecture}/cuda", key)
        if not module.exists():
            runtime = CACHE / "cudart.o"
            subprocess.run(["g++", "-std=c++17", "-O1", "-c", "-fPIC", source, "-o", runtime], check=True)
            # bound to its own stand-in: a torch with CUDA has the same symbols, and they are everybody's
            libraries = ["-cudart=none", *nvcc.TORCH[:3], "-Xlinker=-Bsymbolic"]
            nvcc.link(toolkit, [*objects, runtime], module, libraries)
    return module


def texts() -> dict[Path, str]:
    """The PTX that the module was made of, by source."""
    toolkit = nvcc.find()
    assert toolkit is not None, why_not()
    with _locked(CACHE):
        objects = _objects(toolkit, ARCHITECTURE)
    files = zip(nvcc.sources(), objects, strict=True)
    return {source: text for source, file in files for text in _ptx_in(file.read_bytes())}  # of C++ there is none


def _ptx_in(raw: bytes) -> tuple[str, ...]:
    """The PTX texts of an object or a fat binary."""
    parts = raw.split(b".version ")[1:]
    return tuple(".version " + part.split(b"\0")[0].decode() for part in parts)


def entries() -> set[str]:
    """The mangled names of all kernels of the module."""
    return {name for text in texts().values() for name in re.findall(r"\.entry (\w+)\(", text)}


def _current(name: str, contents: bytes) -> Path:
    """Where a library of these contents lies; what was made of others goes."""
    path = CACHE / f"{name}-{hashlib.sha256(contents).hexdigest()[:16]}.so"
    for old in set(CACHE.glob(f"{name}-*.so")) - {path}:
        old.unlink()
    return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process compiles, the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _load(architecture: int) -> Any:
    """The stand-in; the ops of the module are there after it."""
    module = build(architecture)
    library = torch.library.Library(_namespace(architecture), "DEF")
    for op in dispatch.OPS.values():
        for name, schema in op.schemas.items():
            library.define(f"{name}{schema}")
    torch.ops.load_library(str(module))
    stand_in = ctypes.CDLL(str(module))
    stand_in.keep = library
    return stand_in


def stand_in() -> Any:
    """The stand-in for CUDA's runtime, as a library."""
    return _load(ARCHITECTURE)


@functools.lru_cache(maxsize=64)
def _texts(address: int) -> tuple[str, ...]:
    """The PTX texts of a fat binary; its header is a magic number, a version, its own size, the size of the rest."""
    header, size = (int.from_bytes(ctypes.string_at(address + at, n), "little") for at, n in ((6, 2), (8, 8)))
    return _ptx_in(ctypes.string_at(address + header, size))


@functools.lru_cache(maxsize=256)
def _own(text: str, kernel: str) -> str:
    """A text without its other kernels, and without variables of headers that nobody reads."""
    head, *entries = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", text)
    kept = (each if f" {kernel}(" in each.split("\n", 1)[0] else each.partition("\n}\n")[2] for each in entries)
    own = head + "".join(kept)
    for line, name in re.findall(r"(?m)^(\.global \.align \d+ \.b8 (\w+)\[\d+\];\n)", own):
        own = own.replace(line, "") if own.count(name) == 1 else own
    return own


@dataclass
class Launched(Record):
    """What was launched while the machine stood in for a GPU."""

    names: list[str] = field(default_factory=list)  # of the kernels, mangled
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], int]] = field(
        default_factory=list
    )  # grid, block, shared bytes
    refuses: bool = False  # every launch, as a GPU refuses an impossible one
    errors: list[BaseException] = field(default_factory=list)  # that a launch raised: C++ lets none through


class _Watch(TorchDispatchMode):
    """Sees every tensor that an op's C++ makes: what kernels may touch is the memory of these and of its arguments."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.add(arguments)

    def add(self, found: Any) -> None:
        if isinstance(found, (list, tuple)):
            for each in found:
                self.add(each)
        elif isinstance(found, Tensor):
            self.tensors.append(found.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def owner(self, address: int) -> tuple[Tensor, int] | None:
        """The tensor that a pointer points to, and at which of its bytes.

        One that begins there goes first, then the largest.
        """
        found = []
        for tensor in self.tensors:
            begin = tensor.data_ptr()
            size = span(tensor)
            if tensor.numel() and begin <= address < begin + size:
                found.append((address == begin, size, tensor))
        if not found:
            return None
        _, _, tensor = max(found, key=lambda each: each[:2])
        return tensor, address - tensor.data_ptr()


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


_watching: list[_Watch] = []


def _arguments(text: str, kernel: str, pointers: Any) -> list[Packed]:
    """The arguments of a launch. Words of eight bytes that lie in a tensor's memory are pointers to it."""
    found = []
    for parameter, address in zip(program(text, kernel).kernel.parameters, pointers, strict=False):
        raw = _without_padding(ctypes.string_at(address, parameter.size), text, parameter.name)
        owners = {}
        for at in range(0, parameter.size - 7, 8):
            owner = _watching[-1].owner(int.from_bytes(raw[at : at + 8], "little"))
            if owner is not None:
                owners[at] = owner
        found.append(Packed(raw, owners))
    return found


@functools.lru_cache(maxsize=256)
def _loaded(text: str, name: str) -> frozenset[int] | None:
    """The bytes of a parameter that a kernel loads; None where that is not to be seen."""
    loads = re.findall(rf"\bld\.param(?:\.v(\d))?\.\w(\d+)\s[^;]*\[{name}(?:\+(\d+))?\]", text)
    if len(loads) + 1 != len(re.findall(rf"\b{name}\b", text)):  # beside its declaration
        return None
    spans = ((int(at or 0), int(count or 1) * int(bits) // 8) for count, bits, at in loads)
    return frozenset(byte for at, size in spans for byte in range(at, at + size))


def _without_padding(raw: bytes, text: str, name: str) -> bytes:
    """What no kernel loads may be anything; equal launches shall look equal."""
    loaded = _loaded(text, name)
    return raw if loaded is None else bytes(byte if at in loaded else 0 for at, byte in enumerate(raw))


def _on_launch(
    record: Launched, edit: Callable[[str], str], take: Callable[[Call, Record], None]
) -> Callable[..., int]:
    def launch(name: bytes, code: int, grid: Any, block: Any, shared: int, pointers: Any) -> int:
        kernel = name.decode()
        try:
            text = edit(_own(next(each for each in _texts(code) if f"{kernel}(" in each), kernel))
            sizes = tuple(grid.contents), tuple(block.contents), shared
            record.names.append(kernel)
            record.shapes.append(sizes)
            too_large = max(sizes[0][1:]) > 65535 or sizes[0][0] >= 2**31 or math.prod(sizes[1]) > 1024
            if record.refuses or too_large:
                return 9  # cudaErrorInvalidConfiguration, as of a GPU
            with torch._C._DisableTorchDispatch():
                take(Call(text, kernel, *sizes, _arguments(text, kernel, pointers)), record)
        except BaseException as error:
            record.errors.append(error)
            return 719  # cudaErrorLaunchFailure
        return 0

    return launch


def _launcher(name: str, record: Launched, architecture: int) -> Callable[..., Any]:
    overload = getattr(getattr(torch.ops, _namespace(architecture)), name).default

    def launch(*args: Any) -> Any:
        watch = _Watch(args)
        _watching.append(watch)
        try:
            with watch:  # past the mode at first: it is to see what the op calls, not the op
                return overload._op_dk(torch._C.DispatchKey.CPU, *args)
        except RuntimeError as error:
            if record.errors:
                raise record.errors[-1] from error
            raise
        finally:
            _watching.pop()

    return launch


@dataclass(frozen=True, eq=False)
class Machine:
    """The machine as the package sees it: `vitkernels.ext_cuda.Gpu`."""

    record: Launched
    capability_: tuple[int, int]
    architecture: int
    kind: str = "cpu"

    def why_not(self) -> str | None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.capability_

    def serves(self, capability: tuple[int, int]) -> bool:
        return True

    def launcher(self, name: str) -> Callable[..., Any]:
        return _launcher(name, self.record, self.architecture)


@contextlib.contextmanager
def activate(
    capability: tuple[int, int] = (8, 0),
    processors: int = 1,
    edit: Callable[[str], str] = str,
    architecture: int = ARCHITECTURE,
    take: Callable[[Call, Record], None] = emulated,
) -> Iterator[Launched]:
    """Let the package take the machine for the extension's GPU, inside the block.

    Args:
        capability: what it says it is.
        processors: multiprocessors that it says it has.
        edit: what to make of a kernel's PTX before it runs: faults for tests.
        architecture: whose PTX runs, 80 for sm_80.
        take: what to do with a launch.
    """
    record = Launched()
    callback = _LAUNCH(_on_launch(record, edit, take))
    stand_in = _load(architecture).vitkernels_stand_in
    stand_in(callback, processors, *capability)
    try:
        with ext.stand_in(Machine(record, capability, architecture)):
            yield record
    finally:
        stand_in(_LAUNCH(0), 1, *capability)
