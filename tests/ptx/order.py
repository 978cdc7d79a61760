"""Which accesses to shared memory happen before which: how races between warps are found.

Every access gets a stamp, the time of a clock that ticks at each synchronisation. A warp knows another's accesses up to
some stamp: a barrier of the whole block raises the `floor` of all its warps to now; what orders fewer of them (named
barriers, mbarriers) raises what these few know of each other, their vector clocks. An access races with an earlier one
of another warp, at least one of them a write, if it does not know its stamp. Races within a warp are not looked for.

Three more shadows follow what is asynchronous: bytes that a copy in flight will write, bytes that a wgmma in flight
reads, and which writes of threads a proxy fence has made visible to the asynchronous proxy (wgmma, TMA).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import FLIGHT, PROXY, RACE
from ptx.operands import Instruction

_GRAINS = {1: 0, 2: 1, 4: 2}


class Order:
    """Shadows of the shared memory of some CTAs.

    Args:
        count: CTAs.
        warps: in each of them.
        nbytes: shared memory of each.
        grain: bytes that are told apart, the kernel's smallest access.
    """

    def __init__(self, count: int, warps: int, nbytes: int, grain: int) -> None:
        self.warps, self.shift = warps, _GRAINS[grain]
        self.each = max(1, nbytes >> self.shift)  # grains of a CTA
        self.nowhere = count * self.each  # a grain that idle threads touch
        size = self.nowhere + 1
        self.now = 1
        self.floor = np.zeros(count, "u4")
        self.writer = np.zeros(size, "u1")  # warp + 1, warps + 1 for the asynchronous proxy
        self.written = np.zeros(size, "u4")  # its stamp
        self.atomic = np.zeros(size, "u1")  # whether it was an atomic one
        self.read = np.zeros(size, "u4")  # stamp of the latest read of any warp
        self.reads = np.zeros((warps, size), "u4")  # and of each warp
        self.arriving = np.zeros(size, "u1")  # copies in flight that will write here
        self.leaving = np.zeros(size, "u2")  # asynchronous reads in flight from here
        # what each warp knows of every other, and of the asynchronous proxy, beyond the floor; what of it is fenced
        self.known = np.zeros((count, warps, warps + 1), "u4")
        self.fenced = np.zeros((count, warps, warps + 1), "u4")
        self.flat = self.reads.reshape(-1)

    # ----------------------------------------------------------------------------------------------- synchronisation

    def tick(self) -> None:
        self.now += 1

    def barrier(self, rows: Any) -> None:
        """All warps of the CTAs `rows` have met."""
        self.floor[rows] = self.now
        self.fenced[rows] = self.fenced[rows].max(1, keepdims=True)
        self.tick()

    def clocks(self, row: int, warp: int) -> tuple[Any, Any]:
        """What a warp knows now, itself included: to be handed on by what it arrives at."""
        known = np.maximum(self.known[row, warp], self.floor[row])
        known[warp] = self.now
        return known, self.fenced[row, warp].copy()

    def learn(self, row: int, warps: Any, clocks: tuple[Any, Any]) -> None:
        """Warps of a CTA come to know what others knew at their arrival."""
        self.known[row, warps] = np.maximum(self.known[row, warps], clocks[0])
        self.fenced[row, warps] = np.maximum(self.fenced[row, warps], clocks[1])

    def fence(self, rows: Any, warps: Any) -> None:
        """fence.proxy.async: writes that the fencing warps know are visible to the asynchronous proxy."""
        rows, warps = rows[:, None], warps[None, :]
        known = np.maximum(self.known[rows, warps], self.floor[rows][..., None])
        known[:, np.arange(warps.shape[1]), warps[0]] = self.now
        self.fenced[rows, warps] = np.maximum(self.fenced[rows, warps], known)
        self.tick()

    # -------------------------------------------------------------------------------------------------------- checks

    def _late(self, stamps: Any, others: Any, rows: Any, warps: Any) -> Any:
        """Where accesses with these stamps by other warps are not known to have happened before."""
        late = stamps > self.floor[rows]
        if not late.any():
            return late
        late &= others != warps
        if not late.any():
            return late
        return late & (stamps > self.known[rows, warps, np.minimum(others, self.warps)])

    def _unread(self, grains: Any, rows: Any, warps: Any) -> Any:
        """Where another warp's read is not known to have happened before."""
        late = self.read[grains] > self.floor[rows]
        if not late.any():
            return late
        found = np.zeros(np.broadcast_shapes(late.shape, np.shape(warps)), bool)
        for other in range(self.warps):
            found |= self._late(self.reads[other][grains], np.uint8(other), rows, warps)
        return found

    def _say(self, kind: str, launch: Any, instruction: Instruction, what: str, grains: Any, bad: Any) -> None:
        grains, bad = np.broadcast_arrays(grains, bad)
        at = int(grains[bad].flat[0])
        by = int(self.writer[at]) - 1
        last = "nobody" if by < 0 else "the asynchronous proxy" if by == self.warps else f"warp {by}"
        byte = (at % self.each) << self.shift
        launch.findings.add(kind, instruction, f"{what} at byte {byte} of shared memory, last written by {last}")

    def on_read(self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any) -> None:
        """Threads read; arrays of equal shape: grains, rows of their CTAs, their warps."""
        late = self._late(self.written[grains], self.writer[grains] - np.uint8(1), rows, warps)
        if late.any():
            self._say(RACE, launch, instruction, "reads what another warp writes", grains, late)
        arriving = self.arriving[grains] > 0
        if arriving.any():
            self._say(FLIGHT, launch, instruction, "reads what a copy in flight writes", grains, arriving)
        self.read[grains] = self.now
        self.flat[grains + warps * np.int64(self.nowhere + 1)] = self.now
        self.read[self.nowhere] = self.reads[:, self.nowhere] = 0

    def on_write(
        self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any, changed: Any, lost: Any
    ) -> None:
        """Threads write. `changed`: where the value is another than before; `lost`: where another thread's stayed."""
        late = self._late(self.written[grains], self.writer[grains] - np.uint8(1), rows, warps) & changed
        if late.any():
            self._say(RACE, launch, instruction, "writes over another warp's write", grains, late)
        unread = self._unread(grains, rows, warps) & changed
        if unread.any():
            self._say(RACE, launch, instruction, "writes what another warp reads", grains, unread)
        arriving = self.arriving[grains] > 0
        if arriving.any():
            self._say(FLIGHT, launch, instruction, "writes where a copy in flight writes", grains, arriving)
        leaving = (self.leaving[grains] > 0) & changed
        if leaving.any():
            self._say(FLIGHT, launch, instruction, "writes what is read asynchronously", grains, leaving)
        self.stamp(grains, warps)
        if lost is not None:
            clash = lost & (self.writer[grains] != warps + 1)
            if clash.any():
                self._say(RACE, launch, instruction, "two warps write different values", grains, clash)

    def on_atomic(self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any) -> None:
        """Threads read and write in one: ordered among each other, but not after plain accesses of other warps."""
        late = self._late(self.written[grains], self.writer[grains] - np.uint8(1), rows, warps)
        late &= self.atomic[grains] == 0
        if late.any():
            self._say(RACE, launch, instruction, "changes what another warp writes", grains, late)
        unread = self._unread(grains, rows, warps) & (self.atomic[grains] == 0)
        if unread.any():
            self._say(RACE, launch, instruction, "changes what another warp reads", grains, unread)
        if ((self.arriving[grains] > 0) | (self.leaving[grains] > 0)).any():
            flying = (self.arriving[grains] > 0) | (self.leaving[grains] > 0)
            self._say(FLIGHT, launch, instruction, "changes what is in flight", grains, flying)
        self.stamp(grains, warps)
        self.atomic[grains] = 1

    def on_copy(self, launch: Any, instruction: Instruction, grains: Any, rows: Any, warps: Any) -> None:
        """A copy is issued that will write here; warps: of the threads that issue it."""
        late = self._late(self.written[grains], self.writer[grains] - np.uint8(1), rows, warps)
        if late.any():
            self._say(RACE, launch, instruction, "copies over another warp's write", grains, late)
        unread = self._unread(grains, rows, warps)
        if unread.any():
            self._say(RACE, launch, instruction, "copies over what another warp reads", grains, unread)
        flying = (self.arriving[grains] > 0) | (self.leaving[grains] > 0)
        if flying.any():
            self._say(FLIGHT, launch, instruction, "copies where something is in flight", grains, flying)
        self.arriving[grains] = 1
        self.arriving[self.nowhere] = 0

    def landed(self, grains: Any, warps: Any) -> None:
        """A copy has written, as a write of these warps (or of the asynchronous proxy: number `warps`)."""
        self.arriving[grains] = 0
        self.stamp(grains, warps)

    def stamp(self, grains: Any, warps: Any) -> None:
        self.writer[grains] = warps + 1
        self.atomic[grains] = 0
        self.written[grains] = self.now
        self.writer[self.nowhere] = self.written[self.nowhere] = 0

    def on_async_read(
        self, launch: Any, instruction: Instruction, grains: Any, row: int, first: int, last: int
    ) -> None:
        """Warps first .. last - 1 of one CTA begin an asynchronous read together; grains without repetition."""
        stamps, writers = self.written[grains], self.writer[grains].astype("i8") - 1
        if (self.arriving[grains] > 0).any():
            bad = self.arriving[grains] > 0
            self._say(FLIGHT, launch, instruction, "reads what a copy in flight writes", grains, bad)
        late = np.zeros(grains.shape, bool)
        for warp in range(first, last):
            late |= self._late(stamps, writers, row, warp)
        if late.any():
            self._say(RACE, launch, instruction, "reads what a warp writes", grains, late)
        generic = (writers >= 0) & (writers < self.warps)
        unseen = generic & (stamps > self.fenced[row, first, np.maximum(writers, 0)])
        if unseen.any():
            self._say(PROXY, launch, instruction, "reads what a thread wrote", grains, unseen)
        self.leaving[grains] += 1

    def async_read_ended(self, grains: Any, first: int, last: int) -> None:
        self.leaving[grains] -= 1
        self.read[grains] = self.now
        self.reads[first:last, grains] = self.now
