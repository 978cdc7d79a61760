"""Steps of a residual stream, each one autograd Function: add, norm, and the products that read the norm.

    total  = x + row_scale[b] * scale * (branch + branch_bias)
    result = product(layer_norm(total))

where the product is `linear`, `mlp`, or attention between its two projections. A step computes what the ops one by one
compute, through the same kernels (`vk.record` shows them), and costs autograd one node in place of two to four. It also
keeps less: `normed` is made again from `total`, which is kept anyway (one pass over memory gives the same bits), and
under autocast weights are cast again instead of kept as copies.

The Functions serve plain calls. Where somebody looks on (tracing, functorch, tensor subclasses, profilers) the ops run
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
from vitkernels.ops import _check
from vitkernels.ops._amp import autocast_dtype, cast, cast_dtype
from vitkernels.ops._plan import MOST, Launch, Plan, by_the_ops, keep
from vitkernels.ops.add_layer_norm import KEPT, saved_tensors
from vitkernels.ops.add_layer_norm import backward as norm_backward
from vitkernels.ops.add_layer_norm import check as check_norm
from vitkernels.ops.add_layer_norm import kept as kept_of_norm
from vitkernels.ops.add_layer_norm import op as op_norm
from vitkernels.ops.attention import check_packed, op_qkv, packed_options
from vitkernels.ops.linear import check as check_linear
from vitkernels.ops.linear import op as op_linear
from vitkernels.ops.mlp import check as check_mlp
from vitkernels.ops.mlp import op as op_mlp

_SMALL = 2**16  # elements; a norm's result of fewer is kept: making it again would take longer than its memory is worth


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


def linear(x: Tensor, added: Added | None, norm: Norm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(total, `ops.linear` of its norm).

    Args:
        x: residual stream, [B, N, D].
        added: what is added to it first; None for nothing.
        norm: of the sum.
        weight, bias: as in `ops.linear`.

    Returns:
        [B, N, D] and [B, N, O].

    Raises:
        TypeError, ValueError: as `ops.add_layer_norm` and `ops.linear`.
    """
    return _LINEAR(x, added, norm, (weight, bias))


def mlp(
    x: Tensor,
    added: Added | None,
    norm: Norm,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(total, `ops.mlp` of its norm); arguments as in `linear`, weights and activation as in `ops.mlp`."""
    return _MLP(x, added, norm, (*weights, activation))


def attention(
    x: Tensor,
    added: Added | None,
    norm: Norm,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    num_heads: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, self-attention of its norm): the packed projection, `ops.attention_qkv` and the projection of the heads.

    Args:
        x, added, norm: as in `linear`.
        qkv, proj: weight and bias of the projections, as nn.Linear stores them; [3 * D, D] and [D, D].
        num_heads, attn_mask, is_causal, scale: as in `ops.attention_qkv`.
    """
    return _ATTENTION(x, added, norm, (*qkv, *proj, _check.integer(num_heads), attn_mask, is_causal, scale))


# ------------------------------------------------------------------------------------------------------- one step


class _Step:
    """A norm, and a product that reads it, as one autograd Function.

    Args:
        name: of the Function.
        check: (x, *arguments, autocast's dtype), which raises.
        ops: (normed, *arguments) -> result, through the public ops.
        forward: (launch, normed, dtype, learns, *arguments) -> (result, what its backward keeps).
        backward: (launch, dresult, normed, dtype, needs of normed and of the arguments, arguments, kept) -> gradients
            of normed and of the arguments, these in any dtype; arguments that are biases come as None.
        biases: which of the arguments are biases: nothing reads them again, so that they may be written into.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        ops: Callable[..., Tensor],
        forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
        backward: Callable[..., Sequence[Tensor | None]],
        biases: tuple[int, ...],
    ) -> None:
        self.check, self.ops, self.forward, self.backward, self.biases = check, ops, forward, backward, biases
        self.apply = plain_function(name, self._forward, self._backward)
        self.kinds: dict[Any, _Kind] = {}

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

    def _kind(self, key: Any, inputs: tuple[Any, ...]) -> _Kind:
        x, branch, weight, bias, _, branch_bias, scale, row_scale, (dtype, _), *arguments = inputs
        check_norm(x, branch, weight, bias, branch_bias, scale, row_scale, dtype)
        self.check(_widened(x, branch), *arguments, dtype)
        learns = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
        if len(self.kinds) == MOST:
            self.kinds.clear()
        kind = self.kinds[key] = _Kind(self, inputs, learns)
        return kind

    def _forward(self, ctx: Any, kind: _Kind, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, result, *saved = kind.run(inputs)
        ctx.save_for_backward(*saved)
        # what was multiplied, whatever a caller puts in a parameter's place (p.data = ...)
        ctx.values = [inputs[index].detach() for index in kind.multiplied]
        ctx.kind = kind
        if not kind.summed:
            ctx.mark_non_differentiable(total)  # a sum of frozen things is frozen, though what follows it learns
        ctx.set_materialize_grads(False)
        return total, result

    def _backward(self, ctx: Any, dtotal: Tensor | None, dresult: Tensor | None) -> tuple[Tensor | None, ...]:
        kind: _Kind = ctx.kind
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


class _Kind:
    """One kind of call of a step.

    Attributes:
        learns: whether it has a backward pass.
        summed: whether the sum has a gradient.
        multiplied: which inputs are parameters that the product's backward reads.
        device: type of its tensors' device.
        backward: its backward passes, by kind.
    """

    def __init__(self, step: _Step, inputs: tuple[Any, ...], learns: bool) -> None:
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
        self.rest = [None if isinstance(each, Tensor) else each for each in arguments]
        self.dtypes = [each.dtype if isinstance(each, Tensor) else None for each in arguments]
        self.forward = Plan("forward", self._compute)
        self.backward: dict[Any, Plan] = {}

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """(total, result), and where it learns what is to be saved."""
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
        result, kept = self.step.forward(launch, normed, self.dtype, self.learns, *arguments)
        if not self.learns:
            return total, own(result)
        of_norm = kept_of_norm(total, branch, weight, mean, rstd, branch_bias, scale, row_scale)
        return (
            total,
            own(result),
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
                launch, dresult, normed, self.dtype, needs_product, arguments, tensors[count:]
            )
            grads = [_in_dtype(*each) for each in zip(found, self.dtypes, strict=True)]
        above: Sequence[Tensor | None] = (None,) * (_ADDED - 1)
        if needs_normed:
            run = functools.partial(launch, "norm", op_norm)
            above = norm_backward(needs, dtotal, dnormed, of_norm, self.branch_dtype, run)
        return None, *above, None, *grads

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


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> Sequence[Any]:
    return tensors if dtype is None else cast(dtype, *tensors)


def _given(needs: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that are needed."""
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


def _in_dtype(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype of what it is the gradient of."""
    return grad if grad is None or grad.dtype == dtype else grad.to(dtype)


# --------------------------------------------------------------------------------------------------------- linear


def _linear(
    launch: Launch, normed: Tensor, dtype: torch.dtype | None, learns: bool, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return launch("linear", op_linear, normed, *_cast(dtype, weight, bias)), ()


def _linear_backward(launch, dy, normed, dtype, needs, arguments, kept):
    dx, *grads = launch("linear", op_linear, dy, normed, _cast(dtype, arguments[0])[0], list(needs))
    return dx if needs[0] else None, *_given(needs[1:], grads)


_LINEAR = _Step("linear_step", check_linear, ops.linear, _linear, _linear_backward, (1,))


# ------------------------------------------------------------------------------------------------------------ mlp


def _mlp_ops(normed: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    return ops.mlp(normed, w1, b1, w2, b2, activation=activation)


def _mlp(
    launch: Launch, normed: Tensor, dtype: torch.dtype | None, learns: bool, *arguments: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    *weights, activation = arguments
    y, pre = launch("mlp", op_mlp, normed, *_cast(dtype, *weights), activation, learns)
    return y, (pre,)


def _mlp_backward(launch, dy, normed, dtype, needs, arguments, kept):
    *weights, activation = arguments
    w1, _, w2, _ = weights
    w1, w2 = _cast(dtype, w1, w2)
    dx, *grads = launch("mlp", op_mlp, dy, normed, *kept, w1, w2, activation, list(needs[:5]))
    return dx if needs[0] else None, *_given(needs[1:5], grads), None


_MLP = _Step("mlp_step", check_mlp, _mlp_ops, _mlp, _mlp_backward, (1, 3))


# ------------------------------------------------------------------------------------------------------ attention


@_check.once
def _check_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype | None,
) -> None:
    _check.has_rank("attention", "x", x, "[B, N, D]")
    check_linear(x, qkv_weight, qkv_bias, dtype)
    packed = x.new_empty(1).expand(*x.shape[:2], qkv_weight.shape[0])  # as the projection will be
    check_packed(packed, num_heads, attn_mask, is_causal)
    check_linear(packed[..., : qkv_weight.shape[0] // 3], proj_weight, proj_bias, dtype)


def _attention_ops(normed: Tensor, *arguments: Any) -> Tensor:
    qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, mask, is_causal, scale = arguments
    qkv = ops.linear(normed, qkv_weight, qkv_bias)
    heads = ops.attention_qkv(qkv, num_heads, attn_mask=mask, is_causal=is_causal, scale=scale)
    return ops.linear(heads, proj_weight, proj_bias)


def _attention(
    launch: Launch, normed: Tensor, dtype: torch.dtype | None, learns: bool, *arguments: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, mask, is_causal, scale = arguments
    qkv = launch("qkv", op_linear, normed, *_cast(dtype, qkv_weight, qkv_bias))
    options = packed_options(qkv, num_heads, mask, is_causal, scale)
    heads, *statistics = launch("attention", op_qkv, qkv, *options)
    out = launch("proj", op_linear, heads, *_cast(dtype, proj_weight, proj_bias))
    return out, (qkv, heads, *statistics)


def _attention_backward(launch, dy, normed, dtype, needs, arguments, kept):
    qkv_weight, _, proj_weight, _, num_heads, mask, is_causal, scale = arguments
    qkv, heads, *statistics = kept
    inner = needs[0] or needs[1] or needs[2] or needs[6]
    dheads, *proj = launch("proj", op_linear, dy, heads, _cast(dtype, proj_weight)[0], [inner, *needs[3:5]])
    grads: list[Tensor | None] = [None] * 9
    grads[3:5] = _given(needs[3:5], proj)
    if inner:
        options = packed_options(qkv, num_heads, mask, is_causal, scale)
        dqkv, dmask = launch("attention", op_qkv, dheads, qkv, heads, *statistics, *options, needs[6])
        if any(needs[:3]):  # else the mask alone learns
            dx, *packed = launch("qkv", op_linear, dqkv, normed, _cast(dtype, qkv_weight)[0], list(needs[:3]))
            grads[0] = dx if needs[0] else None
            grads[1:3] = _given(needs[1:3], packed)
        grads[6] = dmask.reshape(mask.shape) if needs[6] else None
    return grads


_ATTENTION = _Step("attention_step", _check_attention, _attention_ops, _attention, _attention_backward, (1, 3))
