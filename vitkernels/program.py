"""Programs of the compiled extension: lines of a tape that it runs in one call, with no Python between them.

On few tokens what stands between two launches (Python, torch's dispatcher, tensors wrapped for either) takes as long as
the launches do. A program is a tensor that owns it; `csrc/cpu/program.h` says how one is written down.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Kind(enum.IntEnum):
    """Of an argument, as in csrc/cpu/program.cpp."""

    NONE = 0
    TENSOR = 1
    WHOLE = 2
    NUMBER = 3
    NAME = 4
    FLAGS = 5
    DTYPE = 6


@dataclass(frozen=True)
class Call:
    """A launch: an op's name, its arguments (kind and value, of a tensor its name), and the names of its results."""

    op: str
    arguments: tuple[tuple[_Kind, Any], ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Extension:
    """What runs programs.

    Attributes:
        ops: names of the launchers that they may hold.
        dtypes: the numbers of dtypes.
        make: (code, numbers, names) -> a program.
        run: (program, tensors) -> tensors.
    """

    ops: Mapping[Any, str]
    dtypes: Mapping[torch.dtype, int]
    make: Callable[[list[int], list[float], list[str]], Tensor]
    run: Callable[[Tensor, list[Tensor]], list[Tensor]]


extension: Extension | None = None  # where it is known


def call(launcher: Any, args: Sequence[Any], results: Sequence[str], names: Mapping[int, str]) -> Call | None:
    """A launch as a program would make it; None where it would not.

    Args:
        launcher: what launches.
        args: its arguments.
        results: names of all its results.
        names: of tensors, by id.
    """
    op = None if extension is None else extension.ops.get(launcher)
    if op is None:
        return None
    arguments = [_argument(each, names) for each in args]
    found = tuple(each for each in arguments if each is not None)
    return Call(op, found, tuple(results)) if len(found) == len(arguments) else None


def _argument(value: Any, names: Mapping[int, str]) -> tuple[_Kind, Any] | None:
    assert extension is not None
    if isinstance(value, Tensor):  # on other devices the launchers are others
        return (_Kind.TENSOR, names[id(value)]) if value.device.type == "cpu" else None
    if value is None:
        return _Kind.NONE, 0
    if type(value) in (bool, int):
        return _Kind.WHOLE, int(value)
    if type(value) is float:
        return _Kind.NUMBER, value
    if type(value) is str:
        return _Kind.NAME, value
    if type(value) in (list, tuple) and len(value) < 32 and all(type(each) is bool for each in value):
        return _Kind.FLAGS, sum(each << index for index, each in enumerate(value)) + (1 << len(value))
    if isinstance(value, torch.dtype) and value in extension.dtypes:
        return _Kind.DTYPE, extension.dtypes[value]
    return None


def join(calls: Sequence[Call], inputs: Sequence[str], outputs: Sequence[str], last: Sequence[Sequence[str]]) -> Tensor:
    """A program.

    Args:
        calls: its lines.
        inputs, outputs: names of tensors, as they are given to it and as it gives them back.
        last: of each line, which tensors of the program's own are dropped after it.
    """
    assert extension is not None
    slots: dict[str, int] = {}
    for name in (*inputs, *(name for each in calls for name in each.results)):
        slots.setdefault(name, len(slots) + 1)
    numbers: list[float] = []
    names: list[str] = []
    lines: list[int] = []
    for each, dropped in zip(calls, last, strict=True):
        lines.append(_place(names, each.op))
        for kind, value in each.arguments:
            if kind is _Kind.TENSOR:
                value = slots[value]
            elif kind is _Kind.NUMBER:
                value = _place(numbers, value)
            elif kind is _Kind.NAME:
                value = _place(names, value)
            lines += kind, value
        unread = set(each.results).intersection(dropped)  # by no line at all: it is written and dropped at once
        lines += [0 if name in unread else slots[name] for name in each.results]
        own = [slots[name] for name in dropped if name not in unread]
        lines += len(own), *own
    code = [len(inputs), len(slots) + 1, len(outputs), *(slots[name] for name in outputs), *lines]
    return extension.make(code, numbers, names)


def _place(values: list[Any], value: Any) -> int:
    if value not in values:
        values.append(value)
    return values.index(value)
