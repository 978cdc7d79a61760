"""One step of a residual stream as one autograd Function: add, norm, and a product that reads the norm.

    total  = x + row_scale[b] * scale * (branch + branch_bias)
    result = product(layer_norm(total))

A step computes what the ops one by one compute, through the same kernels (`vk.record` shows them), and costs autograd
one node in place of two to four. What follows from the kind of a call is settled at its first one, and the launches of
later ones come from a tape (`vitkernels.tape`). It also keeps less: `normed` is made again from `total`, which is kept
anyway (one pass over memory gives the same bits), and under autocast weights are cast again instead of kept as copies.

The Function serves plain calls. Where somebody looks on (tracing, functorch, tensor subclasses, profilers) the ops run
one by one: a compiler's partitioner decides itself what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels import dispatch, ops
from vitkernels.op import own, plain_function
from vitkernels.op import signature as signature_of
from vitkernels.ops._amp import autocast_dtype, cast, cast_dtype
from vitkernels.ops._plan import MOST, Launch, Plan, by_the_ops, keep
from vitkernels.ops.add_layer_norm import KEPT, saved_tensors
from vitkernels.ops.add_layer_norm import backward as norm_backward
from vitkernels.ops.add_layer_norm import check as check_norm
from vitkernels.ops.add_layer_norm import kept as kept_of_norm
from vitkernels.ops.add_layer_norm import op as op_norm

_SMALL = 2**16  # elements; a norm's result of fewer is kept: making it again would take longer than its memory is worth
_FEW_ROWS = 256  # autocast's copies of weights are kept for fewer: making them again would cost what a product does


class Norm(NamedTuple):
    """A LayerNorm's weight, [D], bias, [D] or None, and eps; and whether its result is made again in backward.

    `again` is None for what suits the device: on GPUs the pass over memory costs more than the memory is worth.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    again: bool | None = None


class Added(NamedTuple):
    """What a step adds to the stream: the branch of the sub-layer before it, [B, N, D], and its factors.

    Attributes are those of `ops.add_layer_norm`: the bias of the branch's projection, [D]; LayerScale's gamma, [D];
    DropPath's factor of each sample, [B].
    """

    branch: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    row_scale: Tensor | None = None


_NOTHING_ADDED = (None, None, None, None)


def add_norm(x: Tensor, added: Added | None, norm: Norm, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(total, normed) by `ops.add_layer_norm`."""
    branch, branch_bias, scale, row_scale = added or _NOTHING_ADDED
    return ops.add_layer_norm(
        x,
        branch,
        *norm[:3],
        branch_bias=branch_bias,
        scale=scale,
        row_scale=row_scale,
        out_dtype=out_dtype,
    )


class Step:
    """A norm, and a product that reads it, as one autograd Function.

    Args:
        name: of the Function.
        check: (x, *arguments, autocast's dtype), which raises.
        ops: (normed, *arguments) -> result, through the public ops.
        forward: (launch, normed, learns, *arguments) -> (result, what its backward keeps).
        backward: (launch, dresult, normed, needs of normed and of the arguments, arguments, kept) -> gradients
            of normed and of the arguments, these in any dtype; arguments that are biases come as None.
        weights, biases: which of the arguments are; autocast rounds both. Nothing reads a bias again: it may be written
            into.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        ops: Callable[..., Tensor],
        forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
        backward: Callable[..., Sequence[Tensor | None]],
        weights: tuple[int, ...],
        biases: tuple[int, ...],
    ) -> None:
        self.check, self.ops, self.forward, self.backward = check, ops, forward, backward
        self.weights, self.biases = weights, biases
        self.apply = plain_function(name, self._forward, self._backward)
        self.kinds: dict[Any, Kind] = {}

    def __call__(self, x: Tensor, added: Added | None, norm: Norm, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        branch, branch_bias, scale, row_scale = added or _NOTHING_ADDED
        weight, bias, eps, again = norm
        dtype = autocast_dtype(x)
        inputs = (x, branch, weight, bias, eps, branch_bias, scale, row_scale, (dtype, again), *arguments)
        found = None if torch.compiler.is_compiling() else signature_of(inputs)
        if found is None:
            total, normed = add_norm(x, added, norm, None if dtype is None else cast_dtype(x, dtype))
            return total, self.ops(normed, *arguments)
        key = found, torch.is_grad_enabled(), dispatch.order(x.device.type), dispatch.generation()
        kind = self.kinds.get(key)
        if kind is None:
            kind = self._kind(key, inputs)
        if branch is not None and branch.dtype != x.dtype:
            inputs = (_widened(x, branch), *inputs[1:])
        if kind.learns:
            return self.apply(kind, *inputs)
        return kind.run(inputs)

    def _kind(self, key: Any, inputs: tuple[Any, ...]) -> Kind:
        x, branch, weight, bias, _, branch_bias, scale, row_scale, (dtype, _), *arguments = inputs
        check_norm(x, branch, weight, bias, branch_bias, scale, row_scale, dtype)
        self.check(_widened(x, branch), *arguments, dtype)
        learns = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
        if len(self.kinds) == MOST:
            self.kinds.clear()
        kind = self.kinds[key] = Kind(self, inputs, learns)
        return kind

    def _forward(self, ctx: Any, kind: Kind, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, result, copies, *saved = kind.run(inputs)
        ctx.save_for_backward(*saved)
        # what was multiplied, whatever a caller puts in a parameter's place (p.data = ...)
        ctx.values = copies or [inputs[index].detach() for index in kind.multiplied]
        ctx.kind = kind
        if not kind.summed:
            ctx.mark_non_differentiable(total)  # a sum of frozen things is frozen, though what follows it learns
        ctx.set_materialize_grads(False)
        return total, result

    def _backward(self, ctx: Any, dtotal: Tensor | None, dresult: Tensor | None) -> tuple[Tensor | None, ...]:
        kind: Kind = ctx.kind
        saved = list(saved_tensors(ctx))
        needs = ctx.needs_input_grad[1:]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(kind.device):
            # a graph of the gradients needs the parameters themselves
            return kind.gradients(needs, by_the_ops, dtotal, dresult, *saved)
        for index, value in zip(kind.multiplied, ctx.values, strict=True):
            saved[_BEFORE_ARGUMENTS + index - _ADDED] = value
        inputs = (dtotal, dresult, *saved)
        found = signature_of(inputs)
        if found is None:
            return kind.gradients(needs, by_the_ops, *inputs)
        key = found, needs, dispatch.order(kind.device), dispatch.generation()
        plan = kind.backward.get(key)
        if plan is None:
            plan = keep(kind.backward, key, Plan("backward", functools.partial(kind.gradients, needs)))
        return plan(*inputs)


_ADDED = 9  # inputs of a step before its product's arguments
_BEFORE_ARGUMENTS = 2 + KEPT  # tensors that are saved before them: normed, the norm's bias, what its backward keeps


class Kind:
    """One kind of call of a step.

    Attributes:
        learns: whether it has a backward pass.
        summed: whether the sum has a gradient.
        multiplied: which inputs are parameters that the product's backward reads.
        device: type of its tensors' device.
        backward: its backward passes, by kind.
    """

    def __init__(self, step: Step, inputs: tuple[Any, ...], learns: bool) -> None:
        x, branch, weight, bias, self.eps, branch_bias, scale, row_scale, (self.dtype, again), *arguments = inputs
        x = _widened(x, branch)
        self.step, self.learns, self.device = step, learns, x.device.type
        self.summed = any(
            each is not None and each.requires_grad for each in (x, branch, branch_bias, scale, row_scale)
        )
        self.norm_learns = self.summed or weight.requires_grad or (bias is not None and bias.requires_grad)
        # a frozen norm's input is anybody's to write into
        again = x.numel() >= _SMALL and (not x.is_cuda if again is None else again)
        self.keeps_normed = not (again and self.norm_learns) and (self.norm_learns or arguments[0].requires_grad)
        self.normed_shape = x.shape
        self.normed_dtype = x.dtype if self.dtype is None else cast_dtype(x, self.dtype)
        self.branch_dtype = None if branch is None else branch.dtype
        self.read = [isinstance(each, Tensor) and index not in step.biases for index, each in enumerate(arguments)]
        self.multiplied = [
            _ADDED + index
            for index, (each, is_read) in enumerate(zip(arguments, self.read, strict=True))
            if is_read and isinstance(each, torch.nn.Parameter)
        ]
        few = self.dtype is not None and x.shape[:-1].numel() < _FEW_ROWS
        self.keeps_copies = few and all(index - _ADDED in step.weights for index in self.multiplied)
        self.rest = [None if isinstance(each, Tensor) else each for each in arguments]
        self.dtypes = [each.dtype if isinstance(each, Tensor) else None for each in arguments]
        self.forward = Plan("forward", self._compute)
        self.backward: dict[Any, Plan] = {}

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """(total, result), and where it learns copies of weights, or none, and what is to be saved."""
        if self.dtype is None:
            return self.forward(*inputs)
        torch.set_autocast_enabled(self.device, False)  # dtypes are settled; inside, autocast would cast again
        try:
            return self.forward(*inputs)
        finally:
            torch.set_autocast_enabled(self.device, True)

    def _compute(self, launch: Launch, *inputs: Any) -> tuple[Tensor | None, ...]:
        x, branch, weight, bias, eps, branch_bias, scale, row_scale, _, *arguments = inputs
        total, normed, mean, rstd = launch(
            "norm", op_norm, x, branch, weight, bias, eps, branch_bias, scale, row_scale, self.normed_dtype
        )
        total = x if branch is None else total
        rounded = self._rounded((*self.step.weights, *self.step.biases), arguments)
        result, kept = self.step.forward(launch, normed, self.learns, *rounded)
        if not self.learns:
            return total, own(result)
        of_norm = kept_of_norm(total, branch, weight, mean, rstd, branch_bias, scale, row_scale)
        return (
            total,
            own(result),
            [rounded[index - _ADDED] for index in self.multiplied] if self.keeps_copies else [],
            normed if self.keeps_normed else None,
            bias if self.norm_learns else None,
            *(of_norm if self.norm_learns else [None] * KEPT),
            *[each if is_read else None for each, is_read in zip(arguments, self.read, strict=True)],
            *kept,
        )

    def gradients(
        self,
        needs: Sequence[bool],
        launch: Launch,
        dtotal: Tensor | None,
        dresult: Tensor | None,
        *saved: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Of the Function's inputs; `saved` is what `_compute` said, parameters by their values."""
        normed, bias, of_norm, tensors = saved[0], saved[1], saved[2:_BEFORE_ARGUMENTS], saved[_BEFORE_ARGUMENTS:]
        count = len(self.rest)
        arguments = [
            rest if tensor is None else tensor for tensor, rest in zip(tensors[:count], self.rest, strict=True)
        ]
        needs_normed, needs_arguments = any(needs[: _ADDED - 1]), needs[_ADDED:]
        dnormed: Tensor | None = None
        grads: Sequence[Tensor | None] = [None] * count
        if dresult is not None:
            if normed is None:
                normed = self._again(dresult, of_norm, bias, reads=needs_arguments[0])
            needs_product = [needs_normed, *needs_arguments]
            dnormed, *found = self.step.backward(
                launch, dresult, normed, needs_product, self._rounded(self.step.weights, arguments), tensors[count:]
            )
            grads = [_in_dtype(*each) for each in zip(found, self.dtypes, strict=True)]
        above: Sequence[Tensor | None] = (None,) * (_ADDED - 1)
        if needs_normed:
            run = functools.partial(launch, "norm", op_norm)
            above = norm_backward(needs, dtotal, dnormed, of_norm, self.branch_dtype, run)
        return None, *above, None, *grads

    def _rounded(self, indices: Sequence[int], arguments: Sequence[Any]) -> Sequence[Any]:
        """The arguments, those of these indices as autocast gives them to a product."""
        if self.dtype is None:
            return arguments
        found = list(arguments)
        for index in indices:
            (found[index],) = cast(self.dtype, found[index])
        return found

    def _again(self, like: Tensor, of_norm: Sequence[Any], bias: Tensor | None, reads: bool) -> Tensor:
        """The norm's result once more, a forward launch of add_layer_norm; without contents where nothing reads it."""
        if not reads:
            return like.new_empty(self.normed_shape, dtype=self.normed_dtype)
        total, _, weight, *_ = of_norm
        with torch.no_grad():
            return op_norm(total, None, weight, bias, self.eps, None, None, None, self.normed_dtype)[1]


def _widened(x: Tensor, branch: Tensor | None) -> Tensor:
    """The stream in the dtype of its sum with a branch."""
    return x if branch is None else x.to(torch.promote_types(x.dtype, branch.dtype))


def _in_dtype(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype of what it is the gradient of."""
    return grad if grad is None or grad.dtype == dtype else grad.to(dtype)
