"""The sub-layers that ecosystems share: feed-forward, and attention with one projection or three."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse import parts
from vitkernels.fuse.residual import Branch


def called(**linears: nn.Module) -> str | None:
    """Which of these projections must be called as it is, and why; None when all are Linears that may be read."""
    reasons = (parts.obstacle(name, module, nn.Linear) for name, module in linears.items())
    return next((reason for reason in reasons if reason is not None), None)


def dropped(branch: Branch, dropout: nn.Module | None) -> Branch:
    """The branch with a Dropout after it, which is torch's own and draws as ever."""
    if dropout is None or parts.drops_nothing(dropout):
        return branch
    return dataclasses.replace(branch, run=lambda x, split: (dropout(branch.run(x, False)[0]), None))


# ---------------------------------------------------------------------------------------------------- feed-forward


def not_mlp(
    fc1: nn.Module,
    act: nn.Module | Callable[..., Tensor],
    fc2: nn.Module,
    dropout: nn.Module | None = None,
    names: tuple[str, str] = ("fc1", "fc2"),
) -> str | None:
    """Why fc2(dropout(act(fc1(x)))) cannot run with the activation inside the products now, or None when it can."""
    if parts.activation(act) is None:
        return f"the activation is {getattr(act, '__name__', type(act).__name__)}"
    if not parts.drops_nothing(dropout):
        return "a dropout after the activation"
    return called(**dict(zip(names, (fc1, fc2), strict=True)))


def mlp(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module | Callable[..., Tensor],
    fc2: nn.Module,
    dropout: nn.Module | None = None,
    split: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """fc2(dropout(act(fc1(x)))) on `ops.mlp`, or part by part where `not_mlp` says so.

    Returns:
        With `split` (product, fc2's bias or None), else (result, None).
    """
    kind = parts.activation(act)
    if kind is None or not_mlp(fc1, act, fc2, dropout) is not None:
        hidden = act(parts.linear(fc1, x))
        return parts.last_linear(fc2, hidden if dropout is None else dropout(hidden), split)
    bias: Tensor | None = fc2.bias  # type: ignore[assignment]
    out = ops.mlp(
        x,
        fc1.weight,  # type: ignore[arg-type]
        fc1.bias,  # type: ignore[arg-type]
        fc2.weight,  # type: ignore[arg-type]
        None if split else bias,
        activation=kind,
    )
    return out, bias if split else None


def mlp_branch(
    fc1: nn.Module,
    act: nn.Module | Callable[..., Tensor],
    fc2: nn.Module,
    dropout: nn.Module | None = None,
    names: tuple[str, str] = ("fc1", "fc2"),
) -> Branch:
    """`mlp` as the branch of a residual step; `names` are what its block calls the two Linears."""

    def run(x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        return mlp(x, fc1, act, fc2, dropout, split)

    return Branch(run, "mlp", fc1, lambda: not_mlp(fc1, act, fc2, dropout, names), "linear, linear")


# ------------------------------------------------------------------------------------------------------- attention

# what an attention runs, for `explain`: without and with rotary positions
ATTENTION, ROTARY = "linear, attention, linear", "linear, rotary, attention, linear"


def not_packed(**projections: nn.Module) -> str | None:
    """Why three projections cannot run as one product, or None when they can."""
    return called(**projections)


def packed_projection(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Tensor:
    """[q(x), k(x), v(x)] side by side, [B, N, 3 * D]: one product with the three weights joined.

    Joining copies 3 * D * D numbers, which is little beside the product; its backward splits the gradient by views.
    A bias that one of them lacks is 0.
    """
    if not_packed(q=q, k=k, v=v) is not None:
        return torch.cat([parts.linear(each, x) for each in (q, k, v)], dim=-1)
    weight = torch.cat([q.weight, k.weight, v.weight])  # type: ignore[list-item]
    biases = [each.bias for each in (q, k, v)]
    if all(bias is None for bias in biases):
        return ops.linear(x, weight)
    zero = weight.new_zeros(())
    rows = (zero.expand(len(each.weight)) if each.bias is None else each.bias for each in (q, k, v))
    return ops.linear(x, weight, torch.cat(list(rows)))  # type: ignore[arg-type]


def split_heads(packed: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 * D] to q, k and v, each [B, H, N, K]; views."""
    batch, tokens, width = packed.shape
    q, k, v = packed.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(heads: Tensor) -> Tensor:
    """[B, H, N, K] to [B, N, H * K]."""
    return heads.transpose(1, 2).flatten(2)


def rotary(x: Tensor, sin: Tensor, cos: Tensor, *, prefix: int = 0, half: bool = False) -> Tensor:
    """`ops.rotary`, or its formula in plain torch where positions are learned: kernels have no gradients of them."""
    learned = torch.is_grad_enabled() and (sin.requires_grad or cos.requires_grad)
    return (plain_rotary if learned else ops.rotary)(x, sin, cos, prefix=prefix, half=half)


def plain_rotary(x: Tensor, sin: Tensor, cos: Tensor, *, prefix: int = 0, half: bool = False) -> Tensor:
    """The same step by step, each rounded to the dtype that torch promotes to."""
    patches = x[:, :, prefix:]
    if half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).reshape(patches.shape)
    rotated = (patches * cos + turned * sin).to(x.dtype)
    return torch.cat([x[:, :, :prefix], rotated], dim=2) if prefix else rotated
