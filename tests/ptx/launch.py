"""`run`: PTX text, the name of a kernel, a grid, a block and arguments, from wherever they come."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ptx import (
    atomics,
    convert,
    copies,
    floats,
    inflight,
    integers,
    matrix,
    memory,
    moves,
    schedule,
    sync,
    warp,
    warpgroup,
)
from ptx.copies import TensorMap
from ptx.operands import Instruction
from ptx.order import Order
from ptx.state import SHARED, Cohort, Launch
from ptx.text import Module, Variable
from ptx.translate import Translator

FAMILIES = (atomics, convert, copies, floats, integers, matrix, memory, moves, sync, warp, warpgroup)
THREADS = 8192  # run together, about: enough for numpy, few enough for the processor's cache
_ACCESS = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2}


class Program:
    """A kernel, parsed and placed.

    Attributes:
        static_shared, local: bytes of shared memory before the dynamic one, and of each thread's local memory.
        grain: bytes of its smallest access to shared memory, at most 4.
    """

    def __init__(self, text: str, name: str | None) -> None:
        self.module = Module(text)
        self.kernel = self.module.kernel(name)
        addresses: dict[str, int] = {}
        self.static_shared = self.local = 0
        dynamic = []
        for variable in self.kernel.variables.values():
            if variable.space == "shared" and variable.size:
                self.static_shared = -(-self.static_shared // variable.align) * variable.align
                addresses[variable.name] = SHARED + self.static_shared
                self.static_shared += variable.size
            elif variable.space == "shared":
                dynamic.append(variable)
            elif variable.space == "local":
                self.local = -(-self.local // variable.align) * variable.align
                addresses[variable.name] = self.local
                self.local += variable.size
        for variable in dynamic:
            self.static_shared = -(-self.static_shared // max(16, variable.align)) * max(16, variable.align)
        addresses |= {variable.name: SHARED + self.static_shared for variable in dynamic}
        self.translator = Translator(self.kernel, addresses)
        self.grain = min([4, *(self._access(each) for each in self.translator.flow.code)])
        self.live = functools.cache(self.translator.live)

    @staticmethod
    def _access(instruction: Instruction) -> int:
        parts = instruction.opcode.split(".")
        if parts[0] not in ("ld", "st", "atom", "red") or {"global", "param", "local", "const"} & set(parts):
            return 4
        return _ACCESS.get(parts[-1], 4)

    def instruction(self, at: int) -> Instruction:
        return self.translator.flow.code[at]


@functools.lru_cache(maxsize=16)  # a trial makes six at the most
def program(ptx: str, kernel: str | None = None) -> Program:
    collecting = gc.isenabled()
    gc.disable()  # a kernel is a hundred thousand small objects that all stay
    try:
        return Program(ptx, kernel)
    finally:
        if collecting:
            gc.enable()


def _memory_of(argument: Any) -> tuple[int, int, int]:
    """(host address, bytes, bytes of an element) of all that a tensor or array reaches."""
    strides = (
        argument.stride() if isinstance(argument, torch.Tensor) else [s // argument.itemsize for s in argument.strides]
    )
    item = argument.element_size() if isinstance(argument, torch.Tensor) else argument.itemsize
    pointer = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument.ctypes.data
    if 0 in argument.shape:
        return pointer, 0, item
    return pointer, (sum((n - 1) * s for n, s in zip(argument.shape, strides, strict=True)) + 1) * item, item


class Loaded(Launch):
    """A launch with its arguments in memory."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[Any],
        names: Sequence[str],
    ) -> None:
        super().__init__(program, grid, block, shared)
        parameters = program.kernel.parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"arguments: got {len(arguments)}; needs {len(parameters)}")
        self.offsets: dict[str, int] = {}
        size = 0
        for each in parameters:
            size = -(-size // each.align) * each.align
            self.offsets[each.name] = size
            size += each.size
        self.bytes = np.zeros(max(16, size), "u1")
        base = self.memory.add_array("parameters", self.bytes)
        self.constants = {name: base + offset for name, offset in self.offsets.items()}
        for variable in program.kernel.variables.values():
            if variable.space in ("global", "const"):
                self.constants[variable.name] = self._variable(variable)
        for number, (each, argument) in enumerate(zip(parameters, arguments, strict=True)):
            name = names[number] if number < len(names) else each.name
            self._argument(each, argument, name)
        self.cached: dict[Any, Any] = {}

    def _variable(self, variable: Variable) -> int:
        contents = np.zeros(max(1, variable.size), "u1")
        if variable.contents:
            contents[: len(variable.contents)] = np.frombuffer(variable.contents, "u1")
        return self.memory.add_array(variable.name, contents)

    def _argument(self, parameter: Variable, argument: Any, name: str) -> None:
        at = self.offsets[parameter.name]
        if isinstance(argument, TensorMap):
            self.tensor_maps[self.constants[parameter.name]] = argument
            return
        if isinstance(argument, bytes):
            raw = argument
        elif isinstance(argument, (torch.Tensor, np.ndarray)):
            address, nbytes, item = _memory_of(argument)
            raw = self.memory.add(name, address, nbytes, item, argument).to_bytes(8, "little")
        elif isinstance(argument, float):
            raw = np.array(argument, f"f{parameter.size}").tobytes()
        else:
            value = 0 if argument is None else int(argument)
            raw = (value & (2 ** (8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        if len(raw) != parameter.size:
            raise ValueError(f"{name}: got {len(raw)} bytes; needs {parameter.size}")
        self.bytes[at : at + len(raw)] = np.frombuffer(raw, "u1")

    def parameter(self, name: str, offset: int, size: int, dtype: str, instruction: Instruction) -> Any:
        """A parameter's value, [1, 1]."""
        key = (name, offset, dtype)
        if key not in self.cached:
            if name not in self.offsets:
                raise instruction.refuse(f"{name} is no parameter of the kernel")
            at = self.offsets[name] + offset
            self.cached[key] = self.bytes[at : at + size].copy().view(dtype).reshape(1, 1)
        return self.cached[key]


def run(
    ptx: str,
    kernel: str | None,
    grid: Sequence[int],
    block: Sequence[int],
    shared: int,
    arguments: Sequence[Any],
    names: Iterable[str] = (),
    order: type[Order] = Order,
) -> Loaded:
    """Execute a kernel on the CPU.

    Args:
        ptx: the text that a compiler made.
        kernel: name of the kernel in it; None for the only one.
        grid: CTAs along x, y, z (1 where left out).
        block: threads along x, y, z.
        shared: bytes of dynamic shared memory.
        arguments: tensors or arrays of the host for pointers (written in place), numbers, bytes, None for a null
            pointer, `TensorMap` for a TMA descriptor.
        names: what findings call the arguments; by default the parameters' names.
        order: what follows the accesses to shared memory.

    Returns:
        The launch; its `findings` say what the kernel did wrong.

    Raises:
        Fault: a finding after which the kernel cannot go on (out of bounds, a hang).
        Unsupported: the text has an instruction or form that is not defined, with its line.
    """
    made = program(ptx, kernel)
    (x, y, z), (bx, by, bz) = ((*each, 1, 1)[:3] for each in (grid, block))
    if made.kernel.threads and made.kernel.threads[0] * made.kernel.threads[1] * made.kernel.threads[2] < bx * by * bz:
        raise ValueError(f"block: got {tuple(block)}; the kernel was compiled for {made.kernel.threads}")
    launch = Loaded(made, (x, y, z), (bx, by, bz), shared, arguments, tuple(names))
    launch.order = order
    inflight.check(made.translator.flow, launch.findings)
    total, at_once = x * y * z, max(1, THREADS // launch.threads)
    with np.errstate(all="ignore"):
        for first in range(0, total, at_once):
            schedule.run(Cohort(launch, np.arange(first, min(first + at_once, total))))
    return launch
