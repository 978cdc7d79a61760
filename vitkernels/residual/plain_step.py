"""A branch that is one product of the steps, and its arguments: what is read once, and what each call brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vitkernels.ops import _steps
from vitkernels.ops._steps import Added, Norm


class PlainStep:
    """A branch that is one product of the steps: with another behind it, both are one autograd Function.

    Args:
        step: the product.
        read: bias_apart -> its arguments.
        bias: of its last projection.
        call: (**options) -> its last arguments, what a call brings; None where `read` gives all.
        options: the call's; None before there is a call.
        holds_call: whether `read` gives tensors of the call that the step was made for.
    """

    __slots__ = ("_arguments", "_bias", "_read", "_read_bias", "call", "holds_call", "options", "step")

    def __init__(
        self,
        step: _steps.Step,
        read: Callable[[bool], tuple[Any, ...]],
        bias: Callable[[], Tensor | None],
        call: Callable[..., tuple[Any, ...]] | None = None,
        options: Mapping[str, Any] | None = None,
        holds_call: bool = False,
    ) -> None:
        self.step, self._read, self._read_bias = step, read, bias
        self.call, self.options, self.holds_call = call, options, holds_call
        self._arguments: dict[bool, tuple[Any, ...]] = {}
        self._bias: Tensor | None = None

    def of(self, options: Mapping[str, Any] | None) -> PlainStep:
        """The same for another call; what was read is shared."""
        other = PlainStep(self.step, self._read, self._read_bias, self.call, options)
        other._arguments, other._bias = self._arguments, self._bias
        return other

    def arguments(self, bias_apart: bool) -> tuple[Any, ...]:
        """The product's; parameters are read once, as long as the object lives, what is made of them at each call."""
        found = self._arguments.get(bias_apart)
        if found is None:
            found = self._read(bias_apart)
            if all(isinstance(each, nn.Parameter) for each in found if isinstance(each, Tensor)):
                self._arguments[bias_apart] = found
        if self.call is None:
            return found
        assert self.options is not None, "there is no call"
        return (*found, *self.call(**self.options))

    def bias(self) -> Tensor | None:
        """Of the last projection, read as often."""
        if self._bias is None:
            found = self._read_bias()
            self._bias = found if isinstance(found, nn.Parameter) else None
            return found
        return self._bias

    def __call__(
        self, x: Tensor, added: Added | None, norm: Norm, bias_apart: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        total, out = _steps.run(x, added, [_steps.Stage(self.step, norm, self.arguments(bias_apart))])
        return total, out, self.bias() if bias_apart else None
