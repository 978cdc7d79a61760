"""rotary_qkv: what stands between a packed projection and attention, in one pass over memory, each way.

    x   = norm(x)                     qk-norm: LayerNorm or RMSNorm over each head of q and of k
    out = x * cos + turned(x) * sin   rotary positions of q and k

and v as it is, so that attention reads the result packed and its gradient comes back packed. Backward makes the norm
again from its input, which takes no more than the row that is at hand. The turn is `rotary`'s (Su et al. 2021), the
norm that of Dehghani et al. 2023 (ViT-22B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.kinds import remembered
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._amp import given, nothing
from vitkernels.ops.rotary import _reference as _turned
from vitkernels.ops.rotary import _reference_backward as _turned_backward
from vitkernels.ops.rotary import check_positions, with_four_axes

NAME = "rotary_qkv"
NORMS = ("layer_norm", "rms_norm")
_NONE = "none"  # in the schema, for no norm


@remembered
def rotary_qkv(
    qkv: Tensor,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    *,
    prefix: int = 0,
    half: bool = False,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise each head of q and k, then turn it by its token's position; v is copied.

    Args:
        qkv: [B, N, P, H, K], or [T, P, H, K] of many sequences in one, floating point, any strides. P is 3 for q, k and
            v, 2 for q and k, 1 for q or k alone, which then is q here.
        sin, cos: as in `rotary`, broadcastable to [B, H, N - prefix, K] ([1, H, T - prefix, K]): [N - prefix, K] for
            all images, or [T, K], a row a token of a packed batch. Rows and columns of patches make no difference:
            2-D positions are such tables too. None for the norm alone.
        prefix: so many first tokens have no position and are only normalised.
        half: pairs are (x[i], x[i + K / 2]); else (x[2 i], x[2 i + 1]).
        norm: "layer_norm" or "rms_norm" over the K elements of each head; None for none.
        q_weight, k_weight: the norms' weights, [K], or None for ones.
        q_bias, k_bias: the LayerNorms' biases, [K], or None.
        eps: added to the variance, or to the mean of squares.

    Returns:
        qkv's shape and dtype, contiguous. It is rounded once, behind the turn.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes that do not fit, tensors on different devices, one of sin and cos alone, an odd K with them,
            positions that ask for a gradient, a prefix that qkv does not have, an unknown norm, or weights and biases
            that it has no use for.
    """
    prefix = _check.integer(prefix)
    _check_args(qkv, sin, cos, prefix, norm, q_weight, q_bias, k_weight, k_bias)
    if sin is not None and cos is not None:
        sin, cos = _fixed("sin", sin), _fixed("cos", cos)
    batched = qkv if qkv.dim() == 5 else qkv[None]
    vectors = q_weight, q_bias, k_weight, k_bias
    out: Tensor = op(batched, sin, cos, prefix, bool(half), norm or _NONE, *vectors, float(eps))
    return out if qkv.dim() == 5 else out[0]


def _fixed(name: str, positions: Tensor) -> Tensor:
    if positions.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{NAME}: argument '{name}' requires a gradient; needs `rotary`, which gives one, or none")
    return with_four_axes(positions)


@_check.once
def _check_args(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    prefix: int,
    norm: str | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
) -> None:
    optional = {"sin": sin, "cos": cos}
    vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    _check.is_tensor(NAME, qkv=qkv, optional=optional | vectors)
    _check.is_floating(NAME, qkv=qkv, **optional, **vectors)
    if qkv.dim() != 4:
        _check.has_rank(NAME, "qkv", qkv, "[B, N, P, H, K]")
    batch, tokens, parts, heads, width = (1, *qkv.shape)[-5:]
    if not 1 <= parts <= 3 or width == 0:
        raise ValueError(
            f"{NAME}: argument 'qkv' has shape {list(qkv.shape)}; needs 1 to 3 of q, k and v, of heads of 1 or more"
        )
    if norm is not None and norm not in NORMS:
        raise ValueError(f"{NAME}: argument 'norm' is {norm!r}; needs one of {', '.join(map(repr, NORMS))}, or None")
    if (sin is None) != (cos is None):
        alone, other = ("cos", "sin") if sin is None else ("sin", "cos")
        raise ValueError(f"{NAME}: argument '{alone}' is given while '{other}' is None; needs both or none")
    if not _check.is_integer(prefix) or not 0 <= prefix <= tokens:
        raise ValueError(f"{NAME}: argument 'prefix' is {prefix!r}; needs an int from 0 to qkv's {tokens} tokens")
    if sin is not None and cos is not None:
        check_positions(NAME, "qkv", sin, cos, (batch, heads, tokens - prefix, width))
    elif norm is None:
        raise ValueError(f"{NAME}: arguments 'sin' and 'norm' are both None; needs one of them")
    for name, vector in vectors.items():
        _check.has_shape(NAME, name, vector, (width,), "qkv's last axis")
        if vector is not None:
            _check_use(name, norm, parts, weights=vectors[f"{name[0]}_weight"] is not None)


def _check_use(name: str, norm: str | None, parts: int, weights: bool) -> None:
    """Whether a norm's vector that is given has something to act on."""
    without = None
    if norm is None:
        without = "'norm' is None; needs a norm"
    elif name.endswith("bias") and norm == "rms_norm":
        without = "'norm' is 'rms_norm', which has none; needs 'layer_norm'"
    elif not weights:
        without = f"'{name[0]}_weight' is None; needs both, or the weight alone"
    elif name.startswith("k") and parts == 1:
        without = "'qkv' has one part; needs q and k"
    if without is not None:
        raise ValueError(f"{NAME}: argument '{name}' is given while {without}")


# ------------------------------------------------------------------------------------------------------------------- op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, sin, cos, ctx.prefix, ctx.half, ctx.norm, q_weight, q_bias, k_weight, k_bias, ctx.eps = inputs
    ctx.save_for_backward(None if ctx.norm == _NONE else qkv, sin, cos, q_weight, k_weight)
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (q_bias, k_bias)]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    qkv, sin, cos, q_weight, k_weight = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:10]]
    grads = op.backward(dout, qkv, sin, cos, ctx.prefix, ctx.half, ctx.norm, q_weight, k_weight, ctx.eps, needs)
    dqkv, dq_weight, dq_bias, dk_weight, dk_bias = map(given, needs, grads)
    dq_bias, dk_bias = (
        bias if bias is None else bias.to(dtype)
        for bias, dtype in zip((dq_bias, dk_bias), ctx.bias_dtypes, strict=True)
    )
    return dqkv, *[None] * 5, dq_weight, dq_bias, dk_weight, dk_bias, None


def _fake(qkv, sin, cos, prefix, half, norm, q_weight, q_bias, k_weight, k_bias, eps):
    return qkv.new_empty(qkv.shape)


def _fake_backward(dout, qkv, sin, cos, prefix, half, norm, q_weight, k_weight, eps, needs):
    """The gradient of a bias has its weight's dtype."""
    like = (dout, q_weight, q_weight, k_weight, k_weight)
    return tuple(each.new_empty(each.shape) if need else nothing(dout) for each, need in zip(like, needs, strict=True))


def computes_in_float64(*tensors: Tensor | None) -> bool:
    """Whether one of them asks for it; all else is computed in float32."""
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)


def _heads(qkv: Tensor, part: int, dtype: torch.dtype) -> Tensor:
    """q or k as [B, H, N, K]."""
    return qkv[:, :, part].transpose(1, 2).to(dtype)


def _normed(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """x without mean and scale, and the factor that made its scale one."""
    if norm == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def _reference(qkv, sin, cos, prefix, half, norm, q_weight, q_bias, k_weight, k_bias, eps):
    wide = computes_in_float64(qkv, sin, cos, q_weight, q_bias, k_weight, k_bias)
    dtype = torch.float64 if wide else torch.float32
    out = qkv.clone(memory_format=torch.contiguous_format)
    for part, (weight, bias) in enumerate(((q_weight, q_bias), (k_weight, k_bias))[: qkv.shape[2]]):
        x = _heads(qkv, part, dtype)
        if norm != _NONE:
            x, _ = _normed(x, norm, eps)
            x = x if weight is None else x * weight.to(dtype)
            x = x if bias is None else x + bias.to(dtype)
        out[:, :, part] = (x if sin is None else _turned(x, sin, cos, prefix, half)).transpose(1, 2)
    return out


def _reference_backward(dout, qkv, sin, cos, prefix, half, norm, q_weight, k_weight, eps, needs):
    dtype = torch.float64 if computes_in_float64(dout, sin, cos, q_weight, k_weight) else torch.float32
    grads = _fake_backward(dout, qkv, sin, cos, prefix, half, norm, q_weight, k_weight, eps, needs)
    if needs[0]:
        grads[0].copy_(dout)
    for part, weight in enumerate((q_weight, k_weight)[: dout.shape[2]]):
        g = _heads(dout, part, dtype)
        if sin is not None:
            g, _, _ = _turned_backward(g, None, sin, cos, prefix, half, [True, False, False])
        if norm != _NONE:
            xhat, rstd = _normed(_heads(qkv, part, dtype), norm, eps)
            for index, term in ((1, g * xhat), (2, g)):
                if needs[2 * part + index]:
                    grads[2 * part + index].copy_(term.sum((0, 1, 2)))
            g = g if weight is None else g * weight.to(dtype)
            centre = g.mean(-1, keepdim=True) if norm == "layer_norm" else 0
            g = (g - centre - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
        if needs[0]:
            grads[0][:, :, part] = g.transpose(1, 2)
    return grads


op = Op(
    NAME,
    "(Tensor qkv, Tensor? sin, Tensor? cos, int prefix, bool half, str norm, Tensor? q_weight, Tensor? q_bias, "
    "Tensor? k_weight, Tensor? k_bias, float eps) -> Tensor",
    "(Tensor dout, Tensor? qkv, Tensor? sin, Tensor? cos, int prefix, bool half, str norm, Tensor? q_weight, "
    "Tensor? k_weight, float eps, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
)
op.register("reference", _reference, _reference_backward)
