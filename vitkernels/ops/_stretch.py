"""Steps of a residual stream in a row, as one autograd Function.

A block's two steps cost autograd one node in place of some twelve. What follows from the kind of a call is settled at
its first one (checks, backends, what is kept), and the launches of later ones come from a tape (`vitkernels.tape`).

The Function serves plain calls. Where somebody looks on (tracing, functorch, tensor subclasses, profilers) the ops run
one by one: a compiler's partitioner decides itself what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.kinds import signature
from vitkernels.op import own, plain_function
from vitkernels.ops._amp import autocast_dtype, cast_dtype
from vitkernels.ops._plan import MOST, Launch, Plan, by_the_ops, keep
from vitkernels.ops._step import (
    ADDED,
    BRANCH_BIAS,
    NOTHING_ADDED,
    SAVED_BIAS,
    Added,
    Norm,
    Part,
    Step,
    Stream,
    add_norm,
    check,
)
from vitkernels.ops.add_layer_norm import saved_tensors

Kind = TypeVar("Kind")


class Factors(NamedTuple):
    """How a step's result is added to the stream: the bias of its projection, LayerScale's gamma and DropPath's factor,
    as `Added` has them."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    row_scale: Tensor | None = None


class Stage(NamedTuple):
    """One step of a stretch: its norm, its product's arguments, and how its result goes into the stream (of the last
    one nothing does)."""

    step: Step
    norm: Norm
    arguments: tuple[Any, ...]
    factors: Factors = Factors()


def run(x: Tensor, added: Added | None, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """(total, result) of the last step.

    Args:
        x: residual stream, [B, N, D].
        added: what is added to it first; None for nothing.
        stages: the steps, in order.

    Raises:
        TypeError, ValueError: as the ops.
    """
    dtype = autocast_dtype(x)
    inputs: list[Any] = [x]
    branch, *factors = added or NOTHING_ADDED
    for stage in stages:
        weight, bias, eps, *how = stage.norm
        inputs += (branch, weight, bias, eps, *factors, (dtype, *how), *stage.arguments)
        branch, factors = None, list(stage.factors)
    found = None if torch.compiler.is_compiling() or x.is_meta else signature(inputs)
    if found is None:
        return _by_the_ops(x, added, stages, dtype)
    steps = tuple([stage.step.name for stage in stages])
    key = found, steps, torch.is_grad_enabled(), dispatch.order(x.device.type), dispatch.generation()
    kind = _kinds.find(key)
    if kind is None:
        kind = _settle(key, stages, inputs)
    if inputs[1] is not None and inputs[1].dtype != x.dtype:
        inputs[0] = x.to(kind.parts[0].total.dtype)
    return _apply(kind, *inputs) if kind.learns else kind.run(inputs)


def _by_the_ops(
    x: Tensor, added: Added | None, stages: Sequence[Stage], dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    for stage in stages:
        x, normed = add_norm(x, added, stage.norm, None if dtype is None else cast_dtype(x, dtype))
        result = stage.step.ops(normed, *stage.arguments)
        added = Added(result, *stage.factors)
    return x, result


class _Kinds(dict[Any, Kind], Generic[Kind]):
    """Kinds of calls by their keys."""

    _last: tuple[Any, Kind | None] = None, None  # blocks in a row are mostly of one kind

    def find(self, key: Any) -> Kind | None:
        """The kind, or None; comparing with the last call's key takes half as long as hashing one."""
        last, kind = self._last
        if last == key:
            return kind
        kind = self.get(key)
        if kind is not None:
            self._last = key, kind
        return kind

    def clear(self) -> None:
        super().clear()
        self._last = None, None


_kinds: _Kinds[_Kind] = _Kinds()


def _settle(key: Any, stages: Sequence[Stage], inputs: Sequence[Any]) -> _Kind:
    learns = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
    kind = _Kind([stage.step for stage in stages], [len(stage.arguments) for stage in stages], inputs, learns)
    if len(_kinds) == MOST:
        _kinds.clear()
    _kinds[key] = kind
    return kind


class _Kind:
    """One kind of call of a stretch.

    Attributes:
        parts: of each step.
        learns: whether it has a backward pass.
        device: type of its tensors' device.
        multiplied: which inputs are weights that a product's backward reads, and where they are saved.
        added: the same for biases of branches, which a factor's gradient reads.
        given: where other inputs are saved; None before the first call. What else is saved a call of the kind has made.
        backward: its backward passes, by kind.
    """

    def __init__(self, steps: Sequence[Step], counts: Sequence[int], inputs: Sequence[Any], learns: bool) -> None:
        x, *given = inputs
        self.learns, self.device, self.dtype = learns, x.device.type, given[7][0]
        self.parts: list[Part] = []
        self._slices: list[slice] = []  # of the inputs behind x
        self.multiplied: list[tuple[int, int]] = []
        self.added: list[tuple[int, int]] = []
        stream, branch = Stream.of(x), None if given[0] is None else Stream.of(given[0])
        begin, saved = 0, 0
        self._copies = self.dtype is not None  # whether autocast's copies of weights are kept
        for step, count in zip(steps, counts, strict=True):
            self._slices.append(slice(begin, begin + ADDED - 1 + count))
            own_inputs = given[self._slices[-1]]
            if self.parts:  # what is not there yet is checked by its shape and dtype
                assert branch is not None
                stand_ins = [x.new_empty(1, dtype=each.dtype).expand(each.shape) for each in (stream, branch)]
                check(step, stand_ins[0], [stand_ins[1], *own_inputs[1:]])
            else:
                check(step, x, own_inputs)
            part = Part(step, stream, branch, own_inputs)
            self._copies = self._copies and part.keeps_copies(x, own_inputs[ADDED - 1 :])
            self.multiplied += [(begin + ADDED + each, saved + part.saved_at(each)) for each in part.multiplied]
            bias, *factors = own_inputs[BRANCH_BIAS : BRANCH_BIAS + 3]
            if bias is not None and any(each is not None and each.requires_grad for each in factors):
                self.added.append((begin + 1 + BRANCH_BIAS, saved + SAVED_BIAS))
            begin, saved = self._slices[-1].stop, saved + part.saves
            self.parts.append(part)
            stream, branch = part.total, part.result
        self.given: list[int] | None = None
        self.forward = Plan("forward", self._compute)
        self.backward: _Kinds[Plan] = _Kinds()

    def run(self, inputs: Sequence[Any]) -> Any:
        """(total, result), and where it learns copies of weights, or none, and what is to be saved."""
        if self.dtype is None:
            return self.forward(*inputs)
        torch.set_autocast_enabled(self.device, False)  # dtypes are settled; inside, autocast would cast again
        try:
            return self.forward(*inputs)
        finally:
            torch.set_autocast_enabled(self.device, True)

    def note_given(self, inputs: Sequence[Any], saved: Sequence[Tensor | None]) -> None:
        """Find which of what is saved are inputs of the call, which somebody may change in between (p.data = ...)."""
        ids, multiplied = set(map(id, inputs)), {index for _, index in (*self.multiplied, *self.added)}
        self.given = [
            index
            for index, each in enumerate(saved)
            if each is not None and id(each) in ids and index not in multiplied
        ]

    def _compute(self, launch: Launch, x: Tensor, *given: Any) -> tuple[Any, ...]:
        branch = given[0]
        copies: list[Tensor] = []
        saved: list[Tensor | None] = []
        for number, (part, own_inputs) in enumerate(zip(self.parts, self._slices, strict=True)):
            at_step = functools.partial(_at, launch, number)
            x, branch, rounded, more = part.compute(at_step, self.learns, self._copies, x, branch, given[own_inputs])
            copies += [rounded[index] for index in part.multiplied] if self._copies else []
            saved += more
        return (x, own(branch), copies, *saved) if self.learns else (x, own(branch))

    def gradients(
        self,
        needs: Sequence[bool],
        launch: Launch,
        dtotal: Tensor | None,
        dresult: Tensor | None,
        *saved: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Of the Function's inputs; `saved` is what `_compute` said, parameters by their values."""
        found: list[Tensor | None] = []
        end = len(saved)
        for number in reversed(range(len(self.parts))):
            part, own_needs = self.parts[number], list(needs[1:][self._slices[number]])
            needs_x = needs[0]
            if number:
                needs_x, own_needs[0] = self.parts[number - 1].total.learns, self.parts[number - 1].result.learns
            begin = end - part.saves
            at_step = functools.partial(_at, launch, number)
            grads = part.gradients(at_step, [needs_x, *own_needs], dtotal, dresult, saved[begin:end])
            dtotal, dresult, *others = grads
            found = [None if number else dresult, *others, *found]
            end = begin
        return None, dtotal, *found


def _at(launch: Launch, number: int, site: str, *args: Any) -> Any:
    """A launch of the step of this number."""
    return launch((number, site), *args)


def _forward(ctx: Any, kind: _Kind, *inputs: Any) -> tuple[Tensor, Tensor]:
    total, result, copies, *saved = kind.run(inputs)
    if kind.given is None:
        kind.note_given(inputs, saved)
    # what was multiplied and added, whatever a caller puts in a parameter's place (p.data = ...)
    places = [*kind.multiplied, *kind.added]
    values = [inputs[index].detach() for index, _ in places[len(copies) :]]
    ctx.as_saved = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    ctx.copies = len(copies) if ctx.as_saved else 0
    if ctx.as_saved:  # what is saved goes when the pass is over, and attributes only when the graph does
        saved += copies
    else:  # hooks give back what they kept: offloaded, compressed, or computed again
        for (_, place), value in zip(places, [*copies, *values], strict=True):
            saved[place] = value
        values = [inputs[index] for index, _ in places]
    ctx.save_for_backward(*saved)
    ctx.values = values
    ctx.kind = kind
    if not kind.parts[-1].total.learns:
        ctx.mark_non_differentiable(total)  # a sum of frozen things is frozen, though what follows it learns
    ctx.set_materialize_grads(False)
    return total, result


def _backward(ctx: Any, dtotal: Tensor | None, dresult: Tensor | None) -> tuple[Tensor | None, ...]:
    kind: _Kind = ctx.kind
    assert kind.given is not None
    saved = list(saved_tensors(ctx))
    end = len(saved) - ctx.copies
    copies, saved = saved[end:], saved[:end]
    needs = ctx.needs_input_grad[1:]
    graph = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if ctx.as_saved is not graph:  # a graph of the gradients needs the parameters themselves
        for (_, place), value in zip((*kind.multiplied, *kind.added), (*copies, *ctx.values), strict=True):
            saved[place] = value
    if graph or torch.is_autocast_enabled(kind.device):
        return kind.gradients(needs, by_the_ops, dtotal, dresult, *saved)
    inputs = (dtotal, dresult, *saved)
    found = signature((dtotal, dresult, *[saved[index] for index in kind.given]) if ctx.as_saved else inputs)
    if found is None:
        return kind.gradients(needs, by_the_ops, *inputs)
    key = found, needs, dispatch.order(kind.device), dispatch.generation()
    plan = kind.backward.find(key)
    if plan is None:
        plan = keep(kind.backward, key, Plan("backward", functools.partial(kind.gradients, needs)))
    return plan(*inputs)


_apply = plain_function("residual_steps", _forward, _backward)
