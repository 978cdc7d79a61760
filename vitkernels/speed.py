"""What a training step of a model costs, stock and fused, eager and compiled: images per second and peak memory.

A machine is faster now and slower then, so figures that are divided by one another are taken in turn: A B C, C B A, and
so on; a ratio is the median over the rounds of what two steps of one round took.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import dispatch
from vitkernels.fuse import fuse
from vitkernels.fuse.runs import tensors_in
from vitkernels.models import Named
from vitkernels.nn import VisionTransformer, naive
from vitkernels.text import table
from vitkernels.train import machine

DISAGREE = 0.1  # quartiles further apart than this share of the median are told
WARM_UP = 2  # steps; the first one compiles
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")


@dataclass
class Lane:
    """One variant's figures.

    Attributes:
        name: "stock", "fused + torch.compile".
        seconds: of a step, a number a round.
        memory: bytes that a step takes at its peak beyond what is there before it (weights and optimizer state are);
            None where that cannot be told.
        backends: that served fused ops.
        failed: why there are no figures, or None.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    backends: list[str] = field(default_factory=list)
    failed: str | None = None

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Nothing that a variant raises stops the others; its row says what it was."""
        if self.failed is not None:
            return None
        try:
            return work()
        except Exception as error:
            self.failed, self.seconds = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", []
            return None


@dataclass(frozen=True)
class Speed:
    """What `measure` found; print it, or read it with `to_dict`. The first lane is what ratios are of."""

    model: str
    batch: int
    step: str
    device: str
    lanes: list[Lane]

    def images_per_second(self, lane: Lane) -> list[float]:
        """The median, and the quartiles on both sides of it; nothing where the lane failed."""
        if not lane.seconds:
            return []
        several = lane.seconds if len(lane.seconds) > 1 else lane.seconds * 2
        low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
        return [self.batch / middle, self.batch / high, self.batch / low]

    def ratio(self, lane: Lane) -> float | None:
        """How many times as fast as the first lane; None where either failed."""
        first = self.lanes[0].seconds
        if not first or not lane.seconds:
            return None
        return statistics.median(theirs / own for theirs, own in zip(first, lane.seconds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The same for programs, in plain Python values."""
        return {
            **{name: getattr(self, name) for name in ("model", "batch", "step", "device")},
            "versions": machine.versions(),
            "lanes": [
                {**asdict(lane), "images_per_second": self.images_per_second(lane), "ratio": self.ratio(lane)}
                for lane in self.lanes
            ],
        }

    def __str__(self) -> str:
        rows = [("", "images per second", "quartiles", "ratio", "peak memory", "fused ops on")]
        notes = []
        for lane in self.lanes:
            if lane.failed is not None:
                notes.append(f"{lane.name} failed: {lane.failed}")
                rows.append((lane.name, "failed", "", "", "", ""))
                continue
            middle, low, high = self.images_per_second(lane)
            if high - low > DISAGREE * middle:
                notes.append(
                    f"the rounds of {lane.name} disagree by {(high - low) / middle:.0%} between their quartiles: "
                    "something else ran here; needs a quiet machine, or more rounds"
                )
            ratio, memory = self.ratio(lane), lane.memory
            rows.append(
                (
                    lane.name,
                    f"{middle:.4g}",
                    f"{low:.4g} to {high:.4g}",
                    "" if ratio is None else f"{ratio:.2f} x",
                    "not told here" if memory is None else f"{memory / 2**20:,.0f} MiB",
                    ", ".join(lane.backends) or "none",
                )
            )
        head = [f"{self.model}, batch of {self.batch}, on {self.device}", f"a step is {self.step}"]
        tail = ["peak memory is what a step adds to weights and optimizer state"]
        return "\n".join([*head, table(rows), *tail, *notes])


def measure(
    named: Named,
    batch: int,
    device: torch.device,
    *,
    amp: torch.dtype | None = None,
    compiled: bool = False,
    rounds: int = 10,
    say: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Time training steps of a model and of its fused copy, in turn.

    Args:
        named: the model; it is copied for each variant. One of `vitkernels.nn` is fused as it is: what is stock is its
            naive counterpart.
        batch: images in a step.
        device: where.
        amp: what autocast multiplies in; None for no autocast.
        compiled: with two more variants, through torch.compile.
        rounds: steps of each variant that are timed, 1 or more.
        say: is told what comes next: compiling takes minutes.
    """
    images = named.images(batch).to(device)
    builders: dict[str, Callable[[], Any]] = {
        "stock": functools.partial(_stock, named.module),
        "fused": functools.partial(_fused, named.module),
    }
    if compiled:
        builders |= {f"{name} + torch.compile": functools.partial(_compiled, builders[name]) for name in builders}
    lanes = {name: Lane(name) for name in builders}
    steps: dict[str, Step] = {}
    for name, build in builders.items():
        lane = lanes[name]
        say(f"warming up {name}")
        step = lane.attempt(functools.partial(Step.of, build, images, amp))
        if step is None:
            continue
        with dispatch.record() as calls:
            for _ in range(WARM_UP):
                lane.attempt(step)
        lane.backends = sorted({call.backend for call in calls})
        if lane.failed is None:  # else its model is let go
            steps[name] = step
    for name, step in steps.items():
        lanes[name].memory = lanes[name].attempt(functools.partial(peak_memory, step, device))
    say(f"timing {rounds} rounds")
    tried = {name: functools.partial(lanes[name].attempt, step) for name, step in steps.items()}
    for name, seconds in interleave(tried, rounds, device).items():
        lanes[name].seconds = [] if lanes[name].failed else seconds
    did = next((step.did for step in steps.values() if step.did), "none that ran")
    return Speed(named.name, batch, did, machine.device_name(device), list(lanes.values()))


def interleave(steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; every second one runs backwards, so that nobody always follows the same."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps)[:: -1 if index % 2 else 1]:
            start = clock(device)
            steps[name]()
            seconds[name].append(clock(device) - start)
    return seconds


def clock(device: torch.device) -> float:
    """Seconds; all that was launched has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a step takes at its peak on top of what is there before it; None where that cannot be told.

    On CUDA, of torch's allocator. On the CPU, resident memory of the process, whose high-water mark Linux resets on
    request (5 to /proc/self/clear_refs): it holds what libraries allocate beside torch, too.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would be taken again unseen
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError, LookupError):
        step()
        return None
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


# ------------------------------------------------------------------------------------------------------- a variant


def _stock(module: nn.Module) -> nn.Module:
    return naive.from_fused(module) if isinstance(module, VisionTransformer) else copy.deepcopy(module)


def _fused(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    return module if isinstance(module, VisionTransformer) else fuse(module)


def _compiled(build: Callable[[], nn.Module]) -> Any:
    return torch.compile(build())


class Step:
    """Forward, loss, backward and an optimizer's step; `did` says in words what it did when it ran last."""

    def __init__(self, model: nn.Module, images: Tensor, amp: torch.dtype | None) -> None:
        self.model, self.images, self.amp, self.did = model, images, amp, ""
        self.labels = torch.arange(len(images), device=images.device)
        # lr=0: the same work, and the same weights for everybody
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    @classmethod
    def of(cls, build: Callable[[], nn.Module], images: Tensor, amp: torch.dtype | None) -> Step:
        """Of a model that is built now, where the images are."""
        return cls(build().to(images.device), images, amp)

    def __call__(self) -> None:
        with contextlib.nullcontext() if self.amp is None else torch.autocast(self.images.device.type, self.amp):
            returned = self.model(self.images)
        name, output = next((name, each) for name, each in tensors_in(returned) if each.is_floating_point())
        if output.dim() == 2:
            loss, words = F.cross_entropy(output.float(), self.labels % output.shape[1]), "cross-entropy"
        else:
            loss, words = output.float().square().mean(), "mean square"
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        precision = "float32" if self.amp is None else f"{str(self.amp).removeprefix('torch.')} autocast"
        self.did = f"forward, {words} of {name}, backward and AdamW(fused=True), in {precision}"
