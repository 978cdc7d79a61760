"""Which threads run next.

Threads of a launch run in lockstep for as long as they take the same way. CTAs that part go on apart for good. Threads
of one CTA that part become strands: the strand that is furthest behind runs first, so that they meet again; a strand
that has to wait for others (a barrier, a shuffle with lanes that are elsewhere, a phase of an mbarrier) is put aside
until something has happened. When every strand waits, nothing ever will: a hang.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import HANG
from ptx.flow import END
from ptx.operands import Instruction
from ptx.state import Cohort, Group, Strand

LIMIT = 400_000  # segments of code that a group may run
_PATIENCE = 2_000  # segments that a strand may run before others have their turn


class NotYet(Exception):  # no error: a strand waits
    """Raised by an instruction that has to wait, before it has changed anything that running it again would repeat.

    Args:
        ready: [CTAs, threads], who need not wait.
    """

    def __init__(self, ready: Any) -> None:
        super().__init__()
        self.ready = ready


def meet(strand: Strand, members: Any, span: int = 32) -> None:
    """See that all threads that take part in an instruction have come to it.

    Args:
        strand: who is there.
        members: [CTAs or 1, threads or 1], whom the instruction names, beside threads that have ended; None for all.
        span: threads that act together: those of a warp, or of a warp group.

    Raises:
        NotYet: some are elsewhere.
    """
    if strand.mask is None:
        return
    group = strand.group
    wanted = ~group.cohort.exited[group.rows]
    if members is not None:
        wanted = wanted & members
    missing = wanted & ~strand.mask
    spans = np.add.reduceat(missing, np.arange(0, group.threads, span), axis=1) > 0
    late = np.repeat(spans, span, axis=1)[:, : group.threads]
    if (late & strand.mask).any():
        raise NotYet(strand.mask & ~late)


def run(cohort: Cohort) -> None:
    """Run all threads of a cohort to their end."""
    program = cohort.launch.program
    first = Group(cohort, np.arange(len(cohort.ctas)))
    first.strands = [Strand(first, 0, None, list(program.translator.poison))]
    groups = [first]
    while groups:
        group = groups.pop()
        budget = LIMIT
        while group.strands:
            strand = group.strands[0]
            if len(group.strands) == 1 and strand.mask is None:
                groups += _together(group, strand)
            else:
                _apart(group)
            budget -= 1
            if budget == 0:
                raise group.launch.findings.fail(HANG, program.instruction(strand.at), f"no end after {LIMIT} blocks")


def _together(group: Group, strand: Strand) -> list[Group]:
    """All threads run a block. Gives the CTAs that part from the rest as groups of their own."""
    at = strand.at
    function, length = group.launch.program.translator.function(at, True)
    group.launch.executed += length
    after = function(strand)
    if isinstance(after, int):
        strand.at = after
    else:
        condition, taken, other = after
        if condition.all():
            strand.at = taken
        elif not condition.any():
            strand.at = other
        elif condition.shape[1] == 1 or (condition == condition[:, :1]).all():
            _parted(group, at + length)
            return [_leave(group, strand, ~condition[:, 0], other), *_stay(group, strand, condition[:, 0], taken)]
        else:
            _parted(group, at + length)
            condition = strand.full(condition)
            group.strands = [
                Strand(group, taken, condition, list(strand.registers)),
                Strand(group, other, ~condition, list(strand.registers)),
            ]
            _ended(group)
            return []
    if strand.at == END:
        group.cohort.exited[group.rows] = True
        group.strands = []
    return []


def _parted(group: Group, end: int) -> None:
    """Threads part at a branch, the last instruction before `end`."""
    group.launch.partial.add(group.launch.program.instruction(end - 1).line)


def _leave(group: Group, strand: Strand, rows: Any, at: int) -> Group:
    new = Group(group.cohort, group.rows[rows])
    registers = [each if each.shape[0] == 1 else np.ascontiguousarray(each[rows]) for each in strand.registers]
    new.strands = [Strand(new, at, None, registers)]
    if at == END:
        group.cohort.exited[new.rows] = True
        new.strands = []
    return new


def _stay(group: Group, strand: Strand, rows: Any, at: int) -> list[Group]:
    group.strands = []
    return [_leave(group, strand, rows, at)]


# ---------------------------------------------------------------------------------------------------------- strands


def _apart(group: Group) -> None:
    """One strand runs up to where it may have to wait for others."""
    events = group.events
    ready = [each for each in group.strands if each.parked < events]
    if not ready:
        raise _hang(group)
    strand = min(ready, key=lambda each: (each.turns // _PATIENCE, each.at))
    strand.turns += 1
    at = strand.at
    function, length = group.launch.program.translator.function(at, False)
    try:
        after = function(strand)
    except NotYet as wait:
        strand.parked = events
        if wait.ready.any():
            strand.parked = -1
            others = Strand(group, strand.at, strand.mask & ~wait.ready, list(strand.registers))
            others.parked = events
            strand.mask = wait.ready
            group.strands.append(others)
        return
    group.launch.executed += length
    group.events += 1
    if isinstance(after, int):
        strand.at = after
    else:
        condition, taken, other = after
        mask = strand.full(True) if strand.mask is None else strand.mask
        stays, leaves = mask & condition, mask & ~condition
        strand.at = taken if stays.any() else other
        if stays.any() and leaves.any():
            _parted(group, at + length)
            strand.mask = stays
            new = Strand(group, other, leaves, list(strand.registers))
            new.turns = strand.turns
            group.strands.append(new)
    _ended(group)
    _merge(group)


def _ended(group: Group) -> None:
    for each in [each for each in group.strands if each.at == END]:
        rows = group.cohort.exited[group.rows]
        group.cohort.exited[group.rows] = rows | (True if each.mask is None else each.mask)
        group.strands.remove(each)


def _merge(group: Group) -> None:
    """Strands that are at the same instruction become one."""
    met: dict[int, Strand] = {}
    for strand in group.strands:
        other = met.setdefault(strand.at, strand)
        if other is strand:
            continue
        for slot in group.launch.program.live(strand.at):
            a, b = other.registers[slot], strand.registers[slot]
            if a is not b:
                other.registers[slot] = np.where(strand.mask, b, a)
        other.mask = other.mask | strand.mask
        other.parked, other.turns = -1, min(other.turns, strand.turns)
    group.strands = list(met.values())
    for strand in group.strands:
        if strand.mask is not None and strand.mask.all():
            strand.mask = None


def _hang(group: Group) -> Exception:
    waiting = []
    instruction: Instruction | None = None
    for strand in group.strands:
        instruction = group.launch.program.instruction(strand.at)
        mask = strand.full(True) if strand.mask is None else strand.mask
        row, thread = (int(each[0]) for each in np.nonzero(mask))
        waiting.append(f"thread {thread} of program {int(group.ctas[row])} at {instruction}")
    assert instruction is not None
    return group.launch.findings.fail(HANG, instruction, "; ".join(waiting))
