"""The text of a stretch in compiled code: all of a call but its tensors.

A compiler's graph holds constants, and may be kept on disk: what is no tensor goes into one string, with what autograd
has to know of the tensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkernels.ops._plan import MOST
from vitkernels.ops._step import STEPS
from vitkernels.ops._stretch_kind import Kind
from vitkernels.ops._windows import Windows


def written(steps: tuple[str, ...], counts: tuple[int, ...], copies: bool, *told: Any) -> str:
    """All of a call but its tensors, of which (dtype, whether it learns) is told, and its numbers: a name of _MADE.

    `copies` says whether autocast's copies of weights are kept for the backward pass.
    """
    words = [_word(each) if type(each) is tuple else each for each in told]
    return json.dumps((steps, counts, copies, words))


written._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _word(told: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype, *flags = told
    return (None if dtype is None else str(dtype).removeprefix("torch."), *flags)


# What numbers become, and how many of them: in a text they stand behind the name.
_MADE: dict[str, tuple[int, Callable[..., Any]]] = {
    "int": (1, int),
    "float": (1, float),
    "windows": (6, lambda *sizes: _windows(*map(int, sizes))),
}


def _windows(height: int, width: int, down: int, right: int, shift_down: int, shift_right: int) -> Windows:
    return Windows((height, width), (down, right), (shift_down, shift_right))


@functools.lru_cache(maxsize=MOST)
def whole(text: str, *numbers: float) -> str:
    """The text with its numbers."""
    *others, words = json.loads(text)
    rest = iter(numbers)
    for word in words:
        if type(word) is list and word[0] in _MADE:
            word += [next(rest) for _ in range(_MADE[word[0]][0])]
    return json.dumps((*others, words))


class Told(NamedTuple):
    """What a text says of one tensor."""

    dtype: torch.dtype
    learns: bool


class Text:
    """A text, read.

    Attributes:
        steps, counts, copies: as `written` got them, steps by themselves.
        entries: the inputs of the stretch, with `Told` in the places of tensors.
        learns: whether one of them does.
    """

    def __init__(self, text: str) -> None:
        steps, self.counts, self.copies, words = json.loads(text)
        self.steps = [STEPS[name] for name in steps]
        self.entries = [self._entry(each) for each in words]
        self.learns = any(each.learns for each in self.told)

    @staticmethod
    def _entry(word: Any) -> Any:
        if type(word) is not list:
            return word
        name, *flags = word
        if name in _MADE:
            return _MADE[name][1](*flags)
        dtype: Any = None if name is None else getattr(torch, name)
        return Told(dtype, *flags) if len(flags) == 1 else (dtype, *flags)

    @property
    def told(self) -> list[Told]:
        return [each for each in self.entries if isinstance(each, Told)]

    @property
    def results(self) -> int:
        """How many of the op's results are the stretch's: its sum is an input where nothing was added."""
        return 1 if len(self.steps) == 1 and self.entries[1] is None else 2

    def filled(self, values: Iterable[Any]) -> list[Any]:
        """The entries, with these in their tensors' places."""
        rest = iter(values)
        return [next(rest) if isinstance(each, Told) else each for each in self.entries]

    def kind(self, tensors: Sequence[Tensor], checked: bool = False) -> Kind:
        """What calls like this one come to."""
        both = zip(tensors, self.told, strict=True)
        inputs = self.filled(each.detach().requires_grad_(told.learns) for each, told in both)
        return Kind(self.steps, self.counts, inputs, self.learns, checked=checked, copies=self.copies)


parsed = functools.lru_cache(maxsize=MOST)(Text)
