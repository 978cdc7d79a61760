"""How calls that must be refused are written, and what refusing is: one sentence, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels as vk

FLOATING = "needs one of float32, float64, bfloat16, float16"


@dataclass(frozen=True)
class Bad:
    """A call that must be refused: what replaces the good arguments, with which exception, in which words."""

    op: str
    changes: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]  # the argument, what came, what is needed

    def __str__(self) -> str:
        return f"{self.op}: {' '.join(self.words)}"


def check_refused(call: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    """The exception is of exactly this type, its one line holds the words in order, and no kernel ran."""
    with vk.record() as calls, pytest.raises(error) as raised:
        call()
    assert not calls
    assert type(raised.value) is error
    message = str(raised.value)
    assert "\n" not in message
    position = 0
    for word in words:
        assert word in message[position:], f"{word!r} is not in {message[position:]!r}"
        position = message.index(word, position)


def check_bad(bad: Bad, good: Callable[[], dict[str, Any]]) -> None:
    """The call is refused, twice, behind one with `good` arguments, and leaves its tensors as they were."""
    op = getattr(vk.ops, bad.op)
    op(**good())  # what was let through before must not let this through
    arguments = good() | bad.changes
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    for _ in range(2):
        check_refused(lambda: op(**arguments), bad.error, (f"{bad.op}: argument", *bad.words))
    for name, value in before.items():
        if value.device.type == "cpu":
            assert torch.equal(arguments[name].nan_to_num(), value.nan_to_num()), f"{name} was changed"
