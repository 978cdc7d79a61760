"""The one place where a backend is chosen, and where the others say why they were not.

A call travels one way:

    module -> ops.<op>() (checks, autocast) -> autograd Function -> opaque torch op -> backend's launcher -> kernel

`Op` builds the middle of that road for one op: a forward and a backward torch op with fake implementations, and the
autograd Function over them. The choice among backends is made inside the opaque op, at run time, so a compiled graph
follows `use()` without recompiling, and any backend's backward can follow any other's forward.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

BACKENDS = ("triton", "ext", "reference")
_ROOMS = {"triton": f"{__package__}.kernels", "ext": f"{__package__}.ext"}  # each with a `why_not` of the machine
_DEFAULT_ORDER = {"cuda": BACKENDS, "cpu": ("ext", "reference")}
_NAMESPACE = "vitkernels"
_library = torch.library.Library(_NAMESPACE, "DEF")  # held: the ops live as long as it does


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
class Implementation:
    """What a backend brings for one op. `why_not(direction, args)` gives a sentence, or None when it can serve."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    why_not: Callable[[str, tuple[Any, ...]], str | None]


OPS: dict[str, Op] = {}
_records: list[list[Call]] = []
_warned: set[str] = set()
_PLAIN = (torch.Tensor, torch.nn.Parameter)


# ---------------------------------------------------------------------------------------------------- which backend


def parse_order(names: Sequence[str], source: str) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {name!r}; needs one of {', '.join(map(repr, BACKENDS))}")
    if not names:
        raise ValueError(f"{source}: got no backend; needs at least one of {', '.join(map(repr, BACKENDS))}")
    return tuple(dict.fromkeys(names))


_order: tuple[str, ...] | None = None  # None: the default order of the device
if os.environ.get("VITKERNELS_BACKEND"):
    _order = parse_order(
        [name.strip() for name in os.environ["VITKERNELS_BACKEND"].split(",")],
        "environment variable VITKERNELS_BACKEND",
    )


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


@contextlib.contextmanager
def scope(backends: tuple[str, ...]) -> Iterator[None]:
    """Set the order for the calls made inside the block by this thread, and for their backward passes."""
    token = _scope.set(backends)
    try:
        yield
    finally:
        _scope.reset(token)


def order(device_type: str) -> tuple[str, ...]:
    """The backends that a call on this type of device asks, first to last."""
    return _scope.get() or _order or _DEFAULT_ORDER.get(device_type, ("reference",))


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
    _records.append(calls)
    try:
        yield calls
    finally:
        # by identity: two records opened around the same calls are equal lists
        _records[:] = [each for each in _records if each is not calls]


def _outside_compiled_code(name: str) -> None:
    # traced, the effect would come after the kernels have run; raised while tracing, the frame runs uncompiled
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: called inside a function that is being compiled; needs to be called outside of it")


def why_not(backend: str) -> str | None:
    """A sentence that says why a backend is not there at all on this machine, or None when it is."""
    return None if backend == "reference" else sys.modules[_ROOMS[backend]].why_not()


def backends() -> Backends:
    """Which backends are there, and why the rest is not: print it, or read it as a dictionary of sentences."""
    found = Backends({name: why_not(name) or "available" for name in BACKENDS})
    if found["ext"] == "available":
        from vitkernels import ext

        found.details["ext"] = ext.describe()
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


# ------------------------------------------------------------------------------------------------------- one op


class Op:
    """A pair of opaque torch ops (forward, backward), the autograd Function over them, and their backends.

    Args:
        name: the op's name in every room of the package; the torch ops are `vitkernels::<name>` and
            `vitkernels::<name>_backward`.
        schema: arguments and results of the forward op, without the name. What backward needs of the results is part
            of it, so that backends can be mixed. No result may share memory with an argument or another result.
        backward_schema: the same for the backward op; a gradient that was not asked for is a tensor of no elements.
        fake, fake_backward: shapes, strides and dtypes of the results, for tracing.
        setup_context: saves for backward, as `torch.autograd.Function.setup_context`.
        gradients: the backward formula `(ctx, *grad_outputs) -> grads`; it calls `op.backward(...)`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        backward_schema: str,
        *,
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        setup_context: Callable[..., None],
        gradients: Callable[..., Any],
    ) -> None:
        self.name = name
        self.schemas = {name: schema, f"{name}_backward": backward_schema}
        self.implementations: dict[str, Implementation] = {}
        self.forward_op = self._define(name, schema, "forward", fake)
        self.backward_op = self._define(f"{name}_backward", backward_schema, "backward", fake_backward)
        # The formula on the op itself keeps raw calls and compiled func.grad from returning zeros without a word.
        no_double = _refusal(name, "double backward (create_graph=True, grad of grad)")
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", gradients, setup_context=setup_context, lib=_library)
        torch.library.register_autograd(f"{_NAMESPACE}::{name}_backward", no_double, lib=_library)
        self.function = _function(name, self.forward_op, setup_context, gradients)
        self.apply_plain = _apply_plain(self, setup_context, gradients)
        self.backward_function = _function(
            f"{name}_backward", self.backward_op, lambda ctx, inputs, output: None, no_double
        )
        OPS[name] = self

    def _define(self, name: str, schema: str, direction: str, fake: Callable[..., Any]) -> Any:
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, lambda *args: self.run(direction, args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, _NAMESPACE), name).default

    def register(
        self,
        backend: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        why_not: Callable[[str, tuple[Any, ...]], str | None] = lambda direction, args: None,
    ) -> None:
        """Add a backend's launchers; they take the schema's arguments in order."""
        self.implementations[backend] = Implementation(forward, backward, why_not)
        backends_changed()

    def __call__(self, *args: Any) -> Any:
        """The forward op, differentiable."""
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                self.function.jvp()  # refuses, where the bare op would answer with a tangent of zeros
            return self.forward_op(*args)
        plain, function = look_at(args)
        if function:
            return self.apply_plain(*args) if plain else self.function.apply(*args)
        return self.run("forward", args) if plain else self.forward_op(*args)

    def backward(self, *args: Any) -> Any:
        """The backward op; asking for its own gradient raises."""
        if torch.compiler.is_compiling():
            return self.backward_op(*args)
        plain, function = look_at(args)
        if function:
            return self.backward_function.apply(*args)
        return self.run("backward", args) if plain else self.backward_op(*args)

    def why_not(self, backend: str, direction: str, args: tuple[Any, ...]) -> str | None:
        """A sentence that says why a backend cannot serve this call, or None when it can."""
        reason = why_not(backend)
        if reason is not None:
            return reason
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"no {backend} kernel is registered for {self.name}"
        return implementation.why_not(direction, args)

    def choose(self, direction: str, args: tuple[Any, ...]) -> Choice:
        """The first backend in the order that can serve a call, and why those before it declined.

        Raises:
            BackendError: there is none.
        """
        first = args[0] if isinstance(args[0], torch.Tensor) else next(filter(_is_tensor, args))
        declined: list[tuple[str, str]] = []
        for backend in order(first.device.type):
            reason = self.why_not(backend, direction, args)
            if reason is not None:
                declined.append((backend, reason))
                continue
            if _order is None and _scope.get() is None and backend == "reference" and declined:
                _warn_once(self.name, declined)
            launch = getattr(self.implementations[backend], direction)
            return Choice(Call(self.name, direction, backend, tuple(declined)), launch)
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in declined)
        raise BackendError(f"{self.name} ({direction}): no backend in use can serve this call. {reasons}")

    def run(self, direction: str, args: tuple[Any, ...]) -> Any:
        """Launch the first backend that can serve a plain call; direction is "forward" or "backward"."""
        choice = self.choose(direction, args)
        kind = next(filter(_is_tensor, args)).device.type
        if not torch.is_autocast_enabled(kind):
            return choice(*args)
        # dtypes were settled before the op; inside it, autocast would cast again
        torch.set_autocast_enabled(kind, False)
        try:
            return choice(*args)
        finally:
            torch.set_autocast_enabled(kind, True)


class Choice:
    """A backend's launcher, chosen for one kind of call; calling it launches, and `record` sees it."""

    __slots__ = ("call", "launch")

    def __init__(self, call: Call, launch: Callable[..., Any]) -> None:
        self.call, self.launch = call, launch

    def __call__(self, *args: Any) -> Any:
        for calls in _records:
            calls.append(self.call)
        return self.launch(*args)


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor)


def look_at(args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether the call is plain, and whether it needs an autograd Function; one look, at every call.

    A call is plain where nobody looks on: tensors of memory, no transform, no dispatch mode, no profiler. Such a call
    goes straight to the launcher. The opaque torch op is there for all others: tracing, fake tensors, tensor
    subclasses, counters of FLOPs.
    """
    transformed = _transformed()
    plain = not (transformed or _watched())
    learns = False
    for arg in args:
        if type(arg) in _PLAIN:
            learns = learns or arg.requires_grad
            plain = plain and not arg.is_meta and torch._C._has_storage(arg)
        elif isinstance(arg, torch.Tensor):
            learns, plain = learns or arg.requires_grad, False
    return plain, transformed or (learns and torch.is_grad_enabled())


def signature(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool] | None:
    """What a plain call's checks and choices depend on, and whether a tensor requires a gradient; None if not plain.

    Two calls of one signature, in one order of backends, pass the same checks and are served by the same launcher.
    """
    if _transformed() or _watched():
        return None
    learns = False
    found = []
    for arg in args:
        if type(arg) in _PLAIN:
            if arg.is_meta or not torch._C._has_storage(arg):
                return None
            learns = learns or arg.requires_grad
            found.append((arg.dtype, arg.shape, arg.stride(), arg.device))
        elif isinstance(arg, torch.Tensor):
            return None
        else:
            found.append(arg)
    return tuple(found), learns


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _watched() -> bool:
    return torch._C._len_torch_dispatch_stack() != 0 or torch._C._is_tracing() or torch.autograd._profiler_enabled()


def _apply_plain(op: Op, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of the Function of plain calls; it needs no `setup_context` of torch's and no transforms."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = own(op.run("forward", args))
        setup_context(ctx, args, output)
        return output

    return plain_function(op.name, forward, gradients)


def plain_function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of an autograd Function for plain calls, (ctx, *args) -> outputs and (ctx, *grad_outputs) -> grads.

    Its backward pass asks the backends that its forward pass asked.
    """

    def forward_in_scope(ctx: Any, *args: Any) -> Any:
        ctx.backends = _scope.get()
        return forward(ctx, *args)

    members = {"forward": staticmethod(forward_in_scope), "backward": staticmethod(_scoped(backward))}
    function: Any = type(name, (torch.autograd.Function,), members)
    # the base's own: what Function's adds to it serves setup_context and transforms
    return super(torch.autograd.Function, function).apply


def own(results: Any) -> Any:
    """Results as nobody's views: autograd would not let a caller write into one that a Function returned."""
    if isinstance(results, torch.Tensor):
        return torch.ops.aten._unsafe_view.default(results, results.shape) if results._is_view() else results
    return tuple(map(own, results))


def _scoped(gradients: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.backends is None:
            return gradients(ctx, *grads)
        with scope(ctx.backends):
            return gradients(ctx, *grads)

    return backward


def _function(name: str, op: Any, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> Any:
    def forward(*args: Any) -> Any:
        return op(*args)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backends = _scope.get()
        setup_context(ctx, inputs, output)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # cached: read at every apply
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(_scoped(gradients)),
        "jvp": staticmethod(_refusal(name, "forward-mode differentiation (jvp, dual numbers)")),
    }
    return type(name, (torch.autograd.Function,), members)


def _refusal(name: str, what: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"vitkernels: {name} does not support {what}")

    return refuse


def _warn_once(name: str, declined: list[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in declined)
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(f"vitkernels: {name} runs on the plain-torch reference, which is slow. {reasons}", stacklevel=4)
