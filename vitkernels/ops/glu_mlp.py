"""glu_mlp: the gated feed-forward, y = (activation(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down.

Both projections are one product, and the gate runs in its epilogue; the gate's derivative, with the gradient of the
first biases, runs in the epilogue of the second product's backward. The two pre-activations alone are saved; what is
gated is computed again from them. Shazeer 2020: SwiGLU with "silu", GEGLU with "gelu".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import autocast_dtype, cast, given, nothing, wide
from vitkernels.ops.mlp import ACTIVATIONS, activate

Pair = tuple[Tensor, Tensor]


def glu_mlp(
    x: Tensor,
    w_gate_up: Tensor | Pair,
    b_gate_up: Tensor | Pair | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "silu",
) -> Tensor:
    """Gated feed-forward of a Transformer block.

    Args:
        x: [..., D], floating point, any strides.
        w_gate_up: [2 * F, D], the gate's projection and below it the other one; or both apart, ([F, D], [F, D]), which
            are copied side by side: little beside the product.
        b_gate_up: [2 * F], or ([F], [F]), or None.
        w_down: [O, F] and b_down: [O] or None, the projection of what is gated.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "quick_gelu" or "relu" (ReGLU).

    Returns:
        [..., O] in x's dtype (under autocast, autocast's).

    Raises:
        TypeError: an argument that is no floating-point tensor, or mixed dtypes outside autocast.
        ValueError: shapes that do not fit, tensors on different devices, or an unknown activation.
    """
    weight, bias = _packed("w_gate_up", w_gate_up), _packed("b_gate_up", b_gate_up)
    dtype = autocast_dtype(x)
    check(x, weight, bias, w_down, b_down, activation, dtype)
    tensors = [x, weight, bias, w_down, b_down]
    if dtype is not None:
        tensors = cast(dtype, *tensors)
    # without a gradient to come, the pre-activations need not leave the cache
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    y, _ = op(*tensors, activation, save or torch._C._are_functorch_transforms_active())
    return y


def _packed(name: str, value: Any) -> Any:
    """Two tensors as one, the second below the first; anything else as it is."""
    if not isinstance(value, tuple | list):
        return value
    _check.is_pair("glu_mlp", name, value)
    return torch.cat(tuple(value))


@_check.once
def check(
    x: Tensor,
    w_gate_up: Tensor,
    b_gate_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    autocast: torch.dtype | None,
) -> None:
    name = "glu_mlp"
    biases = {"b_gate_up": b_gate_up, "b_down": b_down}
    _check.is_tensor(name, x=x, w_gate_up=w_gate_up, w_down=w_down, optional=biases)
    _check.is_floating(name, x=x, w_gate_up=w_gate_up, w_down=w_down, **biases)
    _check.has_rank(name, "x", x, "[D]", at_least=True)
    _check.has_rank(name, "w_gate_up", w_gate_up, "[2 * F, D]")
    _check.has_rank(name, "w_down", w_down, "[O, F]")
    _check.has_shape(name, "w_gate_up", w_gate_up, (w_gate_up.shape[0], x.shape[-1]), "x's last axis")
    if w_gate_up.shape[0] % 2:
        raise ValueError(
            f"{name}: argument 'w_gate_up' has a first axis of {w_gate_up.shape[0]}; needs 2 * F, an even number"
        )
    _check.has_shape(name, "b_gate_up", b_gate_up, w_gate_up.shape[:1], "w_gate_up's first axis")
    _check.has_shape(
        name, "w_down", w_down, (w_down.shape[0], w_gate_up.shape[0] // 2), "half of w_gate_up's first axis"
    )
    _check.has_shape(name, "b_down", b_down, w_down.shape[:1], "w_down's first axis")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: argument 'activation' is {activation!r}; needs one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    _check.same_dtype(name, autocast, x=x, w_gate_up=w_gate_up, w_down=w_down, **biases)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w_gate_up, _, w_down, _, ctx.activation, _ = inputs
    _, pre = output
    ctx.save_for_backward(x, w_gate_up, pre, w_down)
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:5])
    x, w_gate_up, pre, w_down = ctx.saved_tensors
    grads = op.backward(dy, x, pre, w_gate_up, w_down, ctx.activation, needs)
    return *(given(need, grad) for need, grad in zip(needs, grads, strict=True)), None, None


def _fake(x: Tensor, w_gate_up: Tensor, b_gate_up, w_down: Tensor, b_down, activation: str, save: bool):
    lead = x.shape[:-1]
    return x.new_empty(*lead, w_down.shape[0]), x.new_empty(*lead, w_gate_up.shape[0]) if save else nothing(x)


def _fake_backward(dy, x, pre, w_gate_up, w_down, activation, needs):
    return (
        x.new_empty(x.shape) if needs[0] else nothing(x),
        w_gate_up.new_empty(w_gate_up.shape) if needs[1] else nothing(x),
        w_gate_up.new_empty(w_gate_up.shape[:1]) if needs[2] else nothing(x),
        w_down.new_empty(w_down.shape) if needs[3] else nothing(x),
        w_down.new_empty(w_down.shape[:1]) if needs[4] else nothing(x),
    )


def _reference(x, w_gate_up, b_gate_up, w_down, b_down, activation, save):
    pre = wide(x) @ wide(w_gate_up).t()
    if b_gate_up is not None:
        pre = pre + wide(b_gate_up)
    gate, up = pre.chunk(2, dim=-1)
    y = (activate(gate, activation)[0] * up) @ wide(w_down).t()
    if b_down is not None:
        y = y + wide(b_down)
    return y.to(x.dtype), pre.to(x.dtype) if save else nothing(x)


def _reference_backward(dy, x, pre, w_gate_up, w_down, activation, needs):
    g, rows = wide(dy).reshape(-1, w_down.shape[0]), wide(x).reshape(-1, w_gate_up.shape[1])
    gate, up = wide(pre).reshape(-1, w_gate_up.shape[0]).chunk(2, dim=-1)
    activated, slope = activate(gate, activation)
    dgated = g @ wide(w_down)
    dpre = torch.cat([dgated * up * slope, dgated * activated], dim=-1)
    return (
        (dpre @ wide(w_gate_up)).reshape(x.shape).to(x.dtype) if needs[0] else nothing(x),
        (dpre.t() @ rows).to(w_gate_up.dtype) if needs[1] else nothing(x),
        dpre.sum(0).to(w_gate_up.dtype) if needs[2] else nothing(x),
        (g.t() @ (activated * up)).to(w_down.dtype) if needs[3] else nothing(x),
        g.sum(0).to(w_down.dtype) if needs[4] else nothing(x),
    )


op = Op(
    "glu_mlp",
    "(Tensor x, Tensor w_gate_up, Tensor? b_gate_up, Tensor w_down, Tensor? b_down, str activation, bool save) "
    "-> (Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor pre, Tensor w_gate_up, Tensor w_down, str activation, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    one_dtype=True,
)
op.register("reference", _reference, _reference_backward)
