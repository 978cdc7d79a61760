"""Steps of a residual stream in a row, as one autograd Function.

A block's two steps cost autograd one node in place of some twelve. What follows from the kind of a call is settled at
its first one (checks, backends, what is kept), and the launches of later ones come from a tape (`vitkernels.tape`).

The Function serves plain calls, and compiled code has one op each way that launches the same (`_stretch_op`). Where
somebody else looks on (functorch, tensor subclasses, profilers, export) the ops run one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.kinds import signature
from vitkernels.op import plain_function
from vitkernels.ops import _stretch_op
from vitkernels.ops._amp import autocast_dtype, cast_dtype
from vitkernels.ops._plan import MOST, Plan, by_the_ops, keep
from vitkernels.ops._step import NOTHING_ADDED, Added, Norm, Step, add_norm
from vitkernels.ops._stretch_kind import Kind, Kinds
from vitkernels.ops.add_layer_norm import saved_tensors


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
        if stage.step.check_values is not None:
            stage.step.check_values(x, *stage.arguments)
        weight, bias, eps, *how = stage.norm
        inputs += (branch, weight, bias, eps, *factors, (dtype, *how), *stage.arguments)
        branch, factors = None, list(stage.factors)
    steps = tuple([stage.step.name for stage in stages])
    if _stretch_op.serves():
        return _stretch_op.run(steps, tuple([len(stage.arguments) for stage in stages]), inputs)
    found = None if torch.compiler.is_compiling() or x.is_meta else signature(inputs)
    if found is None:
        return _by_the_ops(x, added, stages, dtype)
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


_kinds: Kinds[Kind] = Kinds()


def _settle(key: Any, stages: Sequence[Stage], inputs: Sequence[Any]) -> Kind:
    learns = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
    kind = Kind([stage.step for stage in stages], [len(stage.arguments) for stage in stages], inputs, learns)
    if len(_kinds) == MOST:
        _kinds.clear()
    _kinds[key] = kind
    return kind


def _forward(ctx: Any, kind: Kind, *inputs: Any) -> tuple[Tensor, Tensor]:
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
    kind: Kind = ctx.kind
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
