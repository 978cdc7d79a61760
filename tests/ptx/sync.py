"""Barriers of a block, fences, and mbarriers: what orders the accesses of different warps.

An mbarrier lies in shared memory. Its phase ends when as many threads have arrived as it was initialised for, and as
many bytes have been copied as `expect_tx` announced; then the next phase begins. Who waits names the parity of the
phase that has to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import FLIGHT, HANG, UNDEFINED
from ptx.operands import Immediate, Instruction
from ptx.schedule import NotYet, meet
from ptx.spaces import grains, shared_offset
from ptx.state import SHARED, Cohort, Group, Strand
from ptx.step import Step, define, number, register

# -------------------------------------------------------------------------------------------------------- barriers


class Barrier:
    """One of a block's 16 barriers, in every CTA of a cohort."""

    def __init__(self, cohort: Cohort) -> None:
        count = len(cohort.ctas)
        self.arrived = np.zeros(count, "i8")
        self.generation = np.zeros(count, "i8")
        self.ticket = np.full((count, cohort.threads), -1, "i8")  # the generation that a thread waits for
        self.clocks: dict[int, Any] = {}  # by row: what those who arrived know
        self.ended: dict[tuple[int, int], Any] = {}  # by row and generation: what they knew then
        self.votes = np.zeros(count, "i8")  # threads that came with a predicate that holds, for bar.red
        self.counted: dict[tuple[int, int], int] = {}  # by row and generation: how many there were


def later(a: Any, b: Any) -> Any:
    """What two know together: clocks of `Order.clocks`; the first may be None."""
    return b if a is None else tuple(np.maximum(x, y) for x, y in zip(a, b, strict=True))


def _warps(mask: Any) -> Any:
    """Which warps have a thread in a mask [threads]."""
    return np.unique(np.nonzero(mask)[0] // 32)


def arrive(
    strand: Strand, name: int, expected: int | None, waits: bool, instruction: Instruction, votes: Any = None
) -> Any:
    """bar.sync, bar.arrive and bar.red of some of a block's threads.

    Returns:
        For each thread, how many of those that met hold `votes`; None without.

    Raises:
        NotYet: others have to come first.
    """
    group, cohort = strand.group, strand.group.cohort
    order = cohort.order
    everyone = group.threads if expected is None else expected
    nobody = name not in cohort.barriers or not cohort.barriers[name].arrived[group.rows].any()
    if strand.mask is None and everyone == group.threads and waits and nobody:
        order.barrier(group.rows)
        return None if votes is None else strand.full(votes).sum(1, keepdims=True)
    meet(strand, None)
    barrier = cohort.barriers.setdefault(name, Barrier(cohort))
    mask = strand.full(True) if strand.mask is None else strand.mask
    passed = mask.copy()
    for line, row in enumerate(map(int, group.rows)):
        ended = int(cohort.exited[row].sum()) if expected is None else 0
        new = mask[line] & (barrier.ticket[row] < 0)
        if new.any():
            barrier.ticket[row, new] = barrier.generation[row]
            barrier.arrived[row] += int(new.sum())
            barrier.votes[row] += 0 if votes is None else int((strand.full(votes)[line] & new).sum())
            for warp in _warps(new):
                barrier.clocks[row] = later(barrier.clocks.get(row), order.clocks(row, int(warp)))
        if barrier.arrived[row] > everyone:
            raise group.launch.findings.fail(UNDEFINED, instruction, f"more than {everyone} threads at barrier {name}")
        if barrier.arrived[row] + ended >= everyone and barrier.arrived[row]:
            barrier.generation[row] += 1
            barrier.counted[row, int(barrier.generation[row])] = int(barrier.votes[row])
            barrier.arrived[row] = barrier.votes[row] = 0
            if everyone == group.threads:
                order.barrier(np.array([row]))
                barrier.clocks.pop(row, None)
            else:
                barrier.ended[row, int(barrier.generation[row])] = barrier.clocks.pop(row)
                order.tick()
        passed[line] &= barrier.ticket[row] < barrier.generation[row] if waits else True
    if (mask & ~passed).any():
        raise NotYet(passed)
    held = np.zeros((group.count, 1), "i8")
    for line, row in enumerate(map(int, group.rows)):
        who = mask[line]
        if waits and who.any():
            met = row, int(barrier.ticket[row][who][0]) + 1
            held[line] = barrier.counted[met]
            if met in barrier.ended:
                order.learn(row, _warps(who), barrier.ended[met])
        barrier.ticket[row, who] = -1
    return held if votes is not None else None


@define("bar", "barrier")
def _(i: Instruction) -> Step:
    if i.flag("warp"):
        i.one_of("sync")
        return Step(_warp_barrier, ((i.operands[0], "u4"),), machine=True, converges="warp")
    how = i.one_of("sync arrive red")
    i.flag("cta", "aligned")
    if how == "red":
        return _reduction(i)
    name = number(i, i.operands[0])
    expected = number(i, i.operands[1]) if len(i.operands) > 1 else None

    def run(strand: Strand, guard: Any) -> None:
        if guard is not None and not guard.all():
            raise i.refuse("a barrier under a guard that is off")
        arrive(strand, name, expected, how == "sync", i)

    return Step(run, machine=True, converges="barrier")


def _reduction(i: Instruction) -> Step:
    """bar.red: a barrier that counts the threads with a predicate, or says whether all or any have it."""
    how = i.one_of("popc and or")
    i.one_of("u32" if how == "popc" else "pred")
    result, barrier, *threads, predicate = i.operands
    name = number(i, barrier)
    expected = number(i, threads[0]) if threads else None

    def run(strand: Strand, votes: Any, guard: Any) -> Any:
        if guard is not None and not guard.all():
            raise i.refuse("a barrier under a guard that is off")
        held = arrive(strand, name, expected, True, i, votes)
        if how == "popc":
            return held.astype("u4")
        return held == (expected or strand.group.threads) if how == "and" else held > 0

    results = ((register(i, result), "u4" if how == "popc" else "b1"),)
    return Step(run, ((predicate, "b1"),), results, machine=True, converges="barrier")


def named_lanes(strand: Strand, members: Any) -> Any:
    """Threads whose lanes a member mask names."""
    lanes = (np.arange(strand.group.threads, dtype="u4") & np.uint32(31))[None, :]
    return (members >> lanes & np.uint32(1)).astype(bool)


def _warp_barrier(strand: Strand, members: Any, guard: Any) -> None:
    meet(strand, named_lanes(strand, members))


@define("fence")
def _(i: Instruction) -> Step:
    if not i.flag("proxy"):
        i.flag("sc", "acq_rel", "acquire", "release", "mbarrier_init")
        i.flag("cta", "cluster")
        return Step(_publish if i.flag("gpu", "sys") else lambda strand, guard: None, machine=True)
    i.one_of("async")
    i.flag("shared::cta", "shared::cluster", "global")

    def run(strand: Strand, guard: Any) -> None:
        active = strand.active(guard)
        order, group = strand.group.cohort.order, strand.group
        if active is None:
            order.fence(group.rows, np.arange(group.warps))
            return
        for line, row in enumerate(group.rows):
            warps = _warps(active[line])
            if len(warps):
                order.fence(np.array([row]), warps)

    return Step(run, machine=True)


@define("membar")
def _(i: Instruction) -> Step:
    return Step(_publish if i.one_of("cta gl sys") != "cta" else lambda strand, guard: None, machine=True)


def _publish(strand: Strand, guard: Any) -> None:
    """What these programs wrote so far may be read by those that learn of it through an atomic."""
    strand.group.launch.memory.publish(strand.group.numbers[:, 0])


# ------------------------------------------------------------------------------------------------------- mbarriers


class Mbarrier:
    """The mbarriers at one address, in every CTA of a cohort."""

    def __init__(self, cohort: Cohort) -> None:
        count = len(cohort.ctas)
        self.count, self.pending, self.bytes, self.phase = (np.zeros(count, "i8") for _ in range(4))
        self.valid = np.zeros(count, bool)
        self.clocks: dict[int, Any] = {}  # by row: what those who arrived in this phase know
        self.ended: dict[int, Any] = {}  # and in the phases that have ended
        self.copies: list[Any] = []  # (row, phase, land) of bulk copies that this phase counts

    def settle(self, cohort: Cohort, row: int) -> None:
        """End the phase, where all arrived and all bytes came."""
        if self.pending[row] == 0 and self.bytes[row] == 0:
            self.phase[row] += 1
            self.pending[row] = self.count[row]
            if row in self.clocks:
                self.ended[row] = later(self.ended.get(row), self.clocks.pop(row))

    def land(self, cohort: Cohort, row: int, phase: int) -> None:
        """Let copies of phases that a thread has waited for take effect."""
        left = []
        for copy in self.copies:
            if copy[0] == row and copy[1] <= phase:
                copy[2]()
            else:
                left.append(copy)
        if len(left) < len(self.copies):
            order = cohort.order
            known, fenced = self.ended.get(row) or order.clocks(row, 0)
            known[order.warps] = order.now
            self.ended[row] = known, fenced
            order.tick()
        self.copies = left


def mbarrier_at(group: Group, address: int, row: int, instruction: Instruction) -> Mbarrier:
    found = group.cohort.mbarriers.get(address)
    if found is None or not found.valid[row]:
        note = f"byte {address - SHARED} of shared memory is no mbarrier"
        raise group.launch.findings.fail(UNDEFINED, instruction, note)
    return found


def threads_of(strand: Strand, guard: Any) -> list[tuple[int, int]]:
    """(line of the group, thread) of those that are switched on."""
    active = strand.active(guard)
    mask = strand.full(True) if active is None else active
    return [(int(line), int(thread)) for line, thread in zip(*np.nonzero(mask), strict=True)]


def _touch(strand: Strand, address: Any, guard: Any, instruction: Instruction, writes: bool) -> None:
    """The mbarrier's own 8 bytes are memory: its use has to be ordered after its initialisation."""
    active = strand.active(guard)
    if active is not None and not active.any():
        return
    address = strand.full(address)
    offset = shared_offset(strand, address, 8, active, instruction)
    touched, rows, warps = grains(strand, offset, 8, active)
    order = strand.group.cohort.order
    if writes:
        everywhere = np.broadcast_to(True if active is None else active[..., None], touched.shape)
        order.on_write(strand.group.launch, instruction, touched, rows, warps, everywhere, None)
    else:
        order.on_read(strand.group.launch, instruction, touched, rows, warps)


@define("mbarrier")
def _(i: Instruction) -> Step:
    what = i.one_of("init inval arrive arrive_drop expect_tx try_wait test_wait")
    i.flag("shared", "shared::cta", "b64", "release", "acquire", "relaxed", "cta")
    if what in ("init", "inval"):
        return _init(i) if what == "init" else _inval(i)
    if what in ("arrive", "expect_tx"):
        return _arrive(i, i.flag("expect_tx") or what == "expect_tx", what == "arrive")
    if what in ("try_wait", "test_wait"):
        if not i.flag("parity"):
            raise i.refuse("a wait without parity")
        return _wait(i, what == "try_wait")
    raise i.refuse("form of mbarrier")


def _init(i: Instruction) -> Step:
    def run(strand: Strand, address: Any, count: Any, guard: Any) -> None:
        _touch(strand, address, guard, i, writes=True)
        address, count = strand.full(address), strand.full(count)
        for line, thread in threads_of(strand, guard):
            cohort, row = strand.group.cohort, int(strand.group.rows[line])
            barrier = cohort.mbarriers.setdefault(int(address[line, thread]), Mbarrier(cohort))
            barrier.count[row] = barrier.pending[row] = int(count[line, thread])
            barrier.phase[row] = barrier.bytes[row] = 0
            barrier.valid[row] = True
            barrier.clocks.pop(row, None)
            barrier.ended.pop(row, None)

    return Step(run, ((i.operands[0], "at"), (i.operands[1], "u4")), machine=True)


def _inval(i: Instruction) -> Step:
    def run(strand: Strand, address: Any, guard: Any) -> None:
        _touch(strand, address, guard, i, writes=True)
        address = strand.full(address)
        for line, thread in threads_of(strand, guard):
            row = int(strand.group.rows[line])
            barrier = mbarrier_at(strand.group, int(address[line, thread]), row, i)
            if any(copy[0] == row for copy in barrier.copies) or barrier.bytes[row]:
                strand.group.launch.findings.add(FLIGHT, i, "an mbarrier that copies in flight count on")
            barrier.valid[row] = False

    return Step(run, ((i.operands[0], "at"),), machine=True)


def _arrive(i: Instruction, expects: bool, arrives: bool) -> Step:
    operands = list(i.operands)
    result = register(i, operands.pop(0)) if arrives else None
    if result is not None and result.name != "_":
        raise i.refuse("the state of an arrival")
    count = operands[1] if len(operands) > 1 else Immediate(0 if expects else 1)

    def run(strand: Strand, address: Any, amount: Any, guard: Any) -> None:
        _touch(strand, address, guard, i, writes=False)
        address, amount = strand.full(address), strand.full(amount)
        cohort = strand.group.cohort
        for line, thread in threads_of(strand, guard):
            row = int(strand.group.rows[line])
            barrier = mbarrier_at(strand.group, int(address[line, thread]), row, i)
            if expects:
                barrier.bytes[row] += int(amount[line, thread])
            if arrives:
                barrier.pending[row] -= 1 if expects else int(amount[line, thread])
                barrier.clocks[row] = later(barrier.clocks.get(row), cohort.order.clocks(row, thread // 32))
                if barrier.pending[row] < 0:
                    raise strand.group.launch.findings.fail(UNDEFINED, i, "more arrivals than the mbarrier counts")
                barrier.settle(cohort, row)
        cohort.order.tick()

    return Step(run, ((operands[0], "at"), (count, "u4")), machine=True)


def _wait(i: Instruction, blocks: bool) -> Step:
    def run(strand: Strand, address: Any, parity: Any, guard: Any) -> Any:
        group, cohort = strand.group, strand.group.cohort
        address, parity = strand.full(address), strand.full(parity)
        active = strand.active(guard)
        mask = strand.full(True) if active is None else active
        done = np.zeros(mask.shape, bool)
        stuck: tuple[Mbarrier, int] | None = None
        for line, row in enumerate(map(int, group.rows)):
            threads = np.nonzero(mask[line])[0]
            for at in np.unique(address[line, threads]):
                barrier = mbarrier_at(group, int(at), row, i)
                here = threads[address[line, threads] == at]
                over = here[(barrier.phase[row] & 1) != (parity[line, here] & 1)]
                done[line, over] = True
                if len(over) < len(here):
                    stuck = barrier, row
        missing = mask & ~done
        if missing.any() and blocks:
            if strand.mask is not None:
                raise NotYet(strand.mask & ~missing)
            assert stuck is not None
            arrivals, nbytes = int(stuck[0].pending[stuck[1]]), int(stuck[0].bytes[stuck[1]])
            note = f"nobody will end the phase: {arrivals} arrivals and {nbytes} bytes are missing"
            raise group.launch.findings.fail(HANG, i, note)
        _touch(strand, address, guard, i, writes=False)
        for line, row in enumerate(map(int, group.rows)):
            threads = np.nonzero(done[line])[0]
            for at in np.unique(address[line, threads]):
                barrier = cohort.mbarriers[int(at)]
                barrier.land(cohort, row, int(barrier.phase[row]) - 1)
                if row in barrier.ended:
                    cohort.order.learn(row, np.unique(threads // 32), barrier.ended[row])
        return done

    result = register(i, i.operands[0])
    sources = ((i.operands[1], "at"), (i.operands[2], "u4"))
    return Step(run, sources, ((result, "b1"),), machine=True, converges="phase" if blocks else "")
