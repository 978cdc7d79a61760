"""A launch that can be made again, whichever compiler's text it is of, and what to do with one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ptx.copies import TensorMap
from ptx.findings import Finding
from ptx.launch import Loaded, Packed, run
from ptx.order import Order
from ptx.text import without_comments

ALIGNMENT = 64  # of what torch allocates on a CPU


@dataclass(eq=False)
class Call:
    """What a launcher gives the machine."""

    ptx: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, ...]
    shared: int
    arguments: list[Any]
    names: Sequence[str] = ()

    def launch(self, order: type[Order] = Order) -> Loaded:
        """Launch it on its own tensors."""
        return run(self.ptx, self.kernel, self.grid, self.block, self.shared, self.arguments, self.names, order)

    def run(self, ptx: str = "", order: type[Order] = Order) -> tuple[Loaded, list[torch.Tensor]]:
        """Launch it on copies, with other PTX if given; gives the launch and its tensors as they are after it."""
        again = dataclasses.replace(self, ptx=ptx or self.ptx, arguments=copied(self.arguments))
        return again.launch(order), list(tensors(again.arguments))

    def description(self) -> tuple[Any, ...]:
        """All that the machine is given, but the elements of tensors; of the text what is executed."""
        storages: dict[int, int] = {}
        kinds = [_kind(each, storages) for each in self.arguments]
        return _executed(self.ptx), self.kernel, self.grid, self.block, self.shared, kinds


@dataclass
class Record:
    """What was launched while something stood in for a GPU.

    Attributes:
        launches: what came of the launches, in order.
        keeps: whether to keep the calls.
        calls: what each launch was given: tensors as they were before it.
    """

    launches: list[Any] = field(default_factory=list)
    keeps: bool = False
    calls: list[Call] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        return [each for launch in self.launches if isinstance(launch, Loaded) for each in launch.findings]


def emulated(call: Call, record: Record) -> None:
    """Run a launch on the machine."""
    if record.keeps:
        record.calls.append(dataclasses.replace(call, arguments=copied(call.arguments)))
    record.launches.append(call.launch())


def described(call: Call, record: Record) -> None:
    """Launch nothing; record what the machine would be given."""
    record.launches.append(call.description())


@functools.lru_cache(maxsize=64)
def _executed(ptx: str) -> str:
    """What a text says beside comments and for whom it is."""
    lines = map(str.strip, without_comments(ptx, []).split("\n"))
    return "\n".join(line for line in lines if line and not line.startswith((".version", ".target")))


def tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Those that arguments are, or point to."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Packed):
            yield from (tensor for tensor, _ in each.pointers.values())


def copied(arguments: Sequence[Any]) -> list[Any]:
    """Copies of tensors that keep strides and alignment; what several places point to stays one."""
    made: dict[Any, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in made:
            made[key] = _copy(tensor)
        return made[key]

    def of(argument: Any) -> Any:
        if isinstance(argument, TensorMap):
            return dataclasses.replace(argument, matrix=_copy(torch.from_numpy(argument.matrix)).numpy())
        if isinstance(argument, Packed):
            pointers = {at: (copy(tensor), offset) for at, (tensor, offset) in argument.pointers.items()}
            return dataclasses.replace(argument, pointers=pointers)
        return copy(argument) if isinstance(argument, torch.Tensor) else argument

    return [of(each) for each in arguments]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return tensor
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr() % ALIGNMENT // tensor.element_size()
    flat = torch.zeros(start + span, dtype=tensor.dtype)
    flat[start:] = torch.as_strided(tensor.detach(), (span,), (1,))
    return torch.as_strided(flat, tensor.shape, tensor.stride(), start)


def _kind(argument: Any, storages: dict[int, int]) -> Any:
    """What a launch depends on of a tensor beside its elements: others in the same storage count."""
    if isinstance(argument, TensorMap):
        return argument.box, argument.swizzle, _kind(torch.from_numpy(argument.matrix), storages)
    if isinstance(argument, Packed):
        raw = bytearray(argument.raw)
        for at in argument.pointers:
            raw[at : at + 8] = bytes(8)
        pointers = [(at, offset, _kind(tensor, storages)) for at, (tensor, offset) in argument.pointers.items()]
        return bytes(raw), pointers
    if not isinstance(argument, torch.Tensor):
        return argument
    start = argument.untyped_storage().data_ptr()
    number = storages.setdefault(start, len(storages))
    offset = argument.data_ptr() - start
    return number, offset, start % ALIGNMENT, argument.dtype, tuple(argument.shape), argument.stride()
