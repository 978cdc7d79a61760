"""The one place where a backend is chosen, and where the others say why they were not.

A call travels one way:

    module -> ops.<op>() (checks, autocast) -> autograd Function -> opaque torch op -> backend's launcher -> kernel

`op.py` builds the middle of that road for each op. The choice among backends is made inside the opaque op, at run time,
so a compiled graph follows `use()` without recompiling, and any backend's backward can follow any other's forward.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from vitkernels import tape


class BackendError(RuntimeError):
    """No backend in the order can serve the call; the message holds each one's reason."""


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch as `record()` saw it: which backend ran, and what each one ahead of it answered."""

    op: str
    direction: str  # "forward" or "backward"
    backend: str
    declined: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of kernels.

    Attributes:
        name: as `use` has it.
        devices: types of torch devices whose calls ask it by default; None for all.
        why_not: gives a sentence that says why it is not there at all on this machine, or None when it is.
        describe: how it works on this machine, asked where it is there.
    """

    name: str
    devices: tuple[str, ...] | None
    why_not: Callable[[], str | None]
    describe: Callable[[], str] = lambda: ""


@dataclass(frozen=True, slots=True)
class Implementation:
    """What a backend brings for one op.

    Attributes:
        forward, backward: launchers, which take the schema's arguments in order.
        why_not: (direction, call) -> a sentence, or None when it can serve; the call's arguments by the schema's names.
        rounds_weights: whether its kernels take weights in float32 beside narrower rows, round them as they read them,
            and give gradients in the weights' dtype that were rounded so too: the bits that casting first gives.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    why_not: Callable[[str, Any], str | None]
    rounds_weights: bool = False


BACKENDS: dict[str, Backend] = {}  # by name, in the order in which they are asked by default
OPS: dict[str, Any] = {}  # every `op.Op`, by name
_warned: set[str] = set()


# ---------------------------------------------------------------------------------------------------- which backend


def parse_order(names: Sequence[str], source: str) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {name!r}; needs one of {', '.join(map(repr, BACKENDS))}")
    if not names:
        raise ValueError(f"{source}: got no backend; needs at least one of {', '.join(map(repr, BACKENDS))}")
    return tuple(dict.fromkeys(names))


_order: tuple[str, ...] | None = None  # None: the default order of the device


def add_backend(backend: Backend) -> None:
    """Make a backend known, to be asked behind those that are."""
    BACKENDS[backend.name] = backend
    backends_changed()


def read_environment() -> None:
    """Set the order that the environment asks for; once all backends are known."""
    global _order
    names = os.environ.get("VITKERNELS_BACKEND")
    if names:
        _order = parse_order([name.strip() for name in names.split(",")], "environment variable VITKERNELS_BACKEND")


class use:
    """Set the order in which backends are asked: `vk.use("ext", "reference")`, or only one: `vk.use("triton")`.

    As a statement it holds until the next one; `with vk.use(...):` restores what was before. It holds for the whole
    process (backward passes run on autograd's own threads). With no backend left that can serve, a call raises
    `BackendError` with every reason. The variable VITKERNELS_BACKEND="ext,reference" sets the first order.
    Compiled functions follow it too, without recompiling; the call itself stands outside of them.

    Raises:
        ValueError: a name that is not a backend, or none given.
        RuntimeError: called inside a function that is being compiled.
    """

    def __init__(self, *backends: str) -> None:
        global _order
        _outside_compiled_code("use")
        order = parse_order(backends, "use")
        self._previous, _order = _order, order

    def __enter__(self) -> use:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _order
        _order = self._previous


# The order of one module's calls, ahead of the process's: their backward passes, on autograd's threads, keep it.
_scope: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("vitkernels_backends", default=None)


def scoped() -> tuple[str, ...] | None:
    """The order that `scope` has set for this thread; None outside of it."""
    return _scope.get()


@contextlib.contextmanager
def scope(backends: tuple[str, ...]) -> Iterator[None]:
    """Set the order for the calls made inside the block by this thread, and for their backward passes."""
    token = _scope.set(backends)
    try:
        yield
    finally:
        _scope.reset(token)


def asked() -> tuple[str, ...] | None:
    """The order that was asked for; None for the default one of a call's device."""
    return _scope.get() or _order


def order(device_type: str) -> tuple[str, ...]:
    """The backends that a call on this type of device asks, first to last."""
    return asked() or _default_order(device_type, _generation)


@functools.cache
def _default_order(device_type: str, generation: int) -> tuple[str, ...]:
    found = (each for each in BACKENDS.values() if each.devices is None or device_type in each.devices)
    return tuple(each.name for each in found)


_generation = 0


def generation() -> int:
    """A number that changes when backends may answer otherwise than before: what was chosen earlier is asked anew."""
    return _generation


def backends_changed() -> None:
    """Say that a backend came, went or runs on something else."""
    global _generation
    _generation += 1


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collect a `Call` for every kernel launched inside the block, forward and backward, in order.

    A LayerNorm's result that a backward pass makes again, because it was not kept, is one more "forward".
    """
    _outside_compiled_code("record")
    calls: list[Call] = []
    tape.records.append(calls)
    try:
        yield calls
    finally:
        # by identity: two records opened around the same calls are equal lists
        tape.records[:] = [each for each in tape.records if each is not calls]


def _outside_compiled_code(name: str) -> None:
    # traced, the effect would come after the kernels have run; raised while tracing, the frame runs uncompiled
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: called inside a function that is being compiled; needs to be called outside of it")


def why_not(backend: str) -> str | None:
    """A sentence that says why a backend is not there at all on this machine, or None when it is."""
    return BACKENDS[backend].why_not()


def backends() -> Backends:
    """Which backends are there, and why the rest is not: print it, or read it as a dictionary of sentences."""
    found = Backends({name: why_not(name) or "available" for name in BACKENDS})
    found.details |= {name: BACKENDS[name].describe() for name, status in found.items() if status == "available"}
    return found


class Backends(dict[str, str]):
    """`{"triton": "no CUDA device ...", "ext": "available", ...}`, printed one backend a line.

    Attributes:
        details: how a backend that is there works on this machine, printed beside it.
    """

    def __init__(self, statuses: dict[str, str]) -> None:
        super().__init__(statuses)
        self.details: dict[str, str] = {}

    def __str__(self) -> str:
        lines = [(name, status, self.details.get(name)) for name, status in self.items()]
        return "\n".join(f"{name:<10} {status}{f': {detail}' if detail else ''}" for name, status, detail in lines)

    __repr__ = __str__


# ------------------------------------------------------------------------------------------------------- one call


def why_not_call(
    backend: str,
    name: str,
    direction: str,
    call: Any,
    implementations: Mapping[str, Implementation],
) -> str | None:
    """A sentence that says why a backend cannot serve a call of the op `name`, or None when it can."""
    reason = why_not(backend)
    if reason is not None:
        return reason
    implementation = implementations.get(backend)
    if implementation is None:
        return f"no {backend} kernel is registered for {name}"
    return implementation.why_not(direction, call)


def choose(name: str, direction: str, call: Any, implementations: Mapping[str, Implementation]) -> Choice:
    """The first backend in the order that can serve a call, and why those before it declined.

    Args:
        name: the op's.
        direction: "forward" or "backward".
        call: its arguments, as `Op.call` gives them.
        implementations: by backend.

    Raises:
        BackendError: there is none.
    """
    declined: list[tuple[str, str]] = []
    for backend in order(device_type(call)):
        reason = why_not_call(backend, name, direction, call, implementations)
        if reason is not None:
            declined.append((backend, reason))
            continue
        if _order is None and _scope.get() is None and backend == "reference" and declined:
            _warn_once(name, declined)
        return Choice(Call(name, direction, backend, tuple(declined)), implementations[backend], call)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in declined)
    raise BackendError(f"{name} ({direction}): no backend in use can serve this call. {reasons}")


def device_type(args: tuple[Any, ...]) -> str:
    """Of a call's first tensor."""
    return next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))


class Choice:
    """A backend's launcher, chosen for one kind of call; calling it launches, and `record` sees it.

    Attributes:
        rounds: the dtype that the launcher has to be given floating-point tensors in; None for that which they have.
    """

    __slots__ = ("call", "in_python", "launch", "rounds")

    def __init__(self, call: Call, implementation: Implementation, args: tuple[Any, ...]) -> None:
        self.call, self.launch = call, getattr(implementation, call.direction)
        self.in_python = getattr(self.launch, "in_python", False)  # what it does can be taped step by step
        mixed = OPS[call.op].one_dtype and any(
            isinstance(each, torch.Tensor) and each.dtype != args[0].dtype for each in args
        )
        self.rounds = args[0].dtype if mixed and not implementation.rounds_weights else None

    def __call__(self, *args: Any) -> Any:
        for calls in tape.records:
            calls.append(self.call)
        if self.rounds is not None:
            args = tuple(each.to(self.rounds) if isinstance(each, torch.Tensor) else each for each in args)
        recording = tape.recording()
        if recording is None:
            return self.launch(*args)
        recording.calls.append(self.call)
        return self.launch(*args) if self.in_python else recording.opaque(self.launch, args)


def _warn_once(name: str, declined: list[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in declined)
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(f"vitkernels: {name} runs on the plain-torch reference, which is slow. {reasons}", stacklevel=5)
