"""Checks of constructor arguments: one sentence that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def positive(owner: str, **numbers: Any) -> None:
    """Each argument is an int of 1 or more."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs an int of 1 or more")


def not_negative(owner: str, **numbers: Any) -> None:
    """Each argument is an int of 0 or more."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs an int of 0 or more")


def one_of(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs one of {', '.join(map(repr, choices))}")


def divisible(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    if value % by != 0:
        raise ValueError(f"{owner}: argument '{name}' is {value}; needs a multiple of {by_name}, {by}")


def pair(owner: str, name: str, value: Any) -> tuple[int, int]:
    """(height, width) of an int or of a pair of ints."""
    height, width = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
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


def rate(owner: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: argument '{name}' is {value!r}; needs a number from 0 to below 1")
