"""What one kind of call of a step settles once, and looks up at every later call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitkernels import dispatch
from vitkernels.op import Op
from vitkernels.tape import Taped

Launch = Callable[..., Any]  # (site, op, *arguments of its schema) -> its results
MOST = 4096  # kinds of calls that a step remembers


class Plan(Taped):
    """One kind of call: its checks are passed, and each launch in it has its launcher.

    Args:
        direction: of its launches, "forward" or "backward".
        compute: (plan, *inputs) -> tuple; it launches by `plan.launch`.
    """

    __slots__ = ("_choices", "_direction")

    def __init__(self, direction: str, compute: Callable[..., tuple[Any, ...]]) -> None:
        super().__init__(lambda *inputs: compute(self.launch, *inputs))
        self._direction = direction
        self._choices: dict[str, dispatch.Choice] = {}

    def launch(self, site: str, op: Op, *args: Any) -> Any:
        """Launch an op; a site names a launch within a step: one op may stand at several."""
        if torch.autograd._profiler_enabled():  # it tells of torch's ops, by name
            return (op.forward_op if self._direction == "forward" else op.backward_op)(*args)
        choice = self._choices.get(site)
        if choice is None:
            choice = self._choices[site] = op.choose(self._direction, args)
        return choice(*args)


def by_the_ops(site: str, op: Op, *args: Any) -> Any:
    """A backward launch that somebody looks at: a graph of the gradients is made, or gradients come in a batch."""
    return op.backward(*in_one_dtype(op, args))


def in_one_dtype(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A launch's arguments as the torch op takes them: weights may be wider than what they are multiplied with."""
    if not op.one_dtype:
        return args
    return tuple(each.to(args[0].dtype) if isinstance(each, torch.Tensor) else each for each in args)


def keep(plans: dict[Any, Plan], key: Any, plan: Plan) -> Plan:
    """Remember a plan; so many kinds are shapes that do not come again, and all are forgotten."""
    if len(plans) == MOST:
        plans.clear()
    plans[key] = plan
    return plan
