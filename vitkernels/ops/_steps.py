"""The steps of a residual stream: a norm, and the products that read it.

Each adds to the stream first, as `ops.add_layer_norm` does, and is one autograd Function (`_step.Step`); the product is
`linear`, `mlp`, `glu_mlp`, or attention between its two projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._plan import Launch
from vitkernels.ops._step import Added, Norm, Step, add_norm
from vitkernels.ops._stretch import Factors, Stage, run
from vitkernels.ops._windows import Windows
from vitkernels.ops.attention import check_packed, op_qkv, packed_options
from vitkernels.ops.glu_mlp import check as check_glu_mlp
from vitkernels.ops.glu_mlp import op as op_glu_mlp
from vitkernels.ops.linear import check as check_linear
from vitkernels.ops.linear import op as op_linear
from vitkernels.ops.mlp import check as check_mlp
from vitkernels.ops.mlp import op as op_mlp

__all__ = [
    "ATTENTION",
    "GLU_MLP",
    "LINEAR",
    "MLP",
    "Added",
    "Factors",
    "Norm",
    "Stage",
    "Step",
    "Windows",
    "add_norm",
    "attention",
    "glu_mlp",
    "linear",
    "mlp",
    "run",
]


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
    return run(x, added, [Stage(LINEAR, norm, (weight, bias))])


def mlp(
    x: Tensor,
    added: Added | None,
    norm: Norm,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(total, `ops.mlp` of its norm); arguments as in `linear`, weights and activation as in `ops.mlp`."""
    return run(x, added, [Stage(MLP, norm, (*weights, activation))])


def glu_mlp(
    x: Tensor,
    added: Added | None,
    norm: Norm,
    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(total, `ops.glu_mlp` of its norm); arguments as in `mlp`, weights as its torch op has them."""
    return run(x, added, [Stage(GLU_MLP, norm, (*weights, activation))])


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
    windows: Windows | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, self-attention of its norm): the packed projection, `ops.attention_qkv` and the projection of the heads.

    Args:
        x, added, norm: as in `linear`.
        qkv, proj: weight and bias of the projections, as nn.Linear stores them; [3 * D, D] and [D, D].
        num_heads, attn_mask, is_causal, scale: as in `ops.attention_qkv`.
        windows: within which tokens attend to each other; x is then an image, [B, H, W, D], or its tokens row by row,
            and the mask one of B * per_image batches of tokens.
    """
    arguments = (*qkv, *proj, _check.integer(num_heads), attn_mask, is_causal, scale, windows)
    return run(x, added, [Stage(ATTENTION, norm, arguments)])


def _given(needs: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that are needed."""
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


# --------------------------------------------------------------------------------------------------------- linear


def _linear(
    launch: Launch, normed: Tensor, learns: bool, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return launch("linear", op_linear, normed, weight, bias), ()


def _linear_backward(launch, dy, normed, needs, arguments, kept, grad_dtype):
    dx, *grads = launch("linear", op_linear, dy, normed, arguments[0], list(needs), grad_dtype)
    return dx if needs[0] else None, *_given(needs[1:], grads)


LINEAR = Step("linear", check_linear, ops.linear, _linear, _linear_backward, (0,), (1,), keeps=0, op=op_linear)


# --------------------------------------------------------------------------------------------------- feed-forward


def _feed_forward(name: str, op: Op, check: Callable[..., None], by_ops: Callable[..., Tensor], first: int) -> Step:
    """The step of `mlp` or of `glu_mlp`: so many weights of the first product, one of the second, each with a bias."""

    def forward(launch: Launch, normed: Tensor, learns: bool, *arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, pre = launch(name, op, normed, *arguments, learns)
        return y, (pre,)

    def backward(launch, dy, normed, needs, arguments, kept, grad_dtype):
        *tensors, activation = arguments
        weights = tensors[::2]
        dx, *grads = launch(name, op, dy, normed, *kept, *weights, activation, list(needs[:-1]), grad_dtype)
        return dx if needs[0] else None, *_given(needs[1:-1], grads), None

    weights = tuple(range(0, 2 * (first + 1), 2))
    biases = tuple(weight + 1 for weight in weights)
    return Step(name, check, by_ops, forward, backward, weights, biases, keeps=1, op=op, beside_norm=weights[:first])


def _mlp_ops(normed: Tensor, *arguments: Any) -> Tensor:
    *weights, activation = arguments
    return ops.mlp(normed, *weights, activation=activation)


def _glu_mlp_ops(normed: Tensor, *arguments: Any) -> Tensor:
    weight, bias, w_up, b_up, w_down, b_down, activation = arguments
    if w_up is not None:
        weight, bias = (weight, w_up), (bias, b_up)
    return ops.glu_mlp(normed, weight, bias, w_down, b_down, activation=activation)


MLP = _feed_forward("mlp", op_mlp, check_mlp, _mlp_ops, first=1)
GLU_MLP = _feed_forward("glu_mlp", op_glu_mlp, check_glu_mlp, _glu_mlp_ops, first=2)


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
    windows: Windows | None,
    dtype: torch.dtype | None,
) -> None:
    if windows is None:
        _check.has_rank("attention", "x", x, "[B, N, D]")
        batches = x.shape[:2]
    else:
        windows.check(x)
        batches = torch.Size([x.shape[0] * windows.per_image, windows.tokens])
    check_linear(x, qkv_weight, qkv_bias, dtype)
    packed = x.new_empty(1).expand(*batches, qkv_weight.shape[0])  # as the projection will be
    check_packed(packed, num_heads, attn_mask, is_causal)
    check_linear(packed[..., : qkv_weight.shape[0] // 3], proj_weight, proj_bias, dtype)


def _attention_ops(normed: Tensor, *arguments: Any) -> Tensor:
    qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, mask, is_causal, scale, windows = arguments
    tokens = normed if windows is None else windows.made(normed)
    qkv = ops.linear(tokens, qkv_weight, qkv_bias)
    heads = ops.attention_qkv(qkv, num_heads, attn_mask=mask, is_causal=is_causal, scale=scale)
    out = ops.linear(heads, proj_weight, proj_bias)
    return out if windows is None else windows.undone(out, torch.Size([*normed.shape[:-1], out.shape[-1]]))


def _attention(launch: Launch, normed: Tensor, learns: bool, *arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, mask, is_causal, scale, windows = arguments
    tokens = normed if windows is None else windows.made(normed)
    qkv = launch("qkv", op_linear, tokens, qkv_weight, qkv_bias)
    options = packed_options(qkv, num_heads, mask, is_causal, scale)
    heads, *statistics = launch("attention", op_qkv, qkv, *options)
    # the projection takes each token by itself: windows may be undone before it as well
    rows = heads if windows is None else windows.undone(heads, torch.Size([*normed.shape[:-1], heads.shape[-1]]))
    out = launch("proj", op_linear, rows, proj_weight, proj_bias)
    return out, (qkv, heads, *statistics)


def _attention_backward(launch, dy, normed, needs, arguments, kept, grad_dtype):
    qkv_weight, _, proj_weight, _, num_heads, mask, is_causal, scale, windows = arguments
    qkv, heads, *statistics = kept
    if windows is not None:  # the same products, of rows in another order
        shape = normed.shape
        dy, normed = windows.made(dy), windows.made(normed)
    inner = needs[0] or needs[1] or needs[2] or needs[6]
    dheads, *proj = launch("proj", op_linear, dy, heads, proj_weight, [inner, *needs[3:5]], grad_dtype)
    grads: list[Tensor | None] = [None] * 10
    grads[3:5] = _given(needs[3:5], proj)
    if inner:
        options = packed_options(qkv, num_heads, mask, is_causal, scale)
        dqkv, dmask = launch("attention", op_qkv, dheads, qkv, heads, *statistics, *options, needs[6])
        if any(needs[:3]):  # else the mask alone learns
            dx, *packed = launch("qkv", op_linear, dqkv, normed, qkv_weight, list(needs[:3]), grad_dtype)
            if needs[0]:
                grads[0] = dx if windows is None else windows.undone(dx, shape)
            grads[1:3] = _given(needs[1:3], packed)
        grads[6] = dmask.reshape(mask.shape) if needs[6] else None
    return grads


ATTENTION = Step(
    "attention", _check_attention, _attention_ops, _attention, _attention_backward, (0, 2), (1, 3), 3, op_linear
)
