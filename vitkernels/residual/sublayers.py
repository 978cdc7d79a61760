"""The sub-layers that ecosystems share: feed-forward, and attention with one projection or three."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.ops import _check, _steps
from vitkernels.ops._steps import Added, Called, HeadNorms, Norm, Windows
from vitkernels.residual import parts
from vitkernels.residual.kept import key_of
from vitkernels.residual.plain_step import PlainStep
from vitkernels.residual.stream import Branch, Step


def why_not_linears(**linears: nn.Module) -> str | None:
    """Which of these projections must be called as it is, and why; None when all are Linears that may be read."""
    reasons = (parts.why_not_part(name, module, nn.Linear) for name, module in linears.items())
    return next((reason for reason in reasons if reason is not None), None)


def dropped(branch: Branch, dropout: nn.Module | None) -> Branch:
    """The branch with a Dropout after it, which is torch's own and draws as ever."""
    return branch if dropout is None or parts.drops_nothing(dropout) else followed(branch, dropout)


def followed(branch: Branch, after: Callable[[Tensor], Tensor]) -> Branch:
    """The branch with another module, or function of its result, after it."""
    inner = branch.step

    def step(x: Tensor, added: Added | None, norm: Norm, bias_apart: bool) -> tuple[Tensor, Tensor, None]:
        total, out, _ = inner(x, added, norm, False)  # type: ignore[misc]
        return total, after(out), None

    return dataclasses.replace(
        branch,
        run=lambda x, bias_apart: (after(branch.run(x, False)[0]), None),
        step=None if inner is None else step,
    )


# ---------------------------------------------------------------------------------------------------------- steps


Projection = Callable[[], tuple[Tensor, Tensor | None]]  # its weight and bias


def linear_step(packed: Projection, rest: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]) -> Step:
    """A branch that begins with a projection: `rest` takes its result and `bias_apart`."""

    def step(x: Tensor, added: Added | None, norm: Norm, bias_apart: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        total, projected = _steps.linear(x, added, norm, *packed())
        return total, *rest(projected, bias_apart)

    return step


def attention_step(
    qkv: Projection,
    proj: nn.Module,
    num_heads: int,
    *,
    attn_mask: Tensor | Callable[[], Tensor] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    windows: Windows | None = None,
    norms: Callable[[], HeadNorms] | None = None,
    call: Callable[..., Called] | None = None,
    options: Mapping[str, Any] | None = None,
    is_made: bool = False,
    is_packed: bool = False,
) -> Step:
    """Self-attention with a packed projection of q, k and v; proj is a Linear that may be read.

    A mask that parameters make is asked for at each call: what is read off a block is kept for the next one.

    Args:
        qkv: gives weight and bias of the projection.
        proj: the projection of the heads.
        num_heads, attn_mask, is_causal, scale, windows: as in `ops._steps.attention`.
        norms: gives the norms of each head's q and k; needed beside positions and images laid end to end.
        call: (**options) -> what the call brings, in place of attn_mask and is_causal.
        options: the call's.
        is_made: whether `call` makes something of parameters, and must be asked at each call.
        is_packed: whether calls are of images laid end to end.
    """
    heads = _check.integer(num_heads)
    if call is not None and not is_made and type(key_of(options or {})) is tuple:  # there are no tensors among them
        attn_mask, is_causal, *_ = call(**(options or {}))
        call = None
    _check.is_flag("attention", "is_causal", is_causal)
    if isinstance(scale, Tensor):
        _check.scale("attention", scale, None)  # refused now: read off a block, it would stay what it is
    step = _steps.ATTENTION if norms is None else _steps.PACKED_ATTENTION if is_packed else _steps.ROTARY_ATTENTION

    def arguments(bias_apart: bool) -> tuple[Any, ...]:
        bias = None if bias_apart else proj.bias
        fixed = (*qkv(), proj.weight, bias, heads, scale, windows, *(() if norms is None else norms()))
        if call is not None:
            return fixed
        mask = attn_mask() if callable(attn_mask) else attn_mask
        return (*fixed, *_steps.brought(step, Called(mask, is_causal)))

    def of_call(**options: Any) -> tuple[Any, ...]:
        assert call is not None
        called = call(**options)
        _check.is_flag("attention", "is_causal", called.is_causal)
        return _steps.brought(step, called)

    late = None if call is None else of_call
    holds_call = attn_mask is not None or windows is not None
    return PlainStep(step, arguments, lambda: proj.bias, late, options, holds_call)  # type: ignore[arg-type,return-value]


def read_head_norms(
    q_norm: nn.Module | None, k_norm: nn.Module | None, proj: nn.Module, half: bool = False
) -> HeadNorms | None:
    """Norms of each head's q and k as `ops.rotary_qkv` takes them; None where it cannot stand for both.

    Args:
        q_norm, k_norm: the modules; None or Identities for none.
        proj: the attention's last projection: norms of another dtype than its weight round on their own.
        half: how positions pair the elements of a head.
    """
    if parts.is_identity(q_norm) and parts.is_identity(k_norm):
        return HeadNorms(half)
    norms = [each for each in (q_norm, k_norm) if each is not None]
    if len(norms) < 2 or any(parts.why_not_layer_norm("", each) is not None for each in norms):
        return None
    q, k = (parts.read_norm(each) for each in norms)
    tensors = [each for each in (q.weight, q.bias, k.weight, k.bias) if each is not None]
    shared = (q.rms, q.eps) == (k.rms, k.eps) and q.weight.shape == k.weight.shape  # type: ignore[union-attr]
    weight = getattr(proj, "weight", None)  # a wrapper may have none
    if not shared or weight is None or any(each.dtype != weight.dtype for each in tensors):
        return None
    return HeadNorms(half, "rms_norm" if q.rms else "layer_norm", q.weight, q.bias, k.weight, k.bias, q.eps)


# ---------------------------------------------------------------------------------------------------- feed-forward


def why_not_mlp(
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
    return why_not_linears(**dict(zip(names, (fc1, fc2), strict=True)))


def mlp(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module | Callable[..., Tensor],
    fc2: nn.Module,
    dropout: nn.Module | None = None,
    bias_apart: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """fc2(dropout(act(fc1(x)))) on `ops.mlp`, or part by part where `why_not_mlp` says so.

    Returns:
        With `bias_apart` (product, fc2's bias or None), else (result, None).
    """
    kind = parts.activation(act)
    if kind is None or why_not_mlp(fc1, act, fc2, dropout) is not None:
        hidden = act(parts.linear(fc1, x))
        return parts.last_linear(fc2, hidden if dropout is None else dropout(hidden), bias_apart)
    bias: Tensor | None = fc2.bias  # type: ignore[assignment]
    out = ops.mlp(
        x,
        fc1.weight,  # type: ignore[arg-type]
        fc1.bias,  # type: ignore[arg-type]
        fc2.weight,  # type: ignore[arg-type]
        None if bias_apart else bias,
        activation=kind,
    )
    return out, bias if bias_apart else None


def mlp_branch(
    fc1: nn.Module,
    act: nn.Module | Callable[..., Tensor],
    fc2: nn.Module,
    dropout: nn.Module | None = None,
    names: tuple[str, str] = ("fc1", "fc2"),
) -> Branch:
    """`mlp` as the branch of a residual step; `names` are what its block calls the two Linears."""

    def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        return mlp(x, fc1, act, fc2, dropout, bias_apart)

    def arguments(bias_apart: bool) -> tuple[Any, ...]:
        return fc1.weight, fc1.bias, fc2.weight, None if bias_apart else fc2.bias, kind or ""

    kind, why_not = parts.activation(act), why_not_mlp(fc1, act, fc2, dropout, names)
    step = PlainStep(_steps.MLP, arguments, lambda: fc2.bias)  # type: ignore[arg-type,return-value]
    return Branch(run, "mlp", fc1, why_not, "linear, linear", step if why_not is None else None)


def gated_branch(
    first: dict[str, nn.Module],
    gate: Callable[[Tensor], Tensor],
    last: dict[str, nn.Module],
    dropout: nn.Module | None = None,
    act: nn.Module | Callable[..., Tensor] | None = None,
    gate_last: bool = False,
) -> Branch:
    """last(dropout(gate(first(x)))): SwiGLU and its relatives (Shazeer 2020).

    Args:
        first: one Linear, or two whose results stand side by side, by the names that their block has for them.
        gate: from those results, [B, N, 2 * F], to [B, N, F], by torch.
        last: the Linear behind it, by its name.
        dropout: between gate and last.
        act: the activation, where `gate` is act(one half) * the other half and nothing else: `ops.glu_mlp` then runs
            it inside the products, if it knows the activation.
        gate_last: whether the activation is of the second half.
    """
    linears, (output,) = tuple(first.values()), last.values()
    kind = None if act is None or not parts.drops_nothing(dropout) else parts.activation(act)

    def finish(both: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        hidden = gate(both)
        return parts.last_linear(output, hidden if dropout is None else dropout(hidden), bias_apart)

    why_not = why_not_linears(**first, **last)
    if kind is not None and why_not is None:
        return _glu_branch(linears, output, kind, gate_last)
    return Branch(
        lambda x, bias_apart: finish(projected(x, *linears), bias_apart),
        "linear, gate of torch, linear",
        linears[0] if why_not is None else None,
        why_not,
        step=linear_step(lambda: joined(*linears), finish) if why_not is None else None,
    )


def _glu_branch(first: tuple[nn.Module, ...], last: nn.Module, kind: str, gate_last: bool) -> Branch:
    """`ops.glu_mlp` as the branch of a residual step."""

    def halves() -> list[Any]:
        both: list[tuple[Any, Any]]
        if len(first) == 2:
            both = [(each.weight, each.bias) for each in first]
        elif not gate_last:
            both = [(first[0].weight, first[0].bias), (None, None)]
        else:
            weight, bias = joined(*first)
            biases: Any = (None, None) if bias is None else bias.chunk(2)
            both = list(zip(weight.chunk(2), biases, strict=True))
        return [*both[1], *both[0]] if gate_last else [*both[0], *both[1]]

    def arguments(bias_apart: bool) -> tuple[Any, ...]:
        return *halves(), last.weight, None if bias_apart else last.bias, kind

    def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Any]:
        return _steps.GLU_MLP.ops(x, *arguments(bias_apart)), last.bias if bias_apart else None

    step = PlainStep(_steps.GLU_MLP, arguments, lambda: last.bias)  # type: ignore[arg-type,return-value]
    return Branch(run, "glu_mlp", first[0], step=step)


# ------------------------------------------------------------------------------------------------------- attention

# what an attention runs, for `explain`: without and with rotary positions
ATTENTION, ROTARY = "linear, attention, linear", "linear, rotary, attention, linear"


def projected(x: Tensor, *linears: nn.Module) -> Tensor:
    """What the Linears make of x, side by side: one product where all of them may be read."""
    if any(parts.why_not_part("", each, nn.Linear) is not None for each in linears):
        return torch.cat([parts.linear(each, x) for each in linears], dim=-1)
    return ops.linear(x, *joined(*linears))


def joined(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of Linears that read the same tokens, as those of one; a bias that one of them lacks is 0.

    Joining copies the weights, little beside the product of many tokens; its backward splits the gradient by views.
    """
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = torch.cat([each.weight for each in linears])
    biases = [each.bias for each in linears]
    if all(bias is None for bias in biases):
        return weight, None
    zero = weight.new_zeros(())
    return weight, torch.cat([zero.expand(len(each.weight)) if each.bias is None else each.bias for each in linears])


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
