"""Steps of a residual stream, each one autograd Function: add, norm, and the products that read the norm.

    total  = x + row_scale[b] * scale * (branch + branch_bias)
    result = product(layer_norm(total))

where the product is `linear`, `mlp`, `glu_mlp`, or attention between its two projections, and the norm may be an
RMSNorm. A step computes what the ops one by one compute, through the same kernels (`vk.record` shows them), and costs
autograd one node in place of two to four. It also keeps less: `normed` is made again from `total`, which is kept anyway
(one pass over memory gives the same bits), and under autocast weights are cast again instead of kept as copies.

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
from vitkernels.op import Op, own, plain_function
from vitkernels.op import signature as signature_of
from vitkernels.ops import _check
from vitkernels.ops._amp import autocast_dtype, cast, cast_dtype
from vitkernels.ops._plan import MOST, Launch, Plan, launch_backward
from vitkernels.ops.add_layer_norm import KEPT, op_rms, saved_tensors
from vitkernels.ops.add_layer_norm import backward as norm_backward
from vitkernels.ops.add_layer_norm import check as check_norm
from vitkernels.ops.add_layer_norm import kept as kept_of_norm
from vitkernels.ops.add_layer_norm import op as op_norm
from vitkernels.ops.attention import check_packed, op_qkv, packed_options
from vitkernels.ops.glu_mlp import check as check_glu_mlp
from vitkernels.ops.glu_mlp import op as op_glu_mlp
from vitkernels.ops.linear import check as check_linear
from vitkernels.ops.linear import op as op_linear
from vitkernels.ops.mlp import check as check_mlp
from vitkernels.ops.mlp import op as op_mlp

_SMALL = 2**16  # elements; a norm's result of fewer is kept: making it again would take longer than its memory is worth


class Norm(NamedTuple):
    """A norm's weight, bias (as in `ops.add_layer_norm`) and eps; and whether its result is made again in backward.

    `again` is None for what suits the device: on GPUs the pass over memory costs more than the memory is worth. `rms`
    says that it is an RMSNorm.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    again: bool | None = None
    rms: bool = False


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
    """(total, normed) by `ops.add_layer_norm` or `ops.add_rms_norm`."""
    branch, branch_bias, scale, row_scale = added or _NOTHING_ADDED
    return (ops.add_rms_norm if norm.rms else ops.add_layer_norm)(
        x,
        branch,
        norm.weight,
        bias=norm.bias,
        eps=norm.eps,
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


def glu_mlp(
    x: Tensor,
    added: Added | None,
    norm: Norm,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(total, `ops.glu_mlp` of its norm); arguments as in `mlp`, gate and up packed."""
    return _GLU_MLP(x, added, norm, (*weights, activation))


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
        self.plans: dict[Any, Plan] = {}

    def __call__(self, x: Tensor, added: Added | None, norm: Norm, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        branch, branch_bias, scale, row_scale = added or _NOTHING_ADDED
        dtype = autocast_dtype(x)
        how = dtype, norm.again, norm.rms
        inputs = (x, branch, norm.weight, norm.bias, norm.eps, branch_bias, scale, row_scale, how, *arguments)
        found = None if torch.compiler.is_compiling() else signature_of(inputs)
        if found is None:
            total, normed = add_norm(x, added, norm, None if dtype is None else cast_dtype(x, dtype))
            return total, self.ops(normed, *arguments)
        signature, learns = found
        key = signature, dispatch.order(x.device.type), dispatch.generation()
        plan = self.plans.get(key)
        if plan is None:
            plan = self._planned(key, inputs)
        if branch is not None and branch.dtype != x.dtype:
            inputs = (_widened(x, branch), *inputs[1:])
        if learns and torch.is_grad_enabled():
            return self.apply(plan, *inputs)
        return self._run(plan, False, *inputs)[:2]

    def _planned(self, key: Any, inputs: tuple[Any, ...]) -> Plan:
        x, branch, weight, bias, _, branch_bias, scale, row_scale, (dtype, *_), *arguments = inputs
        check_norm(x, branch, weight, bias, branch_bias, scale, row_scale, dtype)
        self.check(_widened(x, branch), *arguments, dtype)
        if len(self.plans) == MOST:
            self.plans.clear()
        plan = self.plans[key] = Plan()
        return plan

    def _run(self, plan: Plan, learns: bool, *inputs: Any) -> tuple[Any, ...]:
        """total, result, normed, the norm's statistics, and what the product's backward keeps."""
        x, branch, weight, bias, eps, branch_bias, scale, row_scale, (dtype, _, rms), *arguments = inputs
        normed_dtype = x.dtype if dtype is None else cast_dtype(x, dtype)
        kind = x.device.type
        if dtype is not None:  # dtypes are settled here; inside, autocast would cast again
            torch.set_autocast_enabled(kind, False)
        try:
            total, normed, mean, rstd = plan.forward(
                "norm", _op_of(rms), x, branch, weight, bias, eps, branch_bias, scale, row_scale, normed_dtype
            )
            result, kept = self.forward(plan.forward, normed, dtype, learns, *arguments)
        finally:
            if dtype is not None:
                torch.set_autocast_enabled(kind, True)
        return x if branch is None else total, result, normed, mean, rstd, kept

    def _forward(self, ctx: Any, plan: Plan, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, result, normed, mean, rstd, kept = self._run(plan, True, *inputs)
        x, branch, weight, bias, eps, branch_bias, scale, row_scale, (dtype, again, rms), *arguments = inputs
        summed = any(each is not None and each.requires_grad for each in (x, branch, branch_bias, scale, row_scale))
        learns = summed or any(each is not None and each.requires_grad for each in (weight, bias))
        # a frozen norm's input is anybody's to write into
        again = learns and normed.numel() >= _SMALL and (not normed.is_cuda if again is None else again)
        of_norm = kept_of_norm(total, branch, weight, mean, rstd, branch_bias, scale, row_scale)
        read = [isinstance(each, Tensor) and index not in self.biases for index, each in enumerate(arguments)]
        ctx.save_for_backward(
            None if again or not (learns or arguments[0].requires_grad) else normed,
            bias if learns else None,
            *(of_norm if learns else [None] * KEPT),
            *[each if is_read else None for each, is_read in zip(arguments, read, strict=True)],
            *kept,
        )
        # what was multiplied, whatever a caller puts in a parameter's place (p.data = ...)
        ctx.values = [
            each.detach() if isinstance(each, torch.nn.Parameter) and is_read else None
            for each, is_read in zip(arguments, read, strict=True)
        ]
        ctx.rest = [None if isinstance(each, Tensor) else each for each in arguments]
        ctx.dtypes = [each.dtype if isinstance(each, Tensor) else None for each in arguments]
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.plan, ctx.eps, ctx.rms, ctx.dtype, ctx.kind = plan, eps, rms, dtype, x.device.type
        ctx.normed_shape, ctx.normed_dtype = normed.shape, normed.dtype
        if not summed:
            ctx.mark_non_differentiable(total)  # a sum of frozen things is frozen, though what follows it learns
        ctx.set_materialize_grads(False)
        return total, own(result)

    def _backward(self, ctx: Any, dtotal: Tensor | None, dresult: Tensor | None) -> tuple[Tensor | None, ...]:
        normed, bias, *saved = saved_tensors(ctx)
        of_norm, tensors = saved[:KEPT], saved[KEPT:]
        count = len(ctx.rest)
        arguments = [rest if tensor is None else tensor for tensor, rest in zip(tensors[:count], ctx.rest, strict=True)]
        if not torch.is_grad_enabled():  # else the graph of the gradients needs the parameters themselves
            arguments = [each if value is None else value for each, value in zip(arguments, ctx.values, strict=True)]
        needs = ctx.needs_input_grad[1:]
        launch = launch_backward(ctx.plan, (dtotal, dresult), needs, ctx.kind)
        needs_normed, needs_arguments = any(needs[:8]), needs[9:]
        dnormed: Tensor | None = None
        grads: Sequence[Tensor | None] = [None] * count
        if dresult is not None:
            if normed is None:
                normed = _again(ctx, dresult, of_norm, bias, reads=needs_arguments[0])
            needs_product = [needs_normed, *needs_arguments]
            dnormed, *given = self.backward(
                launch, dresult, normed, ctx.dtype, needs_product, arguments, tensors[count:]
            )
            grads = [_in_dtype(*each) for each in zip(given, ctx.dtypes, strict=True)]
        above: Sequence[Tensor | None] = (None,) * 8
        if needs_normed:
            run = functools.partial(launch, "norm", _op_of(ctx.rms))
            above = norm_backward(needs, dtotal, dnormed, of_norm, ctx.branch_dtype, run)
        return None, *above, None, *grads


def _op_of(rms: bool) -> Op:
    return op_rms if rms else op_norm


def _widened(x: Tensor, branch: Tensor | None) -> Tensor:
    """The stream in the dtype of its sum with a branch."""
    return x if branch is None else x.to(torch.promote_types(x.dtype, branch.dtype))


def _again(ctx: Any, like: Tensor, of_norm: Sequence[Any], bias: Tensor | None, reads: bool) -> Tensor:
    """The norm's result once more, a forward launch of its op; without contents where nothing reads it."""
    if not reads:
        return like.new_empty(ctx.normed_shape, dtype=ctx.normed_dtype)
    total, _, weight, *_ = of_norm
    with torch.no_grad():
        return _op_of(ctx.rms)(total, None, weight, bias, ctx.eps, None, None, None, ctx.normed_dtype)[1]


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


# ---------------------------------------------------------------------------------------------------- feed-forward


def _feed_forward(name: str, op: Op, check: Callable[..., None], public: Callable[..., Tensor]) -> _Step:
    """The step of `mlp`, or of `glu_mlp`, whose arguments mean as much to a step."""

    def by_ops(normed: Tensor, *arguments: Any) -> Tensor:
        return public(normed, *arguments[:4], activation=arguments[4])

    def forward(
        launch: Launch, normed: Tensor, dtype: torch.dtype | None, learns: bool, *arguments: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *weights, activation = arguments
        y, pre = launch(name, op, normed, *_cast(dtype, *weights), activation, learns)
        return y, (pre,)

    def backward(launch, dy, normed, dtype, needs, arguments, kept):
        w1, _, w2, _, activation = arguments
        w1, w2 = _cast(dtype, w1, w2)
        dx, *grads = launch(name, op, dy, normed, *kept, w1, w2, activation, list(needs[:5]))
        return dx if needs[0] else None, *_given(needs[1:5], grads), None

    return _Step(f"{name}_step", check, by_ops, forward, backward, (1, 3))


_MLP = _feed_forward("mlp", op_mlp, check_mlp, ops.mlp)
_GLU_MLP = _feed_forward("glu_mlp", op_glu_mlp, check_glu_mlp, ops.glu_mlp)


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
