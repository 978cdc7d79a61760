"""Checks of constructor arguments: one sentence that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.ops._check import integer, is_integer


def positive(owner: str, **numbers: Any) -> list[int]:
    """Each argument is an integer of 1 or more; they come back as ints."""
    return _at_least(1, owner, numbers)


def not_negative(owner: str, **numbers: Any) -> list[int]:
    """Each argument is an integer of 0 or more; they come back as ints."""
    return _at_least(0, owner, numbers)


def _at_least(least: int, owner: str, numbers: dict[str, Any]) -> list[int]:
    values = [integer(value) for value in numbers.values()]
    for name, value in zip(numbers, values, strict=True):
        if not is_integer(value) or value < least:
            raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs an int of {least} or more")
    return values


def one_of(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs one of {', '.join(map(repr, choices))}")


NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def norm(owner: str, name: str) -> type[nn.LayerNorm] | type[nn.RMSNorm]:
    """The class of a norm that an argument 'norm' names."""
    one_of(owner, "norm", name, NORMS)
    return NORMS[name]


def divisible(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    if value % by != 0:
        raise ValueError(f"{owner}: argument '{name}' is {value}; needs a multiple of {by_name}, {by}")


def pair(owner: str, name: str, value: Any) -> tuple[int, int]:
    """(height, width) of an int or of a pair of ints."""
    sides = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    height, width = map(integer, sides)
    for side in (height, width):
        if not is_integer(side) or side < 1:
            raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs an int of 1 or more, or (height, width)")
    return height, width


def image(owner: str, value: Any, patch_size: tuple[int, int]) -> None:
    """A batch of images [B, C, H, W], H and W multiples of the patch."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: argument 'image' got {type(value).__name__}; needs a torch.Tensor")
    if value.dim() != 4:
        raise ValueError(f"{owner}: argument 'image' has shape {list(value.shape)}; needs 4 dimensions, [B, C, H, W]")
    for size, side, axis in zip(value.shape[2:], patch_size, ("height", "width"), strict=True):
        if size < side or size % side != 0:
            raise ValueError(
                f"{owner}: argument 'image' has a {axis} of {size}; needs a multiple of the patch size {side}"
            )


def keep(owner: str, value: Any, batch: int, patches: int) -> None:
    """Indices of patches [B, M], int64, each within its image and once; the values are looked at on the CPU alone."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: argument 'keep' got {type(value).__name__}; needs a torch.Tensor")
    if value.dtype != torch.int64:
        raise TypeError(f"{owner}: argument 'keep' has dtype {value.dtype}; needs int64")
    if value.dim() != 2 or len(value) != batch:
        raise ValueError(f"{owner}: argument 'keep' has shape {list(value.shape)}; needs [{batch}, M]")
    if torch.compiler.is_compiling() or type(value) is not Tensor or value.device.type != "cpu" or not value.numel():
        return
    ordered = value.sort(dim=1).values
    low, high = int(ordered[:, 0].min()), int(ordered[:, -1].max())
    if low < 0 or high >= patches:
        raise ValueError(
            f"{owner}: argument 'keep' holds indices from {low} to {high}; needs 0 to {patches - 1}, the patches"
        )
    doubled = (ordered[:, 1:] == ordered[:, :-1]).nonzero().tolist()
    if doubled:
        image, place = doubled[0]
        raise ValueError(
            f"{owner}: argument 'keep' holds {ordered[image, place]} twice for image {image}; needs each patch once"
        )


def rate(owner: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs a number from 0 to below 1")
