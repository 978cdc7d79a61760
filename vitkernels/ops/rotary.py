"""rotary: positions as rotations of pairs of numbers in q and k (Su et al. 2021), in one pass over memory.

    out[i] = x[i] * cos[i] - x[j] * sin[i]
    out[j] = x[j] * cos[j] + x[i] * sin[j]

for each pair (i, j) of a head. A sine and a cosine stand for every number, not for every pair, and need not agree
within one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import given, nothing
from vitkernels.ops.attention import _heads_last


@remembered
def rotary(x: Tensor, sin: Tensor, cos: Tensor, *, prefix: int = 0, half: bool = False) -> Tensor:
    """Turn q or k by its tokens' positions.

    Args:
        x: q or k, [B, H, N, K], floating point, any strides; K is even.
        sin, cos: broadcastable to [B, H, N - prefix, K], floating point; usually [N - prefix, K] in float32. Products
            are in the widest dtype of the three, float32 at the least, and rounded once.
        prefix: so many first tokens have no position (class token, registers) and are copied.
        half: pairs are (x[i], x[i + K / 2]); else (x[2 i], x[2 i + 1]).

    Returns:
        [B, H, N, K] in x's dtype, laid out in memory as [B, N, H, K]. Gradients of sin and cos come from the reference
        alone.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes that do not fit, an odd K, a prefix that x does not have, or tensors on different devices.
    """
    prefix = _check.integer(prefix)
    _check_args(x, sin, cos, prefix)
    return op(x, with_four_axes(sin), with_four_axes(cos), prefix, bool(half))


@_check.once
def _check_args(x: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> None:
    name = "rotary"
    _check.is_tensor(name, x=x, sin=sin, cos=cos, optional={})
    _check.is_floating(name, x=x, sin=sin, cos=cos)
    _check.has_rank(name, "x", x, "[B, H, N, K]")
    batch, heads, tokens, width = x.shape
    if not _check.is_integer(prefix) or not 0 <= prefix <= tokens:
        raise ValueError(f"{name}: argument 'prefix' is {prefix!r}; needs an int from 0 to x's {tokens} tokens")
    check_positions(name, "x", sin, cos, (batch, heads, tokens - prefix, width))


def check_positions(op_name: str, name: str, sin: Tensor, cos: Tensor, positions: tuple[int, int, int, int]) -> None:
    """Whether sines and cosines broadcast to [B, H, N - prefix, K], and the argument `name` has pairs."""
    width = positions[3]
    if width == 0 or width % 2:
        raise ValueError(
            f"{op_name}: argument '{name}' has a last axis of {width}; needs an even number, 2 or more, for pairs"
        )
    for tensor_name, tensor in (("sin", sin), ("cos", cos)):
        fits = tensor.dim() <= 4 and all(
            size == 1 or size == wanted  # not `in`: dynamo finds no traced size in a tuple
            for size, wanted in zip(reversed(tensor.shape), reversed(positions), strict=False)
        )
        if not fits:
            raise ValueError(
                f"{op_name}: argument '{tensor_name}' has shape {list(tensor.shape)}; "
                f"needs one that broadcasts to [B, H, N - prefix, K] = {list(positions)}"
            )


def with_four_axes(positions: Tensor) -> Tensor:
    return positions[(None,) * (4 - positions.dim())]


def why_not_fused(direction: str, call: Any) -> str | None:
    """What only the reference serves: gradients of sin and cos, which few models learn."""
    if direction == "backward" and any(call.needs[1:]):
        return "the kernels have no gradients of sin and cos"
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, sin, cos, ctx.prefix, ctx.half = inputs
    ctx.save_for_backward(x if sin.requires_grad or cos.requires_grad else None, sin, cos)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    needs = list(ctx.needs_input_grad[:3])
    grads = op.backward(dout, *ctx.saved_tensors, ctx.prefix, ctx.half, needs)
    return *map(given, needs, grads), None, None


def _fake(x: Tensor, sin: Tensor, cos: Tensor, prefix: int, half: bool) -> Tensor:
    return _heads_last(x)


def _fake_backward(dout, x, sin, cos, prefix, half, needs):
    return (
        _heads_last(dout) if needs[0] else nothing(dout),
        sin.new_empty(sin.shape) if needs[1] else nothing(dout),
        cos.new_empty(cos.shape) if needs[2] else nothing(dout),
    )


def _turned(x: Tensor, half: bool) -> Tensor:
    """(-x[j], x[i]) for each pair (x[i], x[j])."""
    if half:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _computed_in(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _joined(prefix: Tensor, patches: Tensor) -> Tensor:
    """Tokens in the prefix's dtype, laid out as [B, N, H, K]."""
    tokens = torch.cat([prefix, patches.to(prefix.dtype)], dim=2)
    return tokens.transpose(1, 2).contiguous().transpose(1, 2)


def _reference(x, sin, cos, prefix, half):
    dtype = _computed_in(x, sin, cos)
    patches = x[:, :, prefix:].to(dtype)
    return _joined(x[:, :, :prefix], patches * cos.to(dtype) + _turned(patches, half) * sin.to(dtype))


def _reference_backward(dout, x, sin, cos, prefix, half, needs):
    dtype = _computed_in(dout, sin, cos)
    g = dout[:, :, prefix:].to(dtype)
    dx, dsin, dcos = (nothing(dout) for _ in range(3))
    if needs[0]:  # to turn twice is to negate, so minus a turn turns back
        dx = _joined(dout[:, :, :prefix], g * cos.to(dtype) - _turned(g * sin.to(dtype), half))
    if needs[1]:
        dsin = (g * _turned(x[:, :, prefix:].to(dtype), half)).sum_to_size(sin.shape).to(sin.dtype).contiguous()
    if needs[2]:
        dcos = (g * x[:, :, prefix:].to(dtype)).sum_to_size(cos.shape).to(cos.dtype).contiguous()
    return dx, dsin, dcos


op = Op(
    "rotary",
    "(Tensor x, Tensor sin, Tensor cos, int prefix, bool half) -> Tensor",
    "(Tensor dout, Tensor? x, Tensor sin, Tensor cos, int prefix, bool half, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)
