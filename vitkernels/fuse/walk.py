"""fuse and unfuse: which modules of a model are swapped, and how they are joined."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from vitkernels import dispatch
from vitkernels.fuse.candidates import OWN, Candidate, candidates
from vitkernels.fuse.explain import explain
from vitkernels.fuse.swap import Fused, State, is_swapped, keep_scriptable, restore, swap
from vitkernels.nn.transformer import Twin


def fuse(
    model: nn.Module,
    *,
    residual_dtype: torch.dtype | None = None,
    backend: str | Sequence[str] | None = None,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    strict: bool = False,
    recompute_norms: bool | None = None,
) -> nn.Module:
    """Swap fused kernels into a model, in place; nothing else of it changes.

    Parameters, buffers, state_dict keys, hooks, `isinstance` and results stay what they are; `unfuse` is the way back.
    Modules are known by the class that defines their `forward`, or by their structure. A call that a kernel cannot
    serve (a hook on an inner module, an attention dropout in training) runs the module's own code: `explain` says so.
    Fusing a model again changes the options of the modules that `only` and `skip` choose.

    Args:
        model: with blocks of timm, transformers, torchvision, torch.nn, open_clip, DINOv2, DINOv3 or vit-pytorch in it;
            on any device, before or after it is wrapped, compiled or loaded.
        residual_dtype: torch.bfloat16 keeps the tokens between sub-layers in bfloat16 under autocast (less memory
            traffic, other numbers); None keeps what the model has. Without autocast it changes nothing.
        backend: the backend that serves it, or several in order; None leaves it to `use`. Compiled code follows `use`.
        only: a pattern, or several, of module names ("blocks.[0-5]*"); modules that match none stay as they are.
        skip: the same for modules that stay as they are.
        strict: raise, changing nothing, if any Transformer block would not be fused, or not all of it.
        recompute_norms: True keeps no norm's result for backward but makes it again from the sum (less memory, one
            more pass over it); False keeps it; None decides by the device: made again on CPUs, kept on GPUs.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no Module, or residual_dtype no floating-point dtype.
        ValueError: nothing in the model can be fused, a pattern fits no module, or an unknown backend.
        RuntimeError: inside a function that is being compiled; with `strict`, naming each block and its reason.
    """
    _check(model, residual_dtype)
    order = (
        None if backend is None else dispatch.parse_order([backend] if isinstance(backend, str) else backend, "fuse")
    )
    found = [each for each in candidates(model) if _chosen(each.name, only, skip)]
    _check_patterns(model, only=only, skip=skip)
    fusable = [each for each in found if each.declined is None]
    if not fusable and not any(isinstance(module, OWN) for module in model.modules()):
        raise ValueError(_nothing(model, found))
    before = {module: module._vitkernels for module in model.modules() if isinstance(module, Fused)}
    swapped = _swap(fusable)
    dropouts = tuple(each for each in model.modules() if isinstance(each, nn.Dropout))
    for name, module in model.named_modules():
        if isinstance(module, Fused) and _chosen(name, only, skip):
            module.__dict__["_vitkernels"] = dataclasses.replace(  # not written into: shallow copies share it
                module._vitkernels,
                residual_dtype=residual_dtype,
                recompute_norms=recompute_norms,
                backends=order,
                dropouts=dropouts if module.lays_out else (),
            )
    if strict:
        _require_all(model, swapped, before)
    keep_scriptable(model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module the class that it had before `fuse`, in place; `vk.nn`'s own layers stay served.

    Args:
        model: fused, wholly or in part, or not at all.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no Module.
        RuntimeError: a fused module's class was changed again (a parametrization, say); nothing was undone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: argument 'model' is a {type(model).__name__}; needs a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, Fused) and not issubclass(module.stock, Twin) and not is_swapped(module):
            raise RuntimeError(
                f"unfuse: '{name}' was made a {type(module).__name__} after it was fused; needs that to be undone first"
            )
    for module in model.modules():
        restore(module)
    return model


def swap_known(model: nn.Module) -> None:
    """Swap in what the rules know of a model, by the process's order of backends, in place."""
    _swap([each for each in candidates(model) if each.declined is None])


def _swap(found: list[Candidate]) -> list[nn.Module]:
    """Swap what is not fused yet, and name it."""
    stock = [each for each in found if not isinstance(each.module, Fused)]
    for each in stock:
        swap(each.module, each.match.rule.mixin)
    return [each.module for each in stock]


def _check(model: nn.Module, residual_dtype: torch.dtype | None) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("fuse: called inside a function that is being compiled; needs to be called outside of it")
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: argument 'model' is a {type(model).__name__}; needs a torch.nn.Module")
    known = residual_dtype is None or (isinstance(residual_dtype, torch.dtype) and residual_dtype.is_floating_point)
    if not known:
        raise TypeError(f"fuse: argument 'residual_dtype' is {residual_dtype!r}; needs a floating-point torch.dtype")


# --------------------------------------------------------------------------------------------------------- names


def _listed(given: str | Sequence[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _fits(name: str, pattern: str) -> bool:
    """Whether the pattern is the name's, or that of a module around it."""
    names = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(names[: count + 1]), pattern) for count in range(len(names)))


def _chosen(name: str, only: str | Sequence[str] | None, skip: str | Sequence[str] | None) -> bool:
    wanted = only is None or any(_fits(name, pattern) for pattern in _listed(only))
    return wanted and not any(_fits(name, pattern) for pattern in _listed(skip))


def _check_patterns(model: nn.Module, **given: str | Sequence[str] | None) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for argument, value in given.items():
        for pattern in _listed(value):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"fuse: argument '{argument}' has the pattern {pattern!r}, which fits no module of the model; "
                    f"needs one like {names[len(names) // 2]!r}"
                )


def _nothing(model: nn.Module, found: list[Candidate]) -> str:
    reasons = "; ".join(f"{each.name or 'the model'}: {each.declined}" for each in found[:3])
    return (
        f"fuse: nothing to fuse in this {type(model).__name__}; needs attention, feed-forward or whole blocks of timm, "
        "transformers, torchvision, torch.nn, open_clip, DINOv2, DINOv3 or vit-pytorch"
        + (f" ({reasons})" if reasons else "")
    )


def _require_all(model: nn.Module, swapped: list[nn.Module], before: dict[Fused, State]) -> None:
    """Raise, and take the swaps and options back, if a block is not fused whole."""
    missing = explain(model).unfused
    if missing:
        for module in swapped:
            restore(module)
        for module, state in before.items():
            module.__dict__["_vitkernels"] = state
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise RuntimeError(f"fuse: strict=True, and not every block would be fused: {reasons}")
