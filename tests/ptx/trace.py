"""A second, simpler look at shared memory: all accesses of a run, compared where no barrier stands between them.

`order` decides while the kernel runs, with clocks; this keeps what happened, and knows barriers of the whole block
alone. It shows that a statement is redundant: without it no two accesses come together that were apart before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.operands import Instruction
from ptx.order import Order


class Trace(Order):
    """Shadows that also keep the accesses.

    Attributes:
        accesses: (grain with the section it is in, warp, whether it writes, line) of each access, as arrays.
        flights: (begin, end) among `touches` of asynchronous operations, their grains, lines and whether they write.
        unfenced: lines of asynchronous reads of what threads wrote since any fence.
    """

    kept: list[Trace] = []  # noqa: RUF012  # the runs since it was last cleared: an Order is made deep inside

    def __init__(self, count: int, warps: int, nbytes: int, grain: int) -> None:
        super().__init__(count, warps, nbytes, grain)
        self.section = np.zeros(count + 1, "i8")
        self.accesses: list[tuple[Any, Any, Any, Any]] = []
        self.touches: list[tuple[Any, int, bool]] = []  # (grains, line, whether it writes) in order of time
        self.flights: list[list[Any]] = []
        self.generic = np.zeros(self.nowhere + 1, bool)  # written by threads since a fence
        self.unfenced: set[int] = set()
        self.line = 0
        Trace.kept.append(self)

    def _keep(self, grains: Any, warps: Any, writes: bool, instruction: Instruction) -> None:
        grains, warps = np.broadcast_arrays(grains, warps)
        inside = grains != self.nowhere
        grains, warps = grains[inside].astype("i8"), warps[inside].astype("i8")
        place = self.section[grains // self.each] * (self.nowhere + 1) + grains
        both = np.unique(np.stack([place, warps]), axis=1)
        size = both.shape[1]
        self.accesses.append((both[0], both[1], np.full(size, writes), np.full(size, instruction.line)))
        self.touches.append((np.unique(grains), instruction.line, writes))
        if writes:
            self.generic[grains] = True
        self.line = instruction.line

    def barrier(self, rows: Any) -> None:
        self.section[rows] += 1
        super().barrier(rows)

    def fence(self, rows: Any, warps: Any) -> None:
        self.generic[:] = False
        super().fence(rows, warps)

    def on_read(self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any) -> None:
        self._keep(grains, warps, False, instruction)
        super().on_read(launch, instruction, grains, rows, warps)

    def on_write(
        self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any, changed: Any, lost: Any
    ) -> None:
        self._keep(np.where(changed, grains, self.nowhere), warps, True, instruction)
        super().on_write(launch, instruction, grains, rows, warps, changed, lost)

    def on_copy(self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any) -> None:
        self._keep(grains, warps, True, instruction)
        inside = np.unique(grains[grains != self.nowhere])
        self.flights.append([len(self.touches), None, inside, instruction.line, True])
        super().on_copy(launch, instruction, grains, rows, warps)

    def landed(self, grains: Any, warps: Any) -> None:
        inside = np.unique(grains[grains != self.nowhere])
        self._end(inside, writes=True)
        if np.ndim(warps):  # cp.async writes as a thread does
            place = self.section[inside // self.each] * (self.nowhere + 1) + inside
            owner = np.zeros(self.nowhere + 1, "i8")
            owner[grains] = warps
            size = len(inside)
            self.accesses.append((place, owner[inside], np.full(size, True), np.full(size, self.line)))
            self.generic[inside] = True
        super().landed(grains, warps)

    def on_async_read(
        self, launch: Any, instruction: Instruction, grains: Any, row: int, first: int, last: int
    ) -> None:
        for warp in range(first, last):
            self._keep(grains, warp, False, instruction)
        if self.generic[grains].any():
            self.unfenced.add(instruction.line)
        self.flights.append([len(self.touches), None, grains, instruction.line, False])
        super().on_async_read(launch, instruction, grains, row, first, last)

    def async_read_ended(self, grains: Any, first: int, last: int) -> None:
        self._end(grains, writes=False)
        size = len(grains)
        place = self.section[grains // self.each] * (self.nowhere + 1) + grains
        for warp in range(first, last):
            self.accesses.append((place, np.full(size, warp), np.full(size, False), np.full(size, self.line)))
        super().async_read_ended(grains, first, last)

    def _end(self, grains: Any, writes: bool) -> None:
        for flight in self.flights:
            if flight[1] is None and flight[4] == writes and np.isin(flight[2], grains).any():
                flight[1] = len(self.touches)

    # ------------------------------------------------------------------------------------------------- what it says

    def meetings(self) -> set[tuple[int, ...]]:
        """Lines of accesses that meet: a grain that two warps touch between two barriers, one of them writing."""
        if not self.accesses:
            return set()
        place, warp, writes, line = (np.concatenate([each[n] for each in self.accesses]) for n in range(4))
        sorting = np.argsort(place, kind="stable")
        place, warp, writes, line = place[sorting], warp[sorting], writes[sorting], line[sorting]
        begins = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
        several = np.maximum.reduceat(warp, begins) != np.minimum.reduceat(warp, begins)
        written = np.logical_or.reduceat(writes, begins)
        ends = np.r_[begins[1:], len(place)]
        return {tuple(sorted(set(line[a:b].tolist()))) for a, b in zip(
            begins[several & written], ends[several & written], strict=True)}  # fmt: skip

    def disturbed(self) -> set[tuple[int, int]]:
        """(line of an asynchronous operation, line of an access to the same grains before its end).

        What is written asynchronously may not be touched, what is read not be written.
        """
        if not self.touches:
            return set()
        ends = np.cumsum([0, *(len(grains) for grains, _, _ in self.touches)])
        touched = np.concatenate([grains for grains, _, _ in self.touches])
        lines = np.repeat([line for _, line, _ in self.touches], np.diff(ends))
        writing = np.repeat([writes for _, _, writes in self.touches], np.diff(ends))
        found = set()
        inside = np.zeros(self.nowhere + 1, bool)
        for begin, end, grains, line, writes in self.flights:
            part = slice(ends[begin], ends[-1 if end is None else end])
            inside[grains] = True
            hit = inside[touched[part]] & (writes | writing[part])
            found.update((line, other) for other in np.unique(lines[part][hit]).tolist())
            inside[grains] = False
        return found
