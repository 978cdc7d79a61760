"""The kind of a call: all of it but its tensors' values. Calls of one kind pass one check and end in one kernel.

At small sizes checks, casts and the choice of a backend take longer than the kernel. So a public op notes at its third
call of a kind what came of the arguments (`remembered`), and later calls go there at once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from vitkernels import dispatch
from vitkernels.tape import FROM_CALL

MOST = 4096  # kinds of calls that are remembered
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TOLD = frozenset({*_PLAIN, int, float, bool, str, type(None), torch.dtype})  # others may change, or hold tensors

Given = ParamSpec("Given")
Result = TypeVar("Result")


def look_at(args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether the call is plain, and whether it needs an autograd Function.

    A call is plain where nobody looks on: tensors of memory that holds their values (of some it holds the negative), no
    transform, no dispatch mode, no profiler. Such a call goes straight to the launcher. The opaque torch op is there
    for all others: tracing, fake tensors, tensor subclasses, counters of FLOPs.
    """
    transformed = _transformed()
    plain = not (transformed or _watched() or torch.autograd._profiler_enabled())
    learns = False
    for arg in args:
        if type(arg) in _PLAIN:
            learns = learns or arg.requires_grad
            plain = plain and not (arg.is_meta or arg.is_neg()) and torch._C._has_storage(arg)
        elif isinstance(arg, torch.Tensor):
            learns, plain = learns or arg.requires_grad, False
    return plain, transformed or (learns and torch.is_grad_enabled())


def signature(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """All but their values that a plain call's tensors decide about, and what is no tensor; None if it is not plain.

    Two calls of one signature, in one order of backends, pass the same checks, are served by the same launchers and do
    the same with their tensors (`vitkernels.tape`). A profiler changes nothing: what it sees, it sees at each launch.
    Devices are part of it: who asks looks himself for tensors without memory.
    """
    if (  # as `_transformed` and `_watched`, which would be two calls more
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._is_tracing()
    ):
        return None
    found: list[Any] = []
    for arg in args:
        if type(arg) in _PLAIN:
            if arg.is_neg():  # memory holds the negative: imag of a conjugate, gradients that come through one
                return None
            try:  # kernels move 16 bytes at a time where they may
                found.append((arg.dtype, arg.shape, arg.stride(), arg.device, arg.data_ptr() & 15, arg.requires_grad))
            except RuntimeError:  # it has no memory
                return None
        elif isinstance(arg, torch.Tensor):
            return None
        else:
            found.append(tuple(arg) if type(arg) is list else arg)
    return tuple(found)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _watched() -> bool:
    return torch._C._len_torch_dispatch_stack() != 0 or torch._C._is_tracing()


# ------------------------------------------------------------------------------------------------ calls of before


class Note:
    """What a call of a public op came to: the casts that it made, and the call of an `op.Op`."""

    def __init__(self) -> None:
        self._casts: dict[int, tuple[Tensor, torch.dtype]] = {}
        self._calls: list[tuple[Any, tuple[Any, ...], Any, Any]] = []
        self._held: list[Any] = []  # so that no id is used twice

    def cast(self, before: Tensor, after: Tensor) -> None:
        self._casts[id(after)] = before, after.dtype
        self._held.append(after)

    def call(self, apply: Any, launcher: Any, args: tuple[Any, ...], results: Any) -> None:
        """Note the op's call.

        Args:
            apply: the autograd Function's; None where no gradient is to come.
            launcher: what serves such a call.
            args, results: of the op.
        """
        self._calls.append((apply, launcher, args, results))

    def way(self, given: Sequence[Any], result: Any, device: str, autocast: bool) -> Callable[..., Any] | None:
        """(*given) -> result, for calls of the kind; None where more was done to tensors than casts.

        Args:
            given, result: of the public op.
            device: type of its tensors' device.
            autocast: whether autocast is on there.
        """
        names = {id(each): f"a{index}" for index, each in enumerate(given) if isinstance(each, Tensor)}
        if len(self._calls) != 1 or len(names) != sum(isinstance(each, Tensor) for each in given):
            return None  # another call may give two tensors where this one gave one
        apply, launcher, args, results = self._calls[0]
        used: set[str] = set()
        space: dict[str, Any] = {"launch": launcher, "apply": apply, "set_autocast": torch.set_autocast_enabled}
        inner: list[str] = []
        for arg in args:
            name = names.get(id(arg)) if isinstance(arg, Tensor) else None
            if isinstance(arg, Tensor) and name is None:
                before, dtype = self._casts.get(id(arg), (None, None))
                if id(before) not in names:
                    return None
                constant = f"c{len(space)}"
                space[constant] = dtype
                used.add(names[id(before)])
                name = f"{names[id(before)]}.to({constant})"
            elif name is not None:
                used.add(name)
            else:
                name = f"c{len(space)}"
                space[name] = arg
            inner.append(name)
        if len(used) != len(names):
            return None  # a tensor that the op did not get was read for its value, such as a scale
        several = isinstance(results, tuple)
        handed = {id(each): f"out[{index}]" for index, each in enumerate(results)} if several else {id(results): "out"}
        outer = [handed.get(id(each), names.get(id(each))) for each in (result if type(result) is tuple else (result,))]
        if None in outer:
            return None
        answer = f"({', '.join(map(str, outer))},)" if type(result) is tuple else outer[0]
        lines = [f"v{index} = {name}" for index, name in enumerate(inner)]
        cast = ", ".join(f"v{index}" for index in range(len(inner)))
        call = f"out = launch({cast})" if apply is None else f"out = apply({cast}, launch)"
        if autocast:  # dtypes are settled: inside the op it would cast again
            switch = f"set_autocast({device!r}, "
            lines += [f"{switch}False)", "try:", f"    {call}", "finally:", f"    {switch}True)"]
        else:
            lines.append(call)
        body = "\n    ".join([*lines, f"return {answer}"])
        exec(f"def run({', '.join(f'a{index}' for index in range(len(given)))}):\n    {body}\n", space)
        return space["run"]


_here = threading.local()


def noting() -> Note | None:
    """The note that this thread's call is taken down in, if it is."""
    return getattr(_here, "note", None)


def remembered(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A public op that goes the way of before where a call's kind came before.

    What it does with its arguments follows from their kind: it reads no values of tensors. The first one is a tensor.
    """
    ways: dict[Any, Any] = {}  # by kind: how many calls there were, or the way
    generation = dispatch.generation()

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        nonlocal generation
        if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        given = (*args, *kwargs.values()) if kwargs else args
        found = signature(given)
        if found is None or not given or type(given[0]) not in _PLAIN:
            return function(*args, **kwargs)
        types = tuple(map(type, given))
        if not _TOLD.issuperset(types):
            return function(*args, **kwargs)
        device = given[0].device.type  # type: ignore[attr-defined]
        autocast = None
        if torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
        kind = found, types, tuple(kwargs), torch.is_grad_enabled(), autocast, dispatch.asked()
        if generation != dispatch.generation() or len(ways) == MOST:
            ways.clear()  # backends have changed; or so many kinds are shapes that do not come again
            generation = dispatch.generation()
        try:
            way = ways.get(kind, 0)
        except TypeError:  # an argument without a hash
            return function(*args, **kwargs)
        if type(way) is not int:
            return way(*given)
        ways[kind] = way + 1
        if way + 1 != FROM_CALL or noting() is not None:
            return function(*args, **kwargs)
        note = _here.note = Note()
        try:
            result = function(*args, **kwargs)
        finally:
            _here.note = None
        ways[kind] = note.way(given, result, device, autocast is not None) or FROM_CALL
        return result

    return call
