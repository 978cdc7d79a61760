"""What a case makes of the normal numbers it draws: pixels, indices, masks, factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pixels(values: Tensor) -> Tensor:
    return (values * 64 + 128).clamp(0, 255).to(torch.uint8)


def indices(count: int) -> Callable[[Tensor], Tensor]:
    """Patch numbers below `count`, each image's in an order of its own."""

    def convert(values: Tensor) -> Tensor:
        images, kept = values.shape
        apart = count // kept
        first = torch.arange(images).unsqueeze(1) % (count - (kept - 1) * apart)
        return values.argsort(1) * apart + first

    return convert


def keep_some(values: Tensor) -> Tensor:
    """Mask with about 70 % of the keys, the first of them always."""
    mask = values > -0.5
    mask[..., 0] = True
    return mask


def drop_rows(values: Tensor) -> Tensor:
    """As above, but every third query sees nothing."""
    mask = keep_some(values)
    mask[..., ::3, :] = False
    return mask


def late_keys(values: Tensor) -> Tensor:
    """No key below 520 takes part: where keys come in blocks, a first one with nothing in it."""
    return torch.arange(values.shape[-1]).expand(values.shape) >= 520


def drop_sample(values: Tensor) -> Tensor:
    """As `keep_some`, but the first sample's queries see nothing."""
    mask = keep_some(values)
    mask[0] = False
    return mask


def filled(convert: Callable[[Tensor], Tensor], value: float = -torch.inf) -> Callable[[Tensor], Tensor]:
    """An additive mask: normal numbers, and `value` for what the bool mask hides."""
    return lambda values: values.masked_fill(~convert(values), value)


def hidden_keys(value: float) -> Callable[[Tensor], Tensor]:
    """An additive mask that does nothing but hide keys: 0, and `value` for what `keep_some` hides."""
    return lambda values: torch.zeros_like(values).masked_fill(~keep_some(values), value)


def zero_rows(values: Tensor) -> Tensor:
    """Zeros for the queries that `drop_rows` drops."""
    values[..., ::3, :] = 0
    return values


def first_column(values: Tensor) -> Tensor:
    """Queries with one column that is not 0: with `ones_first` each score is that number, summed in any order."""
    values[..., 1:] = 0
    return values


def ones_first(values: Tensor) -> Tensor:
    """Keys that differ, though not for the queries of `first_column`."""
    values[..., 0] = 1
    return values


def equal_scores(heads: int, gain: float) -> Callable[[Tensor], Tensor]:
    """A packed projection with such queries, times `gain`, and such keys."""

    def convert(values: Tensor) -> Tensor:
        q, k, _ = values.unflatten(-1, (3, heads, -1)).unbind(-3)
        first_column(q).mul_(gain)
        ones_first(k)
        return values

    return convert


def drop_path(values: Tensor) -> Tensor:
    """0 for the second sample of each three, 1 / 0.9 for the rest."""
    factors = torch.full_like(values, 1 / 0.9)
    factors[1::3] = 0
    return factors
