"""One op: its pair of opaque torch ops, the autograd Functions over them, and what makes a call plain.

An `Op` is the middle of the road that `dispatch` describes: a forward and a backward torch op with fake
implementations, and the autograd Function over them.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from vitkernels import dispatch
from vitkernels.kinds import MOST, look_at, noting, signature
from vitkernels.ops._amp import DTYPES, cast
from vitkernels.tape import Taped

_NAMESPACE = "vitkernels"
_library = torch.library.Library(_NAMESPACE, "DEF")  # held: the ops live as long as it does


class Op:
    """A pair of opaque torch ops (forward, backward), the autograd Function over them, and their backends.

    Args:
        name: the op's name in every room of the package; the torch ops are `vitkernels::<name>` and
            `vitkernels::<name>_backward`.
        schema: arguments and results of the forward op, without the name. What backward needs of the results is part
            of it, so that backends can be mixed. No result may share memory with an argument or another result.
        backward_schema: the same for the backward op; a gradient that was not asked for is a tensor of no elements. One
            that ends with `grad_dtype` gives all gradients but the first, those of weights and biases, in that dtype (a
            number of `_amp.CODES`; 0 for the weights' own), rounded to the weights' before.
        fake, fake_backward: shapes, strides and dtypes of the results, for tracing.
        setup_context: saves for backward, as `torch.autograd.Function.setup_context`.
        gradients: the backward formula `(ctx, *grad_outputs) -> grads`; it calls `op.backward(...)`.
        one_dtype: whether all tensors have the first one's dtype. Launches within the package may give weights in
            float32 beside narrower rows; they are rounded for a backend whose kernels do not round them.
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
        one_dtype: bool = False,
    ) -> None:
        self.name, self.one_dtype = name, one_dtype
        self._widens = "int grad_dtype=0)" in backward_schema
        self.schemas = {name: schema, f"{name}_backward": backward_schema}
        self.implementations: dict[str, dispatch.Implementation] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        self._taped: dict[Any, Taped] = {}
        self._generation = dispatch.generation()  # of the backends that they were chosen from
        self.forward_op = self._define(name, schema, "forward", fake)
        self.backward_op = self._define(f"{name}_backward", backward_schema, "backward", self._widened(fake_backward))
        # The formula on the op itself keeps raw calls and compiled func.grad from returning zeros without a word.
        no_double = refusal(name, "double backward (create_graph=True, grad of grad)")
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", gradients, setup_context=setup_context, lib=_library)
        torch.library.register_autograd(f"{_NAMESPACE}::{name}_backward", no_double, lib=_library)
        self.function = _function(name, self.forward_op, setup_context, gradients)
        self.apply_plain = _apply_plain(self, setup_context, gradients)
        self.backward_function = _function(
            f"{name}_backward", self.backward_op, lambda ctx, inputs, output: None, no_double
        )
        dispatch.OPS[name] = self

    def _define(self, name: str, schema: str, direction: str, fake: Callable[..., Any]) -> Any:
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, lambda *args: self.run(direction, args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        op = getattr(getattr(torch.ops, _NAMESPACE), name).default
        names = [each.name for each in op._schema.arguments]
        self._calls[direction] = namedtuple(name, names, defaults=[None] * len(names))
        return op

    def register(
        self,
        backend: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        why_not: Callable[[str, Any], str | None] = lambda direction, call: None,
        rounds_weights: bool = False,
        widens: bool = False,
    ) -> None:
        """Add a backend, by what `dispatch.Implementation` has of it.

        `widens` says that its backward launcher knows `grad_dtype`; else the gradients are cast behind it.
        """
        if not widens:
            backward = self._widened(backward)
        self.implementations[backend] = dispatch.Implementation(forward, backward, why_not, rounds_weights)
        dispatch.backends_changed()

    def _widened(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """A backward launcher that gives gradients of weights in their own dtype, for calls that want another."""
        if not self._widens:
            return backward

        @functools.wraps(backward)
        def launch(*args: Any) -> Any:
            *given, grad_dtype = args if type(args[-1]) is int else (*args, 0)
            first, *others = backward(*given)
            if grad_dtype:
                both = zip(others, given[-1][1:], strict=True)
                others = [each.to(DTYPES[grad_dtype]) if need else each for each, need in both]
            return first, *others

        return launch

    def __call__(self, *args: Any) -> Any:
        """The forward op, differentiable."""
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                self.function.jvp()  # refuses, where the bare op would answer with a tangent of zeros
            return self.forward_op(*args)
        plain, function = look_at(args)
        if not plain:
            return self.function.apply(*args) if function else self.forward_op(*args)
        results = self.apply_plain(*args, self._run_forward) if function else self.run("forward", args)
        note = noting()
        if note is not None:
            launcher = self._launcher("forward", dispatch.device_type(args), args)
            note.call(self.apply_plain if function else None, launcher, args, results)
        return results

    def backward(self, *args: Any) -> Any:
        """The backward op; asking for its own gradient raises."""
        if torch.compiler.is_compiling():
            return self.backward_op(*args)
        if not (torch.autograd._profiler_enabled() or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()):
            found = signature(args)
            taped = None if found is None else self._taped_before("backward", found)
            if taped is not None:
                return taped(*args)
        plain, function = look_at(args)
        if function:
            return self.backward_function.apply(*args)
        return self.run("backward", args) if plain else self.backward_op(*args)

    def cast(self, autocast: torch.dtype, x: Tensor, *others: Tensor | None) -> list[Any]:
        """Tensors as nn.Linear gets them under autocast, but weights in float32 as they are where kernels round them.

        That spares copies of the weights, and of their gradients; results have the same bits. It is for plain calls on
        CPUs, where a copy takes as long as a product of few rows.
        """
        (narrow,) = cast(autocast, x)
        if narrow.device.type == "cpu" and narrow.dtype == autocast and not torch.compiler.is_compiling():
            asked = (each for each in dispatch.order("cpu") if each in self.implementations)
            first = next((each for each in asked if dispatch.why_not(each) is None), None)
            rounds = first is not None and self.implementations[first].rounds_weights
            if rounds and look_at((narrow, *others))[0]:
                return [narrow, *(None if each is None else _rounded_later(each, autocast) for each in others)]
        return [narrow, *cast(autocast, *others)]

    def call(self, direction: str, args: Sequence[Any]) -> Any:
        """A call's arguments by the names of its schema (`call.weight`): "forward" or "backward"."""
        return self._calls[direction](*args)

    def choose(self, direction: str, args: tuple[Any, ...]) -> dispatch.Choice:
        """The launcher that serves such a call, as `dispatch.choose`."""
        return dispatch.choose(self.name, direction, self.call(direction, args), self.implementations)

    def why_not(self, backend: str, direction: str, args: tuple[Any, ...]) -> str | None:
        """A sentence that says why a backend cannot serve this call, or None when it can."""
        return dispatch.why_not_call(backend, self.name, direction, self.call(direction, args), self.implementations)

    def run(self, direction: str, args: tuple[Any, ...]) -> Any:
        """Launch the first backend that can serve a plain call; direction is "forward" or "backward"."""
        kind = dispatch.device_type(args)
        launch = self._launcher(direction, kind, args)
        if not torch.is_autocast_enabled(kind):
            return launch(*args)
        # dtypes were settled before the op; inside it, autocast would cast again
        torch.set_autocast_enabled(kind, False)
        try:
            return launch(*args)
        finally:
            torch.set_autocast_enabled(kind, True)

    def _launcher(self, direction: str, kind: str, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The launcher that serves a plain call: from its tape, where calls of its kind have come before."""
        found = signature(args)
        if found is None:
            return self.choose(direction, args)
        taped = self._taped_before(direction, found)
        if taped is None:
            taped = self._taped[direction, found, dispatch.asked()] = Taped(self.choose(direction, args))
        return taped

    def _taped_before(self, direction: str, found: tuple[Any, ...]) -> Taped | None:
        """The launcher of plain calls with this signature, if one came before."""
        if self._generation != dispatch.generation() or len(self._taped) == MOST:
            self._taped.clear()  # backends have changed; or so many kinds are shapes that do not come again
            self._generation = dispatch.generation()
        return self._taped.get((direction, found, dispatch.asked()))

    def _run_forward(self, *args: Any) -> Any:
        return self.run("forward", args)


def _rounded_later(tensor: Tensor, autocast: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else cast(autocast, tensor)[0]


def _apply_plain(op: Op, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of the Function of plain calls, (*arguments of the op, launcher) -> results.

    It needs no `setup_context` of torch's and no transforms.
    """

    # by weights: gradients are of what these were at the call, as torch's are, whatever is put in a parameter's place
    # before the backward pass (p.data = ...)
    product = op.one_dtype

    def forward(ctx: Any, *given: Any) -> Any:
        *args, launcher = given
        output = own(launcher(*args))
        setup_context(ctx, args, output)
        if product:
            _keep_values(ctx)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        return *gradients(_ByValues(ctx) if product else ctx, *grads), None

    return plain_function(op.name, forward, backward)


def _keep_values(ctx: Any) -> None:
    """Note the parameters among what is to be saved, by their values; hooks of saved tensors are given those."""
    places = [index for index, each in enumerate(ctx.to_save) if type(each) is torch.nn.Parameter]
    values = [ctx.to_save[index].detach() for index in places]
    ctx.as_saved = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    if not ctx.as_saved:
        saved = list(ctx.to_save)
        for place, index in enumerate(places):
            saved[index], values[place] = values[place], saved[index]
        ctx.save_for_backward(*saved)
    ctx.values = dict(zip(places, values, strict=True))


class _ByValues:
    """A backward pass's context whose saved parameters are what they were at the call."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        saved = list(self._ctx.saved_tensors)
        if self._ctx.as_saved is not torch.is_grad_enabled():  # a graph of the gradients needs the parameters
            for index, value in self._ctx.values.items():
                saved[index] = value
        return tuple(saved)


def plain_function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of an autograd Function for plain calls, (ctx, *args) -> outputs and (ctx, *grad_outputs) -> grads.

    Its backward pass asks the backends that its forward pass asked.
    """

    def forward_in_scope(ctx: Any, *args: Any) -> Any:
        ctx.backends = dispatch.scoped()
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
        with dispatch.scope(ctx.backends):
            return gradients(ctx, *grads)

    return backward


def _function(name: str, op: Any, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> Any:
    def forward(*args: Any) -> Any:
        return op(*args)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backends = dispatch.scoped()
        setup_context(ctx, inputs, output)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # cached: read at every apply
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(_scoped(gradients)),
        "jvp": staticmethod(refusal(name, "forward-mode differentiation (jvp, dual numbers)")),
    }
    return type(name, (torch.autograd.Function,), members)


def refusal(name: str, what: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"vitkernels: {name} does not support {what}")

    return refuse
