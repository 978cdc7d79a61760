"""Residual streams: each sub-layer's add, LayerScale and DropPath run together with the LayerNorm that comes next.

A pre-norm block computes x + drop_path(scale(branch(norm(x)))) twice. The add at its end and the first norm of the
block after it are two modules, and one op: the block that ends hands the normed tokens over on the very tensor that
it returns, and the block that begins takes them only if that tensor arrives, unchanged, under the same conditions. A
hook that changed it, a checkpoint that detached it or a block in between means that the norm is computed anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse import parts
from vitkernels.ops._amp import autocast_dtype


@dataclass(frozen=True, slots=True)
class Part:
    """A row of `explain`: a part of a module, the ops that serve it, and what of it is not fused.

    Attributes:
        name: the part, as its module calls it; "" for the module itself.
        ops: the ops, "attention_qkv, linear"; "" where none runs.
        why_not: what is not fused, or None.
        module: the block within the module that the part belongs to ("layers.0"); "" for the module itself.
    """

    name: str
    ops: str
    why_not: str | None = None
    module: str = ""


@dataclass(slots=True)
class Branch:
    """How a sub-layer's branch is computed.

    Attributes:
        run: (normed tokens [B, N, D], split) -> (branch, bias): with `split` the last Linear's bias comes apart, for
            an op that adds it on its way; None where it is in the branch, or where there is none.
        ops: the ops that `run` calls, for `explain`.
        first: the Linear that reads the normed tokens; None where a module gets them whole.
        reason: what of the branch is not fused, or how to find out: a call need not, `explain` does.
        otherwise: the ops that `run` calls while something is not; the same by default.
    """

    run: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    ops: str
    first: nn.Module | None = None
    reason: str | Callable[[], str | None] | None = None
    otherwise: str | None = None

    @property
    def why_not(self) -> str | None:
        """What of the branch is not fused now, or None."""
        return self.reason() if callable(self.reason) else self.reason

    def part(self, name: str) -> Part:
        """The row of `explain`."""
        why_not = self.why_not
        ops = self.ops if why_not is None or self.otherwise is None else self.otherwise
        return Part(name, ops, why_not)


@dataclass(slots=True)
class Sublayer:
    """One residual step of a block, by its parts; `name` is what `explain` calls it ("attn")."""

    name: str
    norm: nn.Module
    branch: Branch
    scale: nn.Module | Tensor | None = None
    drop_path: nn.Module | None = None

    def parts(self) -> list[Part]:
        """The rows of `explain`: the branch, and the residual add with its norm."""
        reasons = (
            parts.not_layer_norm(f"the norm of {self.name}", self.norm),
            parts.not_scale(f"the scale of {self.name}", self.scale),
            parts.not_drop_path(f"the drop path of {self.name}", self.drop_path),
        )
        why_not = next((reason for reason in reasons if reason is not None), None)
        residual = Part(f"{self.name} residual", "" if why_not else "add_layer_norm", why_not)
        return [self.branch.part(self.name), residual]


@dataclass(slots=True)
class Border:
    """What follows a block: the norm that its last add may run with, and the Linear that reads its result."""

    norm: nn.Module
    first: nn.Module | None = None


def pre_norm(
    x: Tensor, sublayers: Sequence[Sublayer], border: Border | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x = x + drop_path(scale(branch(norm(x)))) for each sub-layer, [B, N, D] to the same.

    Args:
        x: the residual stream.
        sublayers: the block's steps, in order.
        border: what follows the block, where that is known.
        dtype: of the residual stream under autocast; None leaves it as the modules one by one would have it.
    """
    dtype = _stream_dtype(x, dtype)
    if dtype is not None:
        x = x.to(dtype)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        border = None  # its tensors count no changes: nobody could tell that one was changed on its way
    first = sublayers[0]
    normed: Tensor | None = normalise(x, first.norm, first.branch.first)
    following = [Border(each.norm, each.branch.first) for each in sublayers[1:]]
    for sublayer, after in zip(sublayers, [*following, border], strict=True):
        x, normed = _step(x, sublayer, normed, after, widen=dtype is None)
    return x if border is None or normed is None else _hand_over(x, border.norm, normed)


def post_norm(x: Tensor, sublayers: Sequence[Sublayer], dtype: torch.dtype | None = None) -> Tensor:
    """x = norm(x + drop_path(scale(branch(x)))) for each sub-layer, [B, N, D] to the same; dtype as in `pre_norm`."""
    dtype = _stream_dtype(x, dtype)
    if dtype is not None:
        x = x.to(dtype)
    for sublayer in sublayers:
        total, normed = _step(x, sublayer, x, Border(sublayer.norm), widen=dtype is None, out_dtype=dtype)
        x = parts.layer_norm(sublayer.norm, total) if normed is None else normed
    return x


def _stream_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to keep the stream in; None as it is: without autocast, products take what they are given."""
    return None if autocast_dtype(x) is None or x.dtype == torch.float64 else dtype


def normalise(x: Tensor, norm: nn.Module, first: nn.Module | None = None) -> Tensor:
    """norm(x) for the Linear `first`: taken over from the block that made x, or computed."""
    dtype = parts.operand_dtype(first, x)
    taken = take(x, norm, dtype)
    return parts.layer_norm(norm, x, dtype) if taken is None else taken


def _step(
    x: Tensor,
    sublayer: Sublayer,
    normed: Tensor | None,
    after: Border | None,
    widen: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum after a sub-layer, and the next norm of it; None in its place where the two cannot run together."""
    if normed is None:
        normed = normalise(x, sublayer.norm, sublayer.branch.first)
    scale, drop_path = sublayer.scale, sublayer.drop_path
    readable = parts.not_scale("", scale) is None and parts.not_drop_path("", drop_path) is None
    if not readable or after is None or not _fits(after.norm, x):
        branch, _ = sublayer.branch.run(normed, False)
        added = _scaled(branch, scale, drop_path)
        return x + (added if widen else added.to(x.dtype)), None
    branch, bias = sublayer.branch.run(normed, True)
    gamma = parts.scale_parameter(scale)
    # the dtype that the scaled branch has where the modules run one by one: DropPath draws in it, the sum is in it
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    if widen:
        x = x if x.dtype == dtype else x.to(torch.promote_types(x.dtype, dtype))
    norm = after.norm
    return ops.add_layer_norm(
        x,
        branch,
        norm.weight,  # type: ignore[arg-type]
        norm.bias,  # type: ignore[arg-type]
        norm.eps,  # type: ignore[arg-type]
        branch_bias=bias,
        scale=gamma,
        row_scale=parts.drop_path_factor(drop_path, branch, dtype),
        out_dtype=out_dtype or parts.operand_dtype(after.first, x),
    )


def _fits(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm that may follow can run with x's sum: a pooling between them may change the width."""
    return parts.not_layer_norm("", norm) is None and norm.weight.shape[0] == x.shape[-1]  # type: ignore[index,return-value]


def _scaled(branch: Tensor, scale: nn.Module | Tensor | None, drop_path: nn.Module | None) -> Tensor:
    if scale is not None:
        branch = branch * scale if isinstance(scale, Tensor) else scale(branch)
    return branch if drop_path is None else drop_path(branch)


# ------------------------------------------------------------------------------------------- from module to module


class _Handed:
    """norm(total), on its way from the block that made the total to the module that begins with the norm."""

    def __init__(self, total: Tensor, norm: nn.Module, normed: Tensor) -> None:
        self.norm, self.normed = norm, normed
        self.weight, self.bias = norm.weight, norm.bias
        self.conditions = _conditions(total, norm)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # it hangs on a tensor that may be saved: a file of tokens holds no modules

    def holds(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether it is norm(x) still."""
        same = self.norm is norm and self.weight is norm.weight and self.bias is norm.bias
        return same and self.conditions == _conditions(x, norm)


def _conditions(total: Tensor, norm: nn.Module) -> tuple[object, ...]:
    """What must be the same where a norm is computed and where it is taken.

    A checkpoint runs its region twice, and sees it by the hooks on saved tensors: a norm that came from outside is not
    there the second time. Tokens may be written into on their way, or wait while an optimizer changes the norm.
    """
    if torch.compiler.is_compiling():  # traced tensors have no versions
        return (torch.is_grad_enabled(),)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), hooks, _version(total), _version(norm.weight), _version(norm.bias)


def _version(tensor: Any) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _hand_over(total: Tensor, norm: nn.Module, normed: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        total = total.view_as(total)  # Dynamo keeps attributes of an op's only result, not of one of several
    total._vitkernels_normed = _Handed(total, norm, normed)  # type: ignore[attr-defined]
    return total


def take(x: Tensor, norm: nn.Module, out_dtype: torch.dtype | None) -> Tensor | None:
    """norm(x) as the block that made x handed it over; None where it did not, or where that is not the same now."""
    handed = getattr(x, "_vitkernels_normed", None)
    if not isinstance(handed, _Handed):
        return None
    x._vitkernels_normed = None  # type: ignore[attr-defined]  # once: it must not outlive its use
    same = handed.normed.dtype == (out_dtype or x.dtype) and handed.holds(x, norm)
    return handed.normed if same else None
