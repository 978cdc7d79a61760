"""Times one case on all its lanes, ours and the peers', in turn: A B C, then C B A from another start, and so on.

A machine is faster now and slower then, so figures that will be divided by one another are taken side by side. Before
that, on the same inputs, each lane is held to float64 by the tests' own rule: a lane that is wrong is not timed. Inputs
are random and rotate among sets that together are larger than the cache. A lane that fails is a row with its reason.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import accuracy
import torch
from torch import Tensor

import vitkernels as vk
from bench import machine

OURS = "vitkernels"
OUR_LANES = (OURS, "vk.")  # how the names of lanes with our kernels begin
MAX_SETS = 64
# A peer may round what we keep in float32: that is said beside its figure. Past this share of the truth's root mean
# square it computes something else, and gets no figure.
LOOSE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """What is timed, but for the lane."""

    kind: str  # "op", "block", "model" or "tower"; "memory" for a model whose memory is asked for
    name: str
    shape: str
    dtype: str
    direction: str  # "forward", "forward + backward" or "training step"
    sweep: str = ""  # in a scaling run, the size that grows, and where it stands
    at: int = 0

    def __str__(self) -> str:
        return f"{self.sweep}{': ' if self.sweep else ''}{self.name}, {self.shape}, {self.dtype}, {self.direction}"


class Truth(NamedTuple):
    """What a lane is judged by: the reference in the dtype, the reference in float64, and what is always allowed."""

    reference: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    floor: accuracy.Floor


class Lane(Protocol):
    """One way to compute a case."""

    def step(self, inputs: Any) -> Any:
        """What is timed."""

    def results(self, inputs: Any) -> dict[str, Tensor]:
        """What the step computes, under the names that `Truth` has."""


class Bench(Protocol):
    """A case: its inputs, its lanes, what is right, and how much work it is."""

    key: Key
    device: torch.device

    @property
    def flops(self) -> float:
        """Of one call."""

    @property
    def bytes(self) -> float:
        """That one call moves at least."""

    def inputs(self, index: int) -> Any:
        """The set of inputs of that number."""

    def truth(self, inputs: Any) -> Truth:
        """What a lane must compute from a set."""

    def lanes(self) -> Mapping[str, Callable[[], Lane]]:
        """How each lane is made, by name."""


@dataclass(frozen=True)
class Effort:
    """Rounds for one case: as many as fit into `seconds`, within bounds."""

    seconds: float = 8.0
    least: int = 5
    most: int = 31

    def rounds(self, one_round: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(one_round, 1e-9))))


@dataclass
class Timed:
    """A lane's figures, and how many seconds each round took; none where the row says "failed"."""

    row: Row
    samples: list[float] = field(default_factory=list)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Nothing that a lane raises stops the run; its row says what it was."""
        if "failed" in self.row:
            return None
        try:
            return work()
        except Exception as error:
            self.row["failed"] = _sentence(error)
            self.samples = []
            return None


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure(bench: Bench, effort: Effort) -> dict[str, Timed]:
    """Every lane of a case: checked, warmed up, timed in turn."""
    torch.compiler.reset()  # past 8 models compiled in one process dynamo would run the next ones uncompiled
    work = {**asdict(bench.key), "flops": bench.flops, "bytes": bench.bytes}
    timed = {name: Timed({**work, "lane": name}) for name in bench.lanes()}
    sets = [bench.inputs(index) for index in range(_sets(bench))]
    lanes = _checked(bench, timed, sets[0])
    one_round = 0.0
    for name, lane in lanes.items():
        each = timed[name]
        step = functools.partial(lane.step, sets[-1])
        each.row["memory"] = each.attempt(functools.partial(machine.peak_memory, step, bench.device))
        one_round += each.attempt(functools.partial(_seconds, lane, sets[-1], bench.device)) or 0.0
    supply = itertools.cycle(sets)  # one for each call: a lane that came second would find the first one's in the cache
    for index in range(effort.rounds(one_round)):
        for name in _turn(list(lanes), index):
            seconds = timed[name].attempt(functools.partial(_seconds, lanes[name], next(supply), bench.device))
            if seconds is not None:
                timed[name].samples.append(seconds)
    if bench.device.type == "cuda":
        figure: str = "device_seconds" if bench.key.kind == "op" else "kernels"
        take: Callable[..., Any] = machine.device_seconds if bench.key.kind == "op" else machine.kernel_seconds
        for name, lane in lanes.items():
            timed[name].row[figure] = timed[name].attempt(functools.partial(take, lane.step, sets))
    return timed


def _checked(bench: Bench, timed: dict[str, Timed], inputs: Any) -> dict[str, Lane]:
    """The lanes that compute the right thing."""
    lanes: dict[str, Lane] = {}
    try:
        truth = bench.truth(inputs)
    except Exception as error:  # float64 may not fit where the case does
        for each in timed.values():
            each.row["failed"] = f"not timed, nothing to judge it by: {_sentence(error)}"
        return lanes
    for name, build in bench.lanes().items():
        each = timed[name]
        lane = each.attempt(build)
        with vk.record() as calls:
            got = each.attempt(functools.partial(lane.results, inputs)) if lane is not None else None
        if lane is None or got is None:
            continue
        if calls:
            each.row["backends"] = sorted({call.backend for call in calls})
        each.row |= judge(got, truth, bench.key.dtype, ours=name.startswith(OUR_LANES))
        if "failed" not in each.row:
            lanes[name] = lane
    return lanes


def judge(got: Mapping[str, Tensor], truth: Truth, dtype: str, ours: bool) -> Row:
    """{}; or {"failed": ...}, wrong; or {"inexact": ...}, a peer that rounds more than the rule allows."""
    try:
        accuracy.check(got, truth.reference, truth.exact, truth.floor)
    except AssertionError as broken:
        sentence = str(broken).splitlines()[0]
        if ours or not _close(got, truth, LOOSE[dtype]):
            return {"failed": f"not timed, wrong: {sentence}"}
        return {"inexact": sentence}
    return {}


def _close(got: Mapping[str, Tensor], truth: Truth, share: float) -> bool:
    for name, exact in truth.exact.items():
        if got[name].shape != exact.shape:
            return False
        error = accuracy.size_of(got[name].double() - exact).rms
        if not error <= share * accuracy.size_of(exact).rms + truth.floor.absolute:
            return False
    return True


def _sets(bench: Bench) -> int:
    """So many sets that what one call touches is out of the cache when its turn comes again."""
    return max(3, min(MAX_SETS, math.ceil(2 * machine.cache_bytes(bench.device) / bench.bytes)))


def _turn(names: list[str], index: int) -> list[str]:
    """Every two rounds begin with another lane, and one of them runs backwards: nobody always follows the same one."""
    start = index // 2 % max(len(names), 1)
    turned = names[start:] + names[:start]
    return turned[::-1] if index % 2 else turned


def _seconds(lane: Lane, inputs: Any, device: torch.device) -> float:
    start = machine.clock(device)
    lane.step(inputs)
    return machine.clock(device) - start
