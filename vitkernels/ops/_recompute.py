"""LayerNorm's result is not kept for backward passes: it is made again from the sum that is kept anyway.

`add_layer_norm` keeps its sum. The product behind it (`linear`, `mlp`) needs `normed` once more, for the gradient of
its weight, and one pass over the sum gives the same bits. So `add_layer_norm` leaves a recipe on the tensor that it
returns, and the product keeps what the recipe names in place of its input: one [B, N, D] less for each norm. A small
result is kept.

There are recipes where autograd watches plain tensors and nobody else does: not in compiled code (its partitioner
decides what is kept), under functorch's transforms or dispatch modes, nor for tensor subclasses. A recipe serves under
the saved-tensor hooks that it was written under: a checkpoint, which runs its region twice and compares what is saved,
sees the same both times. What it names counts its changes, like all that autograd keeps.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from vitkernels.dispatch import OPS

_PLAIN = (Tensor, torch.nn.Parameter)
_SMALL = 2**16  # numbers; a result of fewer is kept: making it again would take longer than its memory is worth


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """normed = layer_norm(total) * weight + bias, [..., D], rounded to `dtype`.

    Attributes:
        total, weight, bias, eps, dtype: of `add_layer_norm`; total is detached, and counts its changes with the sum.
        versions: of the tensor that the recipe hangs on, total, weight and bias, when it was written.
        hooks: autograd's on what is saved, then.
    """

    total: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float
    dtype: torch.dtype
    versions: tuple[int | None, ...]
    hooks: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # it hangs on a tensor that may be saved: a file of tokens holds no weights


def write(normed: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """Leave on `normed` how it was made, where that can save memory: where its sum is kept by autograd."""
    if torch.compiler.is_compiling() or not normed.requires_grad or normed.numel() < _SMALL:
        return
    if not _unwatched(normed, total, weight, bias):
        return
    total = total.detach()
    versions = _versions(normed, total, weight, bias)
    recipe = Recipe(total, weight, bias, eps, normed.dtype, versions, _hooks())
    normed._vitkernels_recipe = recipe  # type: ignore[attr-defined]


def carry(source: Tensor, cast: Tensor) -> None:
    """Where autocast made `cast` of `source`, its recipe is the same but for the rounding."""
    if cast is source or torch.compiler.is_compiling():
        return
    recipe = _read(source)
    if recipe is not None:
        versions = (cast._version, *recipe.versions[1:])
        cast._vitkernels_recipe = dataclasses.replace(recipe, versions=versions)  # type: ignore[attr-defined]


def save(ctx: Any, x: Tensor, weight: Tensor, *others: Tensor) -> None:
    """Save a product's input, or what makes it again, with its weight and others: `saved` gives them in this order."""
    recipe = None if torch.compiler.is_compiling() or not weight.requires_grad else _read(x)
    if recipe is None:
        ctx.normed = None
        ctx.save_for_backward(weight, *others, x)
    else:
        ctx.normed = recipe.eps, recipe.dtype, x.dtype
        ctx.save_for_backward(weight, *others, recipe.total, recipe.weight, recipe.bias)


def saved(ctx: Any) -> list[Tensor]:
    """[x, weight, *others] in a backward pass; making x again is a forward launch of add_layer_norm."""
    if ctx.normed is None:
        *others, x = ctx.saved_tensors
        return [x, *others]
    *others, total, weight, bias = saved_tensors(ctx)
    eps, dtype, cast = ctx.normed
    with torch.no_grad():
        normed = OPS["add_layer_norm"](total, None, weight, bias, eps, None, None, None, dtype)[1]
    return [normed.to(cast), *others]


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """ctx.saved_tensors of a backward pass that reads a sum; one that was written into is named."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "add_layer_norm: its sum (what a fused block returns), its norm's weight or bias, a factor, or the weight "
            "of the product behind it was written into; the backward pass needs it unchanged: clone it first "
            "(x = x.clone())"
        ) from error


def _read(x: Tensor) -> Recipe | None:
    """The recipe of a tensor, where it still makes the same numbers."""
    recipe = getattr(x, "_vitkernels_recipe", None)
    if not isinstance(recipe, Recipe) or recipe.hooks != _hooks():
        return None
    tensors = x, recipe.total, recipe.weight, recipe.bias
    return recipe if _unwatched(*tensors) and recipe.versions == _versions(*tensors) else None


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _unwatched(*tensors: Tensor | None) -> bool:
    """Whether these are tensors of memory, and no transform or dispatch mode looks on."""
    return (
        all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )
