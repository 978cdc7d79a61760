"""linear: y = x w^T + b, the GEMM between the fused ops.

There is no fusion here worth a kernel of its own: the point is that the fastest GEMM at hand runs (cuBLAS on a GPU; the
extension's, oneDNN's or MKL's on a CPU, as timed once on the machine), and that weight and bias gradients come from one
call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import asked_for, autocast_dtype, nothing, wide


@remembered
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear projection of the last axis, as `torch.nn.functional.linear`.

    Args:
        x: [..., I], floating point, any strides.
        weight: [O, I], in x's dtype (autocast casts both).
        bias: [O] or None.

    Returns:
        [..., O], in x's dtype (under autocast, autocast's).

    Raises:
        TypeError: an argument that is no floating-point tensor, or mixed dtypes outside autocast.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    dtype = autocast_dtype(x)
    check(x, weight, bias, dtype)
    if dtype is not None:
        x, weight, bias = op.cast(dtype, x, weight, bias)
    return op(x, weight, bias)


@_check.once
def check(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None) -> None:
    _check.is_tensor("linear", x=x, weight=weight, optional={"bias": bias})
    _check.is_floating("linear", x=x, weight=weight, bias=bias)
    _check.has_rank("linear", "x", x, "[I]", at_least=True)
    _check.has_rank("linear", "weight", weight, "[O, I]")
    _check.has_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]), "x's last axis")
    _check.has_shape("linear", "bias", bias, weight.shape[:1], "weight's first axis")
    _check.same_dtype("linear", autocast, x=x, weight=weight, bias=bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    return asked_for(needs, op.backward(dy, x, weight, needs))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs[0] else nothing(x),
        weight.new_empty(weight.shape) if needs[1] else nothing(x),
        weight.new_empty(weight.shape[:1]) if needs[2] else nothing(x),
    )


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = wide(x) @ wide(weight).t()
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def _reference_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    rows = wide(dy).reshape(-1, weight.shape[0])
    return (
        (rows @ wide(weight)).reshape(x.shape).to(x.dtype) if needs[0] else nothing(x),
        (rows.t() @ wide(x).reshape(-1, weight.shape[1])).to(weight.dtype) if needs[1] else nothing(x),
        rows.sum(0).to(weight.dtype) if needs[2] else nothing(x),
    )


op = Op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "(Tensor dy, Tensor x, Tensor weight, bool[] needs, int grad_dtype=0) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    one_dtype=True,
)
op.register("reference", _reference, _reference_backward)
