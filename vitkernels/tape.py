"""Tapes: what a function of tensors does at one kind of call, written down once and replayed at the later ones.

On a GPU, Python that chooses tiles, strides and shapes takes longer than the launch it prepares, and at every call of
one kind (`kinds.signature`) it comes to the same. A tape notes the torch functions and the launches of such a call, and
becomes a function of straight-line Python: allocations, products, compiled kernels. Tensors that a launcher only looks
at are not made again, and views of views become one.

A function may be taped if all that it does follows from the kind of its call: it reads no values of tensors, and its
tensors come from its arguments. What a tape cannot write down runs as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitkernels import program

FROM_CALL = 3  # of one kind: shapes that come once or twice are not worth a tape
# What tells of a tensor without reading its values. Attributes are told by `__get__`.
_LOOKS = frozenset(
    {"stride", "size", "dim", "numel", "data_ptr", "is_contiguous", "element_size", "storage_offset", "__len__"}
    | {"is_floating_point", "get_device", "untyped_storage", "_is_view", "is_neg"}
)
# What gives memory without contents: written down as the cheapest of them.
_EMPTY = frozenset({"empty", "new_empty", "empty_like", "empty_strided"})
# What makes a tensor and does nothing else: left out where nobody reads the result.
_MAKES = _EMPTY | frozenset(
    {"view", "reshape", "unflatten", "flatten", "transpose", "t"}
    | {"permute", "unbind", "contiguous", "detach", "__getitem__", "__get__", "unsqueeze", "squeeze", "expand", "to"}
)

# What torch's own compiled code allocates and views with: past the dispatcher, in half the time. Such a view shares no
# version counter with its tensor, so none is handed out. Memory is of the current GPU: a tape with launches runs on no
# other (`Program.ready`), which is known from its first launch on.
_FAST: Any = torch._C._dynamo.guards
_EMPTY_ON = {"cpu": _FAST._empty_strided_cpu, "cuda": _FAST._empty_strided_cuda}

records: list[list[Any]] = []  # what `dispatch.record` collects in


class _NotTaped(Exception):
    """Something that a tape cannot write down."""


@dataclass(frozen=True)
class _Root:
    name: str
    tensor: Tensor
    is_input: bool


@dataclass(frozen=True)
class _Line:
    """One step: `text` is Python that reads `reads` and writes `writes`, names of tensors; `call` is the same for a
    program of the extension, `inside` for results that are not handed out."""

    text: str
    reads: list[str]
    writes: list[str]
    only_makes: bool
    call: program.Call | None = None
    inside: str | None = None


@dataclass(frozen=True)
class Program:
    """What a tape became.

    Attributes:
        run: (*inputs) -> outputs, as the function that was taped.
        calls: what `dispatch.record` sees of it.
        same: inputs that have to be one tensor, by index; other calls of the kind may give two.
        ready: whether kernels may be launched past Triton's JIT now; None where it launches none.
    """

    run: Callable[..., Any]
    calls: tuple[Any, ...]
    same: tuple[tuple[int, int], ...]
    ready: Callable[[], bool] | None

    @functools.cached_property
    def always(self) -> bool:
        """Whether it may stand for every call of its kind."""
        return not self.same and self.ready is None

    def serves(self, inputs: tuple[Any, ...]) -> bool:
        """Whether it may stand for a call with these inputs now."""
        for one, other in self.same:
            if inputs[one] is not inputs[other]:
                return False
        return self.ready is None or self.ready()


class _Tape(TorchFunctionMode):
    """What is noted while a function runs."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.why_not: str | None = None  # why there will be no program
        self.calls: list[Any] = []
        self._ready: Callable[[], bool] | None = None
        self._lines: list[_Line] = []
        self._names: dict[int, str] = {}  # of tensors, by id
        self._held: list[Any] = []  # so that no id is used twice
        self._roots: dict[int, _Root | None] = {}  # the first tensor in each memory; None where inputs share it
        self._views: dict[Any, str] = {}  # by first tensor, shape, strides and offset
        self._space: dict[str, Any] = {"as_strided": torch.as_strided, "view": _FAST._reinterpret_tensor}
        self._inputs = [f"a{index}" for index in range(len(inputs))]
        self._same: list[tuple[int, int]] = []  # inputs that are one tensor
        for index, (name, each) in enumerate(zip(self._inputs, inputs, strict=True)):
            if not isinstance(each, Tensor):
                continue
            if id(each) in self._names:
                self._same.append((index, self._inputs.index(self._names[id(each)])))
            else:
                self._name(name, each, is_input=True)

    # -- names

    def _name(self, name: str, tensor: Tensor, is_input: bool = False) -> None:
        self._names[id(tensor)] = name
        self._held.append(tensor)
        memory = tensor.untyped_storage()._cdata
        if memory not in self._roots:
            self._roots[memory] = _Root(name, tensor, is_input)
        elif is_input:
            self._roots[memory] = None

    def _value(self, constant: Any) -> str:
        """The name of what is no tensor, and the same at each call."""
        if constant is None or type(constant) in (bool, int, str):
            return repr(constant)
        name = f"c{len(self._space)}"
        self._space[name] = constant
        return name

    def _text(self, value: Any, reads: list[str]) -> str:
        """An argument as Python."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                raise _NotTaped("a tensor comes from outside")
            reads.append(self._names[id(value)])
            return reads[-1]
        if type(value) in (tuple, list) and any(isinstance(each, Tensor | tuple | list) for each in value):
            inner = "".join(f"{self._text(each, reads)}, " for each in value)
            return f"({inner})" if type(value) is tuple else f"[{inner}]"
        fields = getattr(value, "__dataclass_fields__", None)
        if fields is None or isinstance(value, type):
            return self._value(value)
        # a tensor descriptor: made anew around the call's own tensor
        return f"{self._value(type(value))}({', '.join(self._text(getattr(value, name), reads) for name in fields)})"

    # -- what happens

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._note(function, args, kwargs or {}, result)
        return result

    def opaque(self, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a launcher that is no Python, as one call."""
        with torch._C.DisableTorchFunction():
            result = launcher(*args)
            self._note(launcher, args, {}, result)
        return result

    def launch(self, text: str, args: Sequence[Any], space: dict[str, Any], ready: Callable[[], bool]) -> None:
        """Note the launch of a compiled kernel.

        Args:
            text: Python that launches, with "{}" where the arguments go and "{name}" where a value of `space` goes.
            args: the kernel's.
            space: what `text` reads.
            ready: whether such launches may be made; one function for all of a tape.
        """
        with self._noting():
            reads: list[str] = []
            given = "".join(f"{self._text(self._memory(each), reads)}, " for each in args)
            names = {name: self._value(each) for name, each in space.items()}
            self._lines.append(_Line(text.format(given, **names), reads, [], only_makes=False))
            self._ready = ready

    def _memory(self, arg: Any) -> Any:
        """A kernel gets a dtype and where memory begins: the first tensor there stands for a view of it."""
        root = self._roots.get(arg.untyped_storage()._cdata) if isinstance(arg, Tensor) else None
        same = root is not None and root.tensor.dtype == arg.dtype and root.tensor.data_ptr() == arg.data_ptr()
        return root.tensor if root is not None and same else arg

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            with torch._C.DisableTorchFunction():
                yield
        except _NotTaped as error:
            self.why_not = str(error)

    def _note(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if self.why_not is None:
            with self._noting():
                self._write(function, args, kwargs, result)

    def _write(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        several = isinstance(result, tuple | list)
        made = [each for each in (result if several else (result,)) if isinstance(each, Tensor)]
        if not made and (name in _LOOKS or name == "__get__"):
            return
        if result is not None and len(made) != (len(result) if several else 1):
            raise _NotTaped(f"{name} gives more than tensors")
        only_makes = name in _MAKES
        if only_makes and self._as_views(made):
            return
        reads: list[str] = []
        if name in _EMPTY:
            shape, strides, dtype = (self._value(each) for each in (tuple(result.shape), result.stride(), result.dtype))
            empty = _EMPTY_ON.get(result.device.type)
            if empty is not None and (result.device.type == "cpu" or self._ready is not None):
                text = f"{self._value(empty)}({shape}, {strides}, {dtype})"
            else:
                device = self._value(result.device)
                text = f"{self._value(torch.empty_strided)}({shape}, {strides}, dtype={dtype}, device={device})"
        else:
            given = [self._text(each, reads) for each in args]
            given += [f"{key}={self._text(each, reads)}" for key, each in kwargs.items()]
            text = f"{self._value(function)}({', '.join(given)})"
        if not several and made and id(result) in self._names:  # it was written into, and handed on
            made = []
        writes = [self._new(each) for each in made]
        target = "".join(f"{each}, " for each in writes) if several else "".join(writes)
        call = program.call(function, args, writes, self._names) if writes and not kwargs else None
        self._lines.append(_Line(f"{target} = {text}" if writes else text, reads, writes, only_makes, call))

    def _new(self, tensor: Tensor) -> str:
        name = f"v{len(self._held)}"
        self._name(name, tensor)
        return name

    def _as_views(self, views: list[Tensor]) -> bool:
        """Write views down as views of the first tensor in their memory: those between them are then not needed."""
        roots = [self._roots.get(each.untyped_storage()._cdata) for each in views]
        if not all(
            root is not None and root.tensor.dtype == view.dtype and view.numel() and id(view) not in self._names
            for view, root in zip(views, roots, strict=True)
        ):
            return False
        for view, root in zip(views, roots, strict=True):
            assert root is not None
            offset = view.storage_offset() - root.tensor.storage_offset()
            at = (
                ""
                if not offset
                else f", {offset}"
                if not root.is_input
                else f", {root.name}.storage_offset() + {offset}"
            )
            shape, strides = self._value(tuple(view.shape)), self._value(view.stride())
            text = f"as_strided({root.name}, {shape}, {strides}{at})"
            written = self._new(view)
            inside = f"{written} = view({root.name}, {shape}, {strides}, {offset})"
            self._lines.append(_Line(f"{written} = {text}", [root.name], [written], only_makes=True, inside=inside))
        return True

    # -- the program

    def program(self, outputs: tuple[Any, ...]) -> Program | None:
        """Straight-line Python of what was noted, without what nobody reads; None where something could not be."""
        reads: list[str] = []
        with self._noting():
            result = self._text(outputs, reads)
        if self.why_not is not None:
            return None
        handed_out = set(reads)
        live, lines = set(reads), []
        for line in reversed(self._lines):
            if line.only_makes and live.isdisjoint(line.writes):
                continue
            # memory is given back after the last line that reads it
            last = [name for name in dict.fromkeys((*line.reads, *line.writes)) if name not in live and name[0] == "v"]
            if line.inside is not None and handed_out.isdisjoint(line.writes):
                line = dataclasses.replace(line, text=line.inside)
            lines.append((line, last))
            live.update(line.reads)
        text = [self._together(each) for each in _in_a_row(lines[::-1])]
        space = dict(self._space)
        body = "\n    ".join([*text, f"return {result}"])
        exec(f"def run({', '.join(self._inputs)}):\n    {body}\n", space)
        return Program(space["run"], tuple(self.calls), tuple(self._same), self._ready)

    def _together(self, lines: Sequence[tuple[_Line, list[str]]]) -> str:
        """Lines in a row as one of Python: where they are several, a program of the extension."""
        made = {name for line, _ in lines for name in line.writes}
        if len(lines) == 1:
            ((line, dropped),) = lines
            text = line.text
        else:
            assert program.extension is not None
            inputs = list(dict.fromkeys(name for line, _ in lines for name in line.reads if name not in made))
            own = [[name for name in last if name in made] for _, last in lines]
            dropped = [name for _, last in lines for name in last if name not in made]
            unread = {name for last in own for name in last}
            outputs = [name for line, _ in lines for name in line.writes if name not in unread]
            calls = [line.call for line, _ in lines if line.call is not None]
            joined = self._value(program.join(calls, inputs, outputs, own))
            run = self._value(program.extension.run)
            target = f"{''.join(f'{each}, ' for each in outputs)} = " if outputs else ""
            text = f"{target}{run}({joined}, [{', '.join(inputs)}])"
        return text + (f"; del {', '.join(dropped)}" if dropped else "")


def _in_a_row(lines: Sequence[tuple[_Line, list[str]]]) -> list[list[tuple[_Line, list[str]]]]:
    """Lines that one call may run, together; each with the names that nobody reads after it.

    A program holds what it was given until it ends: it ends where something from outside is read for the last time.
    """
    found: list[list[tuple[_Line, list[str]]]] = [[]]
    made: set[str] = set()  # by the lines of the last row
    for line, last in lines:
        if line.call is None:
            found += [(line, last)], []
            made = set()
            continue
        found[-1].append((line, last))
        made.update(line.writes)
        if not made.issuperset(last):
            found.append([])
            made = set()
    return [each for each in found if each]


_here = threading.local()


def recording() -> _Tape | None:
    """The tape that notes what this thread does, if there is one."""
    return getattr(_here, "tape", None)


class Taped:
    """A function (*inputs) -> tuple of tensors and what is none, all of whose calls are of one kind."""

    __slots__ = ("_calls", "_function", "program")

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        self._function, self._calls = function, 0
        self.program: Program | None = None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if torch.autograd._profiler_enabled():  # it wants to see what the function does
            return self._function(*inputs)
        program = self.program
        if program is not None and (program.always or program.serves(inputs)):
            for each in records:
                each.extend(program.calls)
            return program.run(*inputs)
        self._calls += 1
        if self._calls != FROM_CALL or recording() is not None:
            return self._function(*inputs)
        tape = _here.tape = _Tape(inputs)
        try:
            with tape:
                outputs = self._function(*inputs)
        finally:
            _here.tape = None
        self.program = tape.program(outputs)
        return outputs
