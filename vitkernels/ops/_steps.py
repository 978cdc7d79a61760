"""The steps of a residual stream: a norm, and the products that read it.

Each adds to the stream first, as `ops.add_layer_norm` does, and is one autograd Function (`_step.Step`); the product is
`linear`, `mlp`, `glu_mlp`, or attention between its two projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vitkernels import ops
from vitkernels.op import Op
from vitkernels.ops import _check
from vitkernels.ops._attention_steps import (
    ATTENTION,
    NOTHING_BROUGHT,
    PACKED_ATTENTION,
    ROTARY_ATTENTION,
    Called,
    HeadNorms,
    Images,
    Positions,
    between,
    brought,
)
from vitkernels.ops._plan import Launch
from vitkernels.ops._step import Added, Norm, Step, add_norm
from vitkernels.ops._stretch import Factors, Stage, run
from vitkernels.ops._windows import Windows
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
    "PACKED_ATTENTION",
    "ROTARY_ATTENTION",
    "Added",
    "Called",
    "Factors",
    "HeadNorms",
    "Images",
    "Norm",
    "Positions",
    "Stage",
    "Step",
    "Windows",
    "add_norm",
    "attention",
    "between",
    "brought",
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
    called: Called = NOTHING_BROUGHT,
    *,
    norms: HeadNorms | None = None,
    scale: float | None = None,
    windows: Windows | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, self-attention of its norm): the packed projection, attention, and the projection of the heads.

    Args:
        x, added, norm: as in `linear`; of images laid end to end x is [..., D].
        qkv, proj: weight and bias of the projections, as nn.Linear stores them; [3 * D, D] and [D, D].
        num_heads, scale: as in `ops.attention_qkv`.
        called: what the call brings to the scores.
        norms: of each head's q and k; needed beside positions and images laid end to end.
        windows: within which tokens attend to each other; x is then an image, [B, H, W, D], or its tokens row by row,
            and the mask one of B * per_image batches of tokens.
    """
    step = ATTENTION if norms is None else ROTARY_ATTENTION if called.images is None else PACKED_ATTENTION
    fixed = (*qkv, *proj, _check.integer(num_heads), scale, windows, *(norms or ()))
    return run(x, added, [Stage(step, norm, (*fixed, *brought(step, called)))])


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
