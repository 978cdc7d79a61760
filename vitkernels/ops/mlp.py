"""mlp: the Transformer's feed-forward, y = activation(x w1^T + b1) w2^T + b2.

The activation runs in the first GEMM's epilogue and its derivative, with b1's gradient, in the epilogue of the second
one's backward. Only the pre-activation is saved; the activation is recomputed from it. Vaswani et al. 2017 with GELU
from Hendrycks and Gimpel 2016.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import asked_for, autocast_dtype, nothing, wide

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


@remembered
def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Feed-forward of a Transformer block.

    Args:
        x: [..., D], floating point, any strides.
        w1: [F, D] and b1: [F] or None, the first projection, as nn.Linear stores it.
        w2: [O, F] and b2: [O] or None, the second.
        activation: "gelu" (exact, with erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "relu" or "silu".

    Returns:
        [..., O] in x's dtype (under autocast, autocast's).

    Raises:
        TypeError: an argument that is no floating-point tensor, or mixed dtypes outside autocast.
        ValueError: shapes that do not fit, tensors on different devices, or an unknown activation.
    """
    dtype = autocast_dtype(x)
    check(x, w1, b1, w2, b2, activation, dtype)
    if dtype is not None:
        x, w1, b1, w2, b2 = op.cast(dtype, x, w1, b1, w2, b2)
    # without a gradient to come, the pre-activation need not leave the cache
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, w1, b1, w2, b2))
    y, _ = op(x, w1, b1, w2, b2, activation, save or torch._C._are_functorch_transforms_active())
    return y


@_check.once
def check(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    autocast: torch.dtype | None,
) -> None:
    name = "mlp"
    _check.is_tensor(name, x=x, w1=w1, w2=w2, optional={"b1": b1, "b2": b2})
    _check.is_floating(name, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check.has_rank(name, "x", x, "[D]", at_least=True)
    _check.has_rank(name, "w1", w1, "[F, D]")
    _check.has_rank(name, "w2", w2, "[O, F]")
    _check.has_shape(name, "w1", w1, (w1.shape[0], x.shape[-1]), "x's last axis")
    _check.has_shape(name, "b1", b1, w1.shape[:1], "w1's first axis")
    _check.has_shape(name, "w2", w2, (w2.shape[0], w1.shape[0]), "w1's first axis")
    _check.has_shape(name, "b2", b2, w2.shape[:1], "w2's first axis")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: argument 'activation' is {activation!r}; needs one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    _check.same_dtype(name, autocast, x=x, w1=w1, b1=b1, w2=w2, b2=b2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w1, _, w2, _, ctx.activation, _ = inputs
    _, pre = output
    ctx.save_for_backward(x, w1, pre, w2)
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:5])
    x, w1, pre, w2 = ctx.saved_tensors
    grads = op.backward(dy, x, pre, w1, w2, ctx.activation, needs)
    return *asked_for(needs, grads), None, None


def _fake(x: Tensor, w1: Tensor, b1, w2: Tensor, b2, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(*lead, w2.shape[0]), x.new_empty(*lead, w1.shape[0]) if save else nothing(x)


def _fake_backward(dy, x, pre, w1, w2, activation, needs):
    return (
        x.new_empty(x.shape) if needs[0] else nothing(x),
        w1.new_empty(w1.shape) if needs[1] else nothing(x),
        w1.new_empty(w1.shape[:1]) if needs[2] else nothing(x),
        w2.new_empty(w2.shape) if needs[3] else nothing(x),
        w2.new_empty(w2.shape[:1]) if needs[4] else nothing(x),
    )


def _sigmoid_slope(h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(factor * h)
    return h * gate, gate * (1 + factor * h * (1 - gate))


def activate(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of h and its derivative, in h's dtype."""
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(h * math.sqrt(0.5)))
        return h * cdf, cdf + h * torch.exp(-0.5 * h * h) * math.sqrt(0.5 / math.pi)
    if activation == "gelu_tanh":
        root = math.sqrt(2 / math.pi)
        t = torch.tanh(root * (h + 0.044715 * h**3))
        return 0.5 * h * (1 + t), 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * root * (1 + 3 * 0.044715 * h * h)
    if activation == "quick_gelu":
        return _sigmoid_slope(h, 1.702)
    if activation == "silu":
        return _sigmoid_slope(h, 1.0)
    return h.clamp(min=0), (h > 0).to(h.dtype)


def _reference(x, w1, b1, w2, b2, activation, save):
    h = wide(x) @ wide(w1).t()
    if b1 is not None:
        h = h + wide(b1)
    y = activate(h, activation)[0] @ wide(w2).t()
    if b2 is not None:
        y = y + wide(b2)
    return y.to(x.dtype), h.to(x.dtype) if save else nothing(x)


def _reference_backward(dy, x, pre, w1, w2, activation, needs):
    g, rows = wide(dy).reshape(-1, w2.shape[0]), wide(x).reshape(-1, w1.shape[1])
    activated, slope = activate(wide(pre).reshape(-1, w1.shape[0]), activation)
    dh = g @ wide(w2) * slope
    return (
        (dh @ wide(w1)).reshape(x.shape).to(x.dtype) if needs[0] else nothing(x),
        (dh.t() @ rows).to(w1.dtype) if needs[1] else nothing(x),
        dh.sum(0).to(w1.dtype) if needs[2] else nothing(x),
        (g.t() @ activated).to(w2.dtype) if needs[3] else nothing(x),
        g.sum(0).to(w2.dtype) if needs[4] else nothing(x),
    )


op = Op(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save) -> (Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, str activation, bool[] needs, int grad_dtype=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    one_dtype=True,
)
op.register("reference", _reference, _reference_backward)
