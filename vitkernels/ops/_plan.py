"""What one kind of call of a step settles once, and looks up at every later call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.op import Op, signature

Launch = Callable[..., Any]  # (site, op, *arguments of its schema) -> its results
MOST = 4096  # kinds of calls that a step remembers


class Plan:
    """What one kind of call settles once: its checks are passed, and each launch in it has its launcher.

    A site names a launch within a step: one op may stand at several.
    """

    def __init__(self) -> None:
        self.choices: dict[str, dispatch.Choice] = {}
        self.backward: dict[Any, Plan] = {}

    def forward(self, site: str, op: Op, *args: Any) -> Any:
        return self._launch(site, op, "forward", args)

    def __call__(self, site: str, op: Op, *args: Any) -> Any:
        return self._launch(site, op, "backward", args)

    def _launch(self, site: str, op: Op, direction: str, args: tuple[Any, ...]) -> Any:
        if torch.autograd._profiler_enabled():  # it tells of torch's ops, by name
            return (op.forward_op if direction == "forward" else op.backward_op)(*args)
        choice = self.choices.get(site)
        if choice is None:
            choice = self.choices[site] = op.choose(direction, args)
        return choice(*args)


def _by_the_ops(site: str, op: Op, *args: Any) -> Any:
    """A backward launch that somebody looks at: a graph of the gradients is made, or gradients come in a batch."""
    return op.backward(*args)


def launch_backward(plan: Plan, grads: tuple[Tensor | None, ...], needs: Sequence[bool], kind: str) -> Launch:
    """How a backward pass launches: by the plan of its kind, or through the ops where somebody looks on."""
    looked_at = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)
    found = None if looked_at else signature(grads)
    if found is None:
        return _by_the_ops
    key = found[0], needs, dispatch.order(kind), dispatch.generation()
    known = plan.backward.get(key)
    if known is None:
        if len(plan.backward) == MOST:
            plan.backward.clear()
        known = plan.backward[key] = Plan()
    return known
