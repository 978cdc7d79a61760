"""add_layer_norm: residual + bias + LayerScale + DropPath + LayerNorm in one pass over memory, each way.

    total  = x + row_scale[b] * scale * (branch + branch_bias)
    normed = (total - mean) / sqrt(var + eps) * weight + bias

Every Transformer sub-layer ends in the first line and the next one begins with the second, so one op serves both:
`normed` feeds the next sub-layer, `total` goes on as its residual and is what backward passes keep (`_steps.py` makes
`normed` again from it). LayerNorm is Ba et al. 2016, LayerScale Touvron et al. 2021 (CaiT),
DropPath Huang et al. 2016 (stochastic depth).

add_rms_norm is the same with the mean left out: normed = total / sqrt(mean of squares + eps) * weight (Zhang and
Sennrich 2019). It is an op of its own by name, and everything behind the name is shared.

weight, bias and scale may be one vector for each sample in place of one for all: a Transformer conditioned by adaptive
normalisation (Peebles and Xie 2023) has weight = 1 + its scale, bias = its shift and scale = its gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import CODES, DTYPES, accumulate_dtype, given, nothing, wide


@remembered
def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch_bias: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's branch to the residual stream and normalise the sum.

    Args:
        x: residual stream, [B, ..., D], floating point, any strides.
        branch: the sub-layer's output, x's shape; None for a plain LayerNorm. Its dtype may differ from x's: the sum
            is in the wider of the two, as eager addition has it.
        weight, bias: LayerNorm's parameters, [D], or [B, D], one vector for each sample; both of one shape. None for a
            LayerNorm without them.
        eps: added to the variance.
        branch_bias: [D], added to the branch first: the bias of the projection that made it. Its gradient is summed
            here, where it is born, and needs no pass of its own.
        scale: LayerScale's gamma, [D], or [B, D], one vector for each sample.
        row_scale: DropPath's factor for each sample, [B]: 0 or 1 / keep_prob.
        out_dtype: dtype of normed; the default is total's. A consumer that multiplies in bfloat16 wants it so.

    Returns:
        (total, normed), both of x's shape. With branch=None total is x itself.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes that do not fit, tensors on different devices, a factor without a branch, or a bias without
            a weight.
    """
    return _normed(op, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype)


@remembered
def add_rms_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
    branch_bias: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's branch to the residual stream and divide the sum by its root mean square.

    Statistics are float32, and normed is rounded once, as torch.nn.RMSNorm has it. transformers' classes also round
    before the weight, to x's dtype: in 16 bits they differ from this by that rounding.

    Args:
        x, branch, weight, branch_bias, scale, row_scale, out_dtype: as in `add_layer_norm`.
        eps: added to the mean of squares.
        bias: of weight's shape; an RMSNorm has none, adaptive normalisation has its shift here.

    Returns:
        (total, normed), both of x's shape. With branch=None total is x itself.

    Raises:
        TypeError, ValueError: as `add_layer_norm`.
    """
    return _normed(op_rms, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype)


def _normed(
    op: Op, x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    branch_bias: Tensor | None, scale: Tensor | None, row_scale: Tensor | None, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(x, branch, weight, bias, branch_bias, scale, row_scale, out_dtype, op.name)
    if branch is not None and branch.dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, branch.dtype))
    total, normed, _, _ = op(x, branch, weight, bias, eps, branch_bias, scale, row_scale, CODES[out_dtype or x.dtype])
    return x if branch is None else total, normed


@_check.once
def check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype | None,
    name: str = "add_layer_norm",
) -> None:
    vectors = {"weight": weight, "bias": bias, "branch_bias": branch_bias, "scale": scale}
    _check.is_tensor(name, x=x, optional={"branch": branch, "row_scale": row_scale, **vectors})
    _check.is_floating(name, x=x, branch=branch, row_scale=row_scale, **vectors)
    if out_dtype is not None and out_dtype not in _check.FLOATING:
        raise TypeError(
            f"{name}: argument 'out_dtype' is {out_dtype!r}; needs one of float32, float64, bfloat16, float16"
        )
    _check.has_rank(name, "x", x, "[D]", at_least=True)
    _check.has_shape(name, "branch", branch, x.shape, "x's shape")
    for vector_name, vector in (("weight", weight), ("scale", scale)):
        if vector is not None and vector.dim() == 2 and x.dim() > 1:
            _check.has_shape(name, vector_name, vector, (x.shape[0], x.shape[-1]), "x's first axis and its last")
        else:
            _check.has_shape(name, vector_name, vector, x.shape[-1:], "x's last axis")
    if bias is not None and weight is None:
        raise ValueError(f"{name}: argument 'bias' is given while 'weight' is None; needs a weight beside it")
    if weight is not None:
        _check.has_shape(name, "bias", bias, weight.shape, "weight's shape")
    _check.has_shape(name, "branch_bias", branch_bias, x.shape[-1:], "x's last axis")
    if row_scale is not None:
        _check.has_rank(name, "x", x, "[B, D]", at_least=True)
    _check.has_shape(name, "row_scale", row_scale, x.shape[:1], "one factor a sample, x's first axis")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: argument 'x' has shape {list(x.shape)}; needs a last axis of 1 or more")
    for factor_name, factor in (("branch_bias", branch_bias), ("scale", scale), ("row_scale", row_scale)):
        if branch is None and factor is not None:
            raise ValueError(
                f"{name}: argument '{factor_name}' is given while 'branch' is None; needs a branch to act on"
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, branch, weight, _, _, branch_bias, scale, row_scale, _ = inputs
    total, _, mean, rstd = output
    factors_learn = any(each is not None and each.requires_grad for each in (scale, row_scale))
    of_norm = (branch, weight, mean, rstd, branch_bias, scale, row_scale, factors_learn)
    ctx.save_for_backward(*kept(x if branch is None else total, *of_norm))
    ctx.branch_dtype = None if branch is None else branch.dtype
    summed = any(each is not None and each.requires_grad for each in (x, branch, branch_bias, scale, row_scale))
    # a sum of frozen things is frozen, though the norm behind it learns: it may be kept and used in many steps
    ctx.mark_non_differentiable(mean, rstd, *(() if summed else (total,)))
    ctx.set_materialize_grads(False)


KEPT = 8  # tensors


def kept(
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    factors_learn: bool,
) -> tuple[Tensor | None, ...]:
    """What is kept for `backward`: the branch and its bias only where the gradient of scale or row_scale needs them."""
    read = (branch, branch_bias) if factors_learn else (None, None)
    return total, read[0], weight, mean, rstd, read[1], scale, row_scale


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """ctx.saved_tensors of a backward pass that reads a sum; one that was written into is named."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "add_layer_norm: its sum, its norm's weight or bias, a factor, or the weight of the product behind it was "
            "written into; the backward pass needs it unchanged: clone it first (x = x.clone())"
        ) from error


def backward(
    needs_input_grad: Sequence[bool],
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    saved: Sequence[Any],
    branch_dtype: torch.dtype | None,
    launch: Callable[..., Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, branch, weight, bias, eps, branch_bias, scale and row_scale.

    Args:
        needs_input_grad: of these.
        dtotal, dnormed: of the results; None for zeros.
        saved: what `kept` gave.
        branch_dtype: the branch's; None without one, where x's gradient takes dtotal along.
        launch: what runs the norm's backward op.
    """
    if dtotal is None and dnormed is None:
        return (None,) * 8
    total, branch, weight, mean, rstd, branch_bias, scale, row_scale = saved
    x_, branch_, weight_, bias_, _, branch_bias_, scale_, row_scale_ = needs_input_grad[:8]
    if dnormed is None:
        weight_ = bias_ = False  # nobody read the norm: its gradients are None, as those of one that was not called
    needs = [x_, branch_, weight_, bias_, branch_bias_, scale_, row_scale_]
    # where nothing scales the branch and dtypes agree, its gradient is x's: the same tensor, not a second pass
    shared = scale is None and row_scale is None and branch_dtype == total.dtype
    if shared:
        needs[:2] = [x_ or branch_, False]
    dx, dbranch, dweight, dbias, dbranch_bias, dscale, drow_scale = launch(
        dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias, scale, row_scale, branch_dtype, needs
    )
    return (
        given(x_, dx),
        given(branch_, dx if shared else dbranch),
        given(weight_, dweight),
        given(bias_, dbias),
        None,
        given(branch_bias_, dbranch_bias),
        given(scale_, dscale),
        given(row_scale_, drow_scale),
    )


def _fake(rms: bool, x: Tensor, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype):
    statistics = accumulate_dtype(x.dtype)
    return (
        nothing(x) if branch is None else x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=DTYPES[out_dtype]),
        nothing(x, statistics) if rms else x.new_empty(x.shape[:-1], dtype=statistics),
        x.new_empty(x.shape[:-1], dtype=statistics),
    )


def _fake_backward(
    dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias, scale, row_scale, branch_dtype, needs
):
    accumulate = rstd.dtype
    return (
        total.new_empty(total.shape) if needs[0] else nothing(total),
        total.new_empty(total.shape, dtype=branch_dtype) if needs[1] else nothing(total),
        weight.new_empty(weight.shape) if needs[2] else nothing(total),
        weight.new_empty(weight.shape) if needs[3] else nothing(total),
        total.new_empty(total.shape[-1:], dtype=accumulate) if needs[4] else nothing(total),
        scale.new_empty(scale.shape, dtype=accumulate) if needs[5] else nothing(total),
        total.new_empty(total.shape[:1], dtype=accumulate) if needs[6] else nothing(total),
    )


def _beside(vector: Tensor, like: Tensor) -> Tensor:
    """[D] as it is, [B, D] -> [B, 1, ..., D], beside `like`'s [B, ..., D]."""
    vector = wide(vector)
    if vector.dim() == 1:
        return vector
    return vector.reshape(vector.shape[0], *[1] * (like.dim() - 2), vector.shape[1])


def _scaled(branch: Tensor, branch_bias: Tensor | None, scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    value = wide(branch)
    if branch_bias is not None:
        value = value + wide(branch_bias)
    if scale is not None:
        value = value * _beside(scale, branch)
    return value if row_scale is None else value * _beside(row_scale.unsqueeze(1), branch)


def _reference(rms, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype):
    total = x if branch is None else (wide(x) + _scaled(branch, branch_bias, scale, row_scale)).to(x.dtype).contiguous()
    value = wide(total)
    mean = nothing(value) if rms else value.mean(-1)
    centred = value if rms else value - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = centred * rstd.unsqueeze(-1)
    if weight is not None:
        normed = normed * _beside(weight, x)
    if bias is not None:
        normed = normed + _beside(bias, x)
    return nothing(x) if branch is None else total, normed.to(DTYPES[out_dtype]).contiguous(), mean, rstd


def _reference_backward(
    rms, dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias, scale, row_scale, branch_dtype, needs
):
    normalised = (wide(total) if rms else wide(total) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dy = torch.zeros_like(normalised) if dnormed is None else wide(dnormed).to(normalised.dtype)
    inner = dy if weight is None else dy * _beside(weight, total)
    correction = normalised * (inner * normalised).mean(-1, keepdim=True)
    if not rms:
        correction = inner.mean(-1, keepdim=True) + correction
    g = (inner - correction) * rstd.unsqueeze(-1)
    if dtotal is not None:
        g = g + wide(dtotal)
    factor = _scaled(torch.ones_like(g), None, scale, row_scale)
    accumulate = rstd.dtype

    def total_over(value: Tensor, dtype: torch.dtype, vector: Tensor | None = None) -> Tensor:
        """The sum over every axis but those that the vector has."""
        rows = tuple(range(0 if vector is None else vector.dim() - 1, value.dim() - 1))
        return (value.sum(rows) if rows else value.clone()).to(dtype)

    biased = total if branch is None else _scaled(branch, branch_bias, None, None)  # without a branch, not needed
    return (
        g.to(total.dtype).contiguous() if needs[0] else nothing(total),
        (g * factor).to(branch_dtype).contiguous() if needs[1] else nothing(total),
        total_over(dy * normalised, weight.dtype, weight) if needs[2] else nothing(total),
        total_over(dy, weight.dtype, weight) if needs[3] else nothing(total),
        total_over(g * factor, accumulate) if needs[4] else nothing(total),
        total_over(g * _scaled(biased, None, None, row_scale), accumulate, scale) if needs[5] else nothing(total),
        (g * _scaled(biased, None, scale, None)).flatten(1).sum(1) if needs[6] else nothing(total),
    )


def _norm_op(name: str, rms: bool) -> Op:
    def gradients(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.branch_dtype is None:
            dtotal = None  # x itself is the sum, and has its gradient from elsewhere
        saved = saved_tensors(ctx)
        return *backward(ctx.needs_input_grad, dtotal, dnormed, saved, ctx.branch_dtype, made.backward), None

    made = Op(
        name,
        "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, Tensor? branch_bias, Tensor? scale, "
        "Tensor? row_scale, int out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
        "(Tensor? dtotal, Tensor? dnormed, Tensor total, Tensor? branch, Tensor? weight, Tensor mean, Tensor rstd, "
        "Tensor? branch_bias, Tensor? scale, Tensor? row_scale, ScalarType? branch_dtype, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=functools.partial(_fake, rms),
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=gradients,
    )
    made.register("reference", functools.partial(_reference, rms), functools.partial(_reference_backward, rms))
    return made


op = _norm_op("add_layer_norm", rms=False)
op_rms = _norm_op("add_rms_norm", rms=True)  # its mean is a tensor of no elements
