"""One kind of call of a stretch: what follows from its tensors' dtypes, shapes and flags, settled once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vitkernels.op import own
from vitkernels.ops._plan import Launch, Plan
from vitkernels.ops._step import ADDED, BRANCH_BIAS, SAVED_BIAS, Part, Step, Stream, check

Value = TypeVar("Value")


class Kinds(dict[Any, Value], Generic[Value]):
    """Kinds of calls by their keys."""

    _last: tuple[Any, Value | None] = None, None  # blocks in a row are mostly of one kind

    def find(self, key: Any) -> Value | None:
        """The kind, or None; comparing with the last call's key takes half as long as hashing one."""
        last, kind = self._last
        if last == key:
            return kind
        kind = self.get(key)
        if kind is not None:
            self._last = key, kind
        return kind

    def clear(self) -> None:
        super().clear()
        self._last = None, None


class Kind:
    """One kind of call of a stretch.

    Args:
        steps: in order.
        counts: of the arguments of each one's product.
        inputs: as `_stretch.run` has them.
        learns: whether there will be a backward pass.
        checked: whether the inputs have passed the ops' checks.
        copies: whether autocast's copies of weights are kept for the backward pass; None for what suits the rows.

    Attributes:
        parts: of each step.
        learns: whether it has a backward pass.
        device: type of its tensors' device.
        multiplied: which inputs are weights that a product's backward reads, and where they are saved.
        added: the same for biases of branches, which a factor's gradient reads.
        given: where other inputs are saved; None before the first call. What else is saved a call of the kind has made.
        backward: its backward passes, by kind.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        counts: Sequence[int],
        inputs: Sequence[Any],
        learns: bool,
        *,
        checked: bool = False,
        copies: bool | None = None,
    ) -> None:
        x, *given = inputs
        self.learns, self.device, self.dtype = learns, x.device.type, given[7][0]
        self.parts: list[Part] = []
        self._slices: list[slice] = []  # of the inputs behind x
        self.multiplied: list[tuple[int, int]] = []
        self.added: list[tuple[int, int]] = []
        stream, branch = Stream.of(x), None if given[0] is None else Stream.of(given[0])
        begin, saved = 0, 0
        self._copies = self.dtype is not None and copies is not False
        for step, count in zip(steps, counts, strict=True):
            self._slices.append(slice(begin, begin + ADDED - 1 + count))
            own_inputs = given[self._slices[-1]]
            if checked:
                pass
            elif self.parts:  # what is not there yet is checked by its shape and dtype
                assert branch is not None
                stand_ins = [x.new_empty(1, dtype=each.dtype).expand(each.shape) for each in (stream, branch)]
                check(step, stand_ins[0], [stand_ins[1], *own_inputs[1:]])
            else:
                check(step, x, own_inputs)
            part = Part(step, stream, branch, own_inputs)
            self._copies = self._copies and (copies or part.keeps_copies(x, own_inputs[ADDED - 1 :]))
            self.multiplied += [(begin + ADDED + each, saved + part.saved_at(each)) for each in part.multiplied]
            bias, *factors = own_inputs[BRANCH_BIAS : BRANCH_BIAS + 3]
            if bias is not None and any(each is not None and each.requires_grad for each in factors):
                self.added.append((begin + 1 + BRANCH_BIAS, saved + SAVED_BIAS))
            begin, saved = self._slices[-1].stop, saved + part.saves
            self.parts.append(part)
            stream, branch = part.total, part.result
        self.given: list[int] | None = None
        self.forward = Plan("forward", self.compute)
        self.backward: Kinds[Plan] = Kinds()

    def run(self, inputs: Sequence[Any]) -> Any:
        """(total, result), and where it learns copies of weights, or none, and what is to be saved."""
        if self.dtype is None:
            return self.forward(*inputs)
        torch.set_autocast_enabled(self.device, False)  # dtypes are settled; inside, autocast would cast again
        try:
            return self.forward(*inputs)
        finally:
            torch.set_autocast_enabled(self.device, True)

    def note_given(self, inputs: Sequence[Any], saved: Sequence[Tensor | None]) -> None:
        """Find which of what is saved are inputs of the call, which somebody may change in between (p.data = ...)."""
        ids, multiplied = set(map(id, inputs)), {index for _, index in (*self.multiplied, *self.added)}
        self.given = [
            index
            for index, each in enumerate(saved)
            if each is not None and id(each) in ids and index not in multiplied
        ]

    def compute(self, launch: Launch, x: Tensor, *given: Any) -> tuple[Any, ...]:
        branch = given[0]
        copies: list[Tensor] = []
        saved: list[Tensor | None] = []
        for number, (part, own_inputs) in enumerate(zip(self.parts, self._slices, strict=True)):
            at_step = functools.partial(_at, launch, number)
            x, branch, rounded, more = part.compute(at_step, self.learns, self._copies, x, branch, given[own_inputs])
            copies += [rounded[index] for index in part.multiplied] if self._copies else []
            saved += more
        return (x, own(branch), copies, *saved) if self.learns else (x, own(branch))

    def gradients(
        self,
        needs: Sequence[bool],
        launch: Launch,
        dtotal: Tensor | None,
        dresult: Tensor | None,
        *saved: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Of the Function's inputs; `saved` is what `compute` said, parameters by their values."""
        found: list[Tensor | None] = []
        end = len(saved)
        for number in reversed(range(len(self.parts))):
            part, own_needs = self.parts[number], list(needs[1:][self._slices[number]])
            needs_x = needs[0]
            if number:
                needs_x, own_needs[0] = self.parts[number - 1].total.learns, self.parts[number - 1].result.learns
            begin = end - part.saves
            at_step = functools.partial(_at, launch, number)
            grads = part.gradients(at_step, [needs_x, *own_needs], dtotal, dresult, saved[begin:end])
            dtotal, dresult, *others = grads
            found = [None if number else dresult, *others, *found]
            end = begin
        return None, dtotal, *found


def _at(launch: Launch, number: int, site: str, *args: Any) -> Any:
    """A launch of the step of this number."""
    return launch((number, site), *args)
