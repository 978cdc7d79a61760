"""glu_mlp: the gated feed-forward, y = (activation(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down.

Both projections are one product, and the gate runs in its epilogue; the gate's derivative, with the gradient of the
first biases, runs in the epilogue of the second product's backward. The two pre-activations alone are saved; what is
gated is computed again from them. Shazeer 2020: SwiGLU with "silu", GEGLU with "gelu".

The torch op takes the projections packed, or apart: `w_up` and `b_up` are then there, and `w_gate_up` and `b_gate_up`
are the gate's alone. The pre-activations lie side by side either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import asked_for, autocast_dtype, nothing, wide
from vitkernels.ops.mlp import ACTIVATIONS, activate

Pair = tuple[Tensor, Tensor]
Biases = tuple[Tensor | None, Tensor | None]


@remembered
def glu_mlp(
    x: Tensor,
    w_gate_up: Tensor | Pair,
    b_gate_up: Tensor | Biases | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "silu",
) -> Tensor:
    """Gated feed-forward of a Transformer block.

    Args:
        x: [..., D], floating point, any strides.
        w_gate_up: [2 * F, D], the gate's projection and below it the other one; or both apart, ([F, D], [F, D]). On a
            CPU they are read where they lie.
        b_gate_up: [2 * F], or ([F] or None, [F] or None), or None.
        w_down: [O, F] and b_down: [O] or None, the projection of what is gated.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "quick_gelu" or "relu" (ReGLU).

    Returns:
        [..., O] in x's dtype (under autocast, autocast's).

    Raises:
        TypeError: an argument that is no floating-point tensor, or mixed dtypes outside autocast.
        ValueError: shapes that do not fit, tensors on different devices, or an unknown activation.
    """
    dtype = autocast_dtype(x)
    tensors = [x, *_apart(w_gate_up, b_gate_up), w_down, b_down]
    check(*tensors, activation, dtype)
    if dtype is not None:
        tensors = op.cast(dtype, *tensors)
    # without a gradient to come, the pre-activations need not leave the cache
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    y, _ = op(*tensors, activation, save or torch._C._are_functorch_transforms_active())
    return y


def _apart(weight: Any, bias: Any) -> tuple[Any, Any, Any, Any]:
    """w_gate_up, b_gate_up, w_up and b_up of the torch op: biases lie as the weights do."""
    both_biases = isinstance(bias, tuple | list)
    if both_biases:
        _check.is_pair("glu_mlp", "b_gate_up", bias, optional=True)
    if not isinstance(weight, tuple | list):
        return weight, _joined(bias) if both_biases else bias, None, None
    _check.is_pair("glu_mlp", "w_gate_up", weight)
    gate, up = weight
    if not both_biases:
        bias = _halves(bias, len(gate)) if isinstance(bias, Tensor) else (bias, None)
    return gate, bias[0], up, bias[1]


def _joined(biases: Biases) -> Tensor | None:
    """Two biases as one, of which one that is missing is 0."""
    there = next((each for each in biases if each is not None), None)
    return None if there is None else torch.cat([torch.zeros_like(there) if b is None else b for b in biases])


def _halves(bias: Tensor, width: int) -> Biases:
    if tuple(bias.shape) != (2 * width,):
        told = f"has shape {list(bias.shape)}; needs {[2 * width]} (the first axes of w_gate_up)"
        raise _check.refused(ValueError, f"glu_mlp: argument 'b_gate_up' {told}")
    return bias[:width], bias[width:]


@_check.once
def check(
    x: Tensor,
    w_gate_up: Tensor,
    b_gate_up: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    autocast: torch.dtype | None,
) -> None:
    name = "glu_mlp"
    optional = {"w_gate_up[1]": w_up, "b_gate_up": b_gate_up, "b_gate_up[1]": b_up, "b_down": b_down}
    _check.is_tensor(name, x=x, w_gate_up=w_gate_up, w_down=w_down, optional=optional)
    _check.is_floating(name, x=x, w_gate_up=w_gate_up, w_down=w_down, **optional)
    _check.has_rank(name, "x", x, "[D]", at_least=True)
    _check.has_rank(name, "w_gate_up", w_gate_up, "[2 * F, D]" if w_up is None else "[F, D]")
    _check.has_rank(name, "w_down", w_down, "[O, F]")
    _check.has_shape(name, "w_gate_up", w_gate_up, (w_gate_up.shape[0], x.shape[-1]), "x's last axis")
    _check.has_shape(name, "w_gate_up[1]", w_up, w_gate_up.shape, "the gate's shape")
    if w_up is None and w_gate_up.shape[0] % 2:
        raise ValueError(
            f"{name}: argument 'w_gate_up' has a first axis of {w_gate_up.shape[0]}; needs 2 * F, an even number"
        )
    hidden, what = (w_gate_up.shape[0] // 2, "half of ") if w_up is None else (w_gate_up.shape[0], "")
    _check.has_shape(name, "b_gate_up", b_gate_up, w_gate_up.shape[:1], "w_gate_up's first axis")
    _check.has_shape(name, "b_gate_up[1]", b_up, w_gate_up.shape[:1], "w_gate_up's first axis")
    _check.has_shape(name, "w_down", w_down, (w_down.shape[0], hidden), f"{what}w_gate_up's first axis")
    _check.has_shape(name, "b_down", b_down, w_down.shape[:1], "w_down's first axis")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: argument 'activation' is {activation!r}; needs one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    _check.same_dtype(name, autocast, x=x, w_gate_up=w_gate_up, w_down=w_down, **optional)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w_gate_up, _, w_up, _, w_down, _, ctx.activation, _ = inputs
    _, pre = output
    ctx.save_for_backward(x, pre, w_gate_up, w_up, w_down)
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:7])
    grads = op.backward(dy, *ctx.saved_tensors, ctx.activation, needs)
    return *asked_for(needs, grads), None, None


def _fake(x: Tensor, w_gate_up, b_gate_up, w_up, b_up, w_down: Tensor, b_down, activation: str, save: bool):
    lead, (outer, hidden) = x.shape[:-1], w_down.shape
    return x.new_empty(*lead, outer), x.new_empty(*lead, 2 * hidden) if save else nothing(x)


def _fake_backward(dy, x, pre, w_gate_up, w_up, w_down, activation, needs):
    def like(weight: Tensor, needs_weight: bool, needs_bias: bool) -> tuple[Tensor, Tensor]:
        return (
            weight.new_empty(weight.shape) if needs_weight else nothing(x),
            weight.new_empty(weight.shape[:1]) if needs_bias else nothing(x),
        )

    dx = x.new_empty(x.shape) if needs[0] else nothing(x)
    return dx, *like(w_gate_up, *needs[1:3]), *like(w_up, *needs[3:5]), *like(w_down, *needs[5:])


def joined(w_gate_up: Tensor, w_up: Tensor | None) -> Tensor:
    """Gate and up as one weight, [2 * F, D], for kernels that read one: a copy where they are apart."""
    return w_gate_up if w_up is None else torch.cat([w_gate_up, w_up])


def joined_bias(b_gate_up: Tensor | None, w_up: Tensor | None, b_up: Tensor | None) -> Tensor | None:
    """The same of the biases, [2 * F]."""
    return b_gate_up if w_up is None else _joined((b_gate_up, b_up))


def _reference(x, w_gate_up, b_gate_up, w_up, b_up, w_down, b_down, activation, save):
    pre = wide(x) @ wide(joined(w_gate_up, w_up)).t()
    bias = joined_bias(b_gate_up, w_up, b_up)
    if bias is not None:
        pre = pre + wide(bias)
    gate, up = pre.chunk(2, dim=-1)
    y = (activate(gate, activation)[0] * up) @ wide(w_down).t()
    if b_down is not None:
        y = y + wide(b_down)
    return y.to(x.dtype), pre.to(x.dtype) if save else nothing(x)


def _reference_backward(dy, x, pre, w_gate_up, w_up, w_down, activation, needs):
    (outer, hidden), inner = w_down.shape, x.shape[-1]
    g, rows = wide(dy).reshape(-1, outer), wide(x).reshape(-1, inner)
    gate, up = wide(pre).reshape(-1, 2 * hidden).chunk(2, dim=-1)
    activated, slope = activate(gate, activation)
    dgated = g @ wide(w_down)
    dgate, dup = dgated * up * slope, dgated * activated
    dpre = torch.cat([dgate, dup], dim=-1)
    first = dpre if w_up is None else dgate
    return (
        (dpre @ wide(joined(w_gate_up, w_up))).reshape(x.shape).to(x.dtype) if needs[0] else nothing(x),
        (first.t() @ rows).to(w_gate_up.dtype) if needs[1] else nothing(x),
        first.sum(0).to(w_gate_up.dtype) if needs[2] else nothing(x),
        (dup.t() @ rows).to(w_up.dtype) if needs[3] else nothing(x),
        dup.sum(0).to(w_up.dtype) if needs[4] else nothing(x),
        (g.t() @ (activated * up)).to(w_down.dtype) if needs[5] else nothing(x),
        g.sum(0).to(w_down.dtype) if needs[6] else nothing(x),
    )


op = Op(
    "glu_mlp",
    "(Tensor x, Tensor w_gate_up, Tensor? b_gate_up, Tensor? w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, "
    "str activation, bool save) -> (Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor pre, Tensor w_gate_up, Tensor? w_up, Tensor w_down, str activation, "
    "bool[] needs, int grad_dtype=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    one_dtype=True,
)
op.register("reference", _reference, _reference_backward)
