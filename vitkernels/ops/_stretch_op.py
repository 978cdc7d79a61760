"""A stretch in compiled code: one opaque op each way, which launches what the autograd Function of plain calls does.

A compiled graph calls its ops one by one, through the dispatcher, at tens of microseconds each: the twelve of a block
cost the processor more than the block by itself. Here they are two. What of a call is no tensor stands in the op's
text, with what autograd has to know of the tensors: a graph that was kept on disk says all that its ops need.

`Tensor[] tensors` are the inputs of `_stretch.run` that are tensors, in order. The results are those of the stretch and
what its backward keeps, each of them once; what is an input is not among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from vitkernels import dispatch
from vitkernels.kinds import signature
from vitkernels.op import Op, refusal
from vitkernels.ops._plan import Launch, Plan, in_one_dtype, keep
from vitkernels.ops._step import ADDED, FEW_ROWS_OF_COPIES, ROUNDED, is_made_again
from vitkernels.ops._stretch_kind import Kinds
from vitkernels.ops._stretch_text import Told, parsed, whole, written
from vitkernels.ops._windows import Windows
from vitkernels.ops.add_layer_norm import saved_tensors

_library = torch.library.Library("vitkernels", "FRAGMENT")  # held: the ops live as long as it does


def serves() -> bool:
    """Whether a call is one of code that is being compiled, for this process, with gradients of the usual kind."""
    return (
        torch.compiler.is_compiling()
        and not _exporting()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _exporting() -> bool:
    return torch.compiler.is_exporting()


_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo of torch 2.11 takes it for always true


def run(steps: tuple[str, ...], counts: tuple[int, ...], inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(total, result) of the last step, as a compiler traces it.

    Args:
        steps, counts: names of the steps, and how many arguments each one's product has.
        inputs: x, and of each step branch, weight, bias, eps, branch_bias, scale, row_scale, (autocast's dtype, whether
            the norm is made again, whether it is an RMSNorm), and its product's arguments.
    """
    x, branch, *given = inputs
    if branch is not None:
        x = x.to(torch.promote_types(x.dtype, branch.dtype))
    inputs = [x, branch, *given]
    learns = torch.is_grad_enabled()
    place = 0
    for count in counts:  # how each norm is kept: what the op gives follows from its text, for every size
        place += ADDED - 1
        autocast, again, rms = inputs[place]
        made_again = 0  # by a branch: of traced sizes the comparison itself is no constant
        if is_made_again(again, x):
            made_again = 1
        inputs[place] = (autocast, made_again == 1, rms)
        place += count
    told: list[Any] = []
    numbers = []
    for each in inputs:
        if isinstance(each, Tensor):
            told.append((each.dtype, learns and each.requires_grad))
        elif type(each) in (int, float):  # which may be traced; the op's call makes constants of them
            told.append((type(each).__name__,))
            numbers.append(each)
        elif isinstance(each, Windows):
            told.append(("windows",))
            numbers += [*each.sides, *each.size, *each.shift]
        else:
            told.append(each)
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    rows = math.prod(x.shape[:-1])
    copies = 0
    if autocast is not None and x.device.type == "cpu" and ROUNDED < rows < FEW_ROWS_OF_COPIES:
        copies = 1
    found = torch.ops.vitkernels.stretch(tensors, numbers, written(steps, counts, copies == 1, *told))
    return (x, found[0]) if len(steps) == 1 and branch is None else (found[0], found[1])


class _ByItself:
    """No gradients are noted and autocast is off: dtypes were settled while the graph was made."""

    __slots__ = ("_autocast", "_device", "_grad")

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(self._device)
        if self._grad:
            torch._C._set_grad_enabled(False)
        if self._autocast:
            torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *error: object) -> None:
        if self._grad:
            torch._C._set_grad_enabled(True)
        if self._autocast:
            torch.set_autocast_enabled(self._device, True)


def _launch(direction: str) -> Launch:
    """Launches for one who looks on: a graph is being made, or a tensor is none of memory."""

    def launch(site: str, op: Op, *args: Any) -> Any:
        return (op.forward_op if direction == "forward" else op.backward_op)(*in_one_dtype(op, args))

    return launch


def _once(computed: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """(each tensor that is not among the inputs, the first time that it comes; where each of what was computed is among
    the inputs and these, or -1)."""
    places = {id(each): index for index, each in enumerate(tensors)}
    results: list[Tensor] = []
    found: list[int] = []
    for each in computed:
        if not isinstance(each, Tensor):
            found.append(-1)
            continue
        if id(each) not in places:
            places[id(each)] = len(tensors) + len(results)
            results.append(each)
        found.append(places[id(each)])
    return results, found


# --------------------------------------------------------------------------------------------------------- forward


class _Noted(NamedTuple):
    """What autograd is told of a text's calls: where what is saved is among inputs and results, -1 for nothing; and
    whether the sum learns."""

    layout: list[int]
    total_learns: bool


_plans: Kinds[Plan] = Kinds()
_noted: dict[str, _Noted] = {}


def _stretch(tensors: list[Tensor], text: str) -> Sequence[Tensor]:
    device = tensors[0].device.type
    found = signature(tensors)
    with _ByItself(device):
        if found is None:
            return _stretch_fake(tensors, text)
        key = text, found, dispatch.order(device), dispatch.generation()
        plan = _plans.find(key) or keep(_plans, key, Plan("forward", _forward_of(tensors, text)))
        return plan(*tensors)


def _stretch_fake(tensors: list[Tensor], text: str) -> Sequence[Tensor]:
    return _forward_of(tensors, text)(_launch("forward"), *tensors)


def _forward_of(tensors: list[Tensor], text: str) -> Callable[..., tuple[Tensor, ...]]:
    """(launch, *tensors) -> the op's results."""
    call = parsed(text)
    kind = call.kind(tensors)

    def compute(launch: Launch, *tensors: Tensor) -> tuple[Tensor, ...]:
        total, result, *more = kind.compute(launch, *call.filled(tensors))
        copies, *saved = more or ([],)
        for (_, place), copy in zip(kind.multiplied, copies, strict=bool(copies)):
            saved[place] = copy
        results, places = _once((total, result, *saved), tensors)
        _noted[text] = _Noted(places[2:], kind.parts[-1].total.learns)
        return tuple(results)

    return compute


# -------------------------------------------------------------------------------------------------------- backward

_backward_plans: Kinds[Plan] = Kinds()
_returned: dict[str, list[int]] = {}  # by text: where the gradients of the tensors are among the results, or -1


def _stretch_backward(tensors: list[Tensor], shape: list[int], text: str) -> Sequence[Tensor]:
    device = tensors[0].device.type
    found = signature(tensors)
    with _ByItself(device):
        if found is None:
            return _stretch_backward_fake(tensors, shape, text)
        key = text, tuple(shape), found, dispatch.order(device), dispatch.generation()
        plan = _backward_plans.find(key)
        if plan is None:
            plan = keep(_backward_plans, key, Plan("backward", _backward_of(tensors, shape, text)))
        return plan(*tensors)


def _stretch_backward_fake(tensors: list[Tensor], shape: Sequence[int], text: str) -> Sequence[Tensor]:
    return _backward_of(tensors, shape, text)(_launch("backward"), *tensors)


def _backward_of(tensors: list[Tensor], shape: Sequence[int], text: str) -> Callable[..., tuple[Tensor, ...]]:
    """(launch, *tensors) -> gradients, each of them once."""
    there, layout, needs, of_forward = json.loads(text)
    call, like = parsed(of_forward), tensors[0]
    x, *others = [like.new_empty(1, dtype=each.dtype) for each in call.told]  # the forward pass has looked at them
    kind = call.kind([x.expand(list(shape)), *others], checked=True)
    rest_of_needs = iter(needs)
    flags = [isinstance(each, Told) and next(rest_of_needs) for each in call.entries]

    def compute(launch: Launch, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        grads = [rest.pop(0) if each else None for each in there]
        saved = [None if index < 0 else rest[index] for index in layout]
        results, places = _once(kind.gradients(flags, launch, *grads, *saved), ())
        both = zip(call.entries, places[1:], strict=True)  # the first stands for the stretch itself
        _returned[text] = [place for each, place in both if isinstance(each, Told)]
        return tuple(results)

    return compute


# -------------------------------------------------------------------------------------------------------- autograd


class _Stretch(torch.autograd.Function):
    """What a compiler differentiates. Its graph then has the ops below, which know nothing of autograd: a Python kernel
    of autograd's would be passed at each call."""

    @staticmethod
    def forward(ctx: Any, text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = torch.ops.vitkernels.stretch_forward(list(tensors), text)
        noted, everything = _noted[text], [*tensors, *results]
        used = sorted({index for index in noted.layout if index >= 0})
        ctx.save_for_backward(*[everything[index] for index in used])
        ctx.layout = tuple([used.index(index) if index >= 0 else -1 for index in noted.layout])
        ctx.text, ctx.shape, ctx.results = text, tensors[0].shape, parsed(text).results
        frozen = [] if noted.total_learns or ctx.results == 1 else [results[0]]
        ctx.mark_non_differentiable(*frozen, *results[ctx.results :])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        arrived = [None, *grads[:1]] if ctx.results == 1 else list(grads[:2])
        there = tuple([each is not None for each in arrived])
        _, *needs = ctx.needs_input_grad
        if not any(there):
            return (None, *[None] * len(needs))
        text = json.dumps((there, ctx.layout, needs, ctx.text))
        tensors = [*(each for each in arrived if each is not None), *saved_tensors(ctx)]
        if torch.is_grad_enabled():
            found = _Gradients.apply(ctx.shape, text, *tensors)
        else:
            found = torch.ops.vitkernels.stretch_backward(tensors, ctx.shape, text)
        return None, *(None if place < 0 else found[place] for place in _returned[text])


class _Gradients(torch.autograd.Function):
    """The backward op in a graph of the gradients."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.vitkernels.stretch_backward(list(tensors), shape, text))

    backward = staticmethod(refusal("a fused block", "double backward (create_graph=True, grad of grad)"))


def _differentiable(tensors: list[Tensor], numbers: list[float], text: str) -> Sequence[Tensor]:
    text = whole(text, *numbers)
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return _Stretch.apply(text, *tensors)
    return torch.ops.vitkernels.stretch_forward(tensors, text)


def _without_autograd(tensors: list[Tensor], numbers: list[float], text: str) -> Sequence[Tensor]:
    return _stretch(tensors, whole(text, *numbers))


def _without_autograd_fake(tensors: list[Tensor], numbers: list[float], text: str) -> Sequence[Tensor]:
    return _stretch_fake(tensors, whole(text, *numbers))


# The first one is traced, by Dynamo and differentiated by autograd; graphs have the other two.
_SCHEMAS = {
    "stretch": "(Tensor[] tensors, float[] numbers, str text) -> Tensor[]",
    "stretch_forward": "(Tensor[] tensors, str text) -> Tensor[]",
    "stretch_backward": "(Tensor[] tensors, SymInt[] shape, str text) -> Tensor[]",
}


def _define(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{_SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitkernels::{name}", fake, lib=_library)


_define("stretch", _without_autograd, _without_autograd_fake)
_library.impl("stretch", _differentiable, "Autograd")
_define("stretch_forward", _stretch, _stretch_fake)
_define("stretch_backward", _stretch_backward, _stretch_backward_fake)
