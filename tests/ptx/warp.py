"""Exchanges between the lanes of a warp: shuffles, votes, elections."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import UNDEFINED
from ptx.operands import Immediate, Instruction, Vector
from ptx.schedule import meet
from ptx.state import Strand
from ptx.step import DTYPES, Step, define, register, registers
from ptx.sync import named_lanes


def by_warp(strand: Strand, value: Any) -> Any:
    """A value of each thread as [CTAs, warps, lanes]."""
    group = strand.group
    full = strand.full(value)
    if group.threads % 32:
        full = np.pad(full, ((0, 0), (0, 32 - group.threads % 32)))
    return full.reshape(group.count, group.warps, 32)


def by_thread(strand: Strand, value: Any) -> Any:
    group = strand.group
    return value.reshape(group.count, group.warps * 32)[:, : group.threads]


def shuffle_source(mode: str, b: Any, c: Any, lane: Any) -> tuple[Any, Any]:
    """shfl: the lane that each lane reads from, and whether it is in range; by the manual's pseudocode."""
    clamp, segment = c & 0x1F, c >> 8 & 0x1F
    step = b & 0x1F
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    if mode == "up":
        source = lane - step
        inside = source >= last
    elif mode == "down":
        source = lane + step
        inside = source <= last
    elif mode == "bfly":
        source = lane ^ step
        inside = source <= last
    else:
        source = first | (step & ~segment)
        inside = source <= last
    return np.where(inside, source, lane), inside


@define("shfl")
def _(i: Instruction) -> Step:
    if not i.flag("sync"):
        raise i.refuse("a shuffle without a member mask")
    mode = i.one_of("up down bfly idx")
    i.one_of("b32")
    destinations = registers(i, i.operands[0])
    source, b, c, members = i.operands[1:]

    def run(strand: Strand, value: Any, lanes: Any, limits: Any, who: Any, guard: Any) -> Any:
        named = named_lanes(strand, who)
        meet(strand, named)
        lane = np.arange(32)[None, None, :]
        wide_lanes = lanes.astype("i8") if lanes.size == 1 else by_warp(strand, lanes).astype("i8")
        wide_limits = limits.astype("i8") if limits.size == 1 else by_warp(strand, limits).astype("i8")
        if wide_lanes.ndim < 3:
            wide_lanes = wide_lanes[..., None]
        if wide_limits.ndim < 3:
            wide_limits = wide_limits[..., None]
        whence, inside = shuffle_source(mode, wide_lanes, wide_limits, lane)
        if strand.mask is not None or guard is not None:
            _from_idle(strand, whence, guard)
        whole = by_warp(strand, value)
        if whence.shape[:2] == (1, 1):
            taken = whole[:, :, whence[0, 0]]
        else:
            taken = np.take_along_axis(whole, np.broadcast_to(whence, whole.shape), 2)
        taken = by_thread(strand, taken)
        if len(destinations) == 1:
            return taken
        return [taken, by_thread(strand, np.broadcast_to(inside, whole.shape))]

    def _from_idle(strand: Strand, whence: Any, guard: Any) -> None:
        active = by_warp(strand, strand.full(True) if strand.active(guard) is None else strand.active(guard))
        theirs = np.take_along_axis(active, np.broadcast_to(whence, active.shape), 2)
        if (active & ~theirs).any():
            strand.group.launch.findings.add(UNDEFINED, i, "reads from a lane that does not take part")

    sources = ((source, "i4"), (b, "u4"), (c, "u4"), (members, "u4"))
    results = ((destinations[0], "i4"), *((each, "b1") for each in destinations[1:]))
    return Step(run, sources, results, machine=True, converges="warp")


@define("vote")
def _(i: Instruction) -> Step:
    if not i.flag("sync"):
        raise i.refuse("a vote without a member mask")
    how = i.one_of("all any uni ballot")
    i.one_of("b32" if how == "ballot" else "pred")

    def run(strand: Strand, predicate: Any, who: Any, guard: Any) -> Any:
        named = named_lanes(strand, who)
        meet(strand, named)
        taking = strand.full(named) if strand.active(guard) is None else strand.active(guard) & named
        taking, votes = by_warp(strand, taking), by_warp(strand, predicate)
        if how == "ballot":
            bits = ((votes & taking) * (np.uint32(1) << np.arange(32, dtype="u4"))).sum(2, dtype="u4")
        else:
            every, some = (votes | ~taking).all(2), (votes & taking).any(2)
            bits = {"all": every, "any": some, "uni": every | ~some}[how]
        return by_thread(strand, np.repeat(bits[..., None], 32, 2))

    result = register(i, i.operands[0])
    sources = ((i.operands[1], "b1"), (i.operands[2], "u4"))
    return Step(run, sources, ((result, "u4" if how == "ballot" else "b1"),), machine=True, converges="warp")


@define("activemask")
def _(i: Instruction) -> Step:
    i.one_of("b32")

    def run(strand: Strand, guard: Any) -> Any:
        active = strand.active(guard)
        lanes = by_warp(strand, strand.full(True) if active is None else active)
        bits = (lanes * (np.uint32(1) << np.arange(32, dtype="u4"))).sum(2, dtype="u4")
        return by_thread(strand, np.repeat(bits[..., None], 32, 2))

    return Step(run, (), ((register(i, i.operands[0]), "u4"),), machine=True)


@define("elect")
def _(i: Instruction) -> Step:
    i.one_of("sync")
    assert isinstance(i.operands[0], Vector)
    lane, predicate = registers(i, i.operands[0])

    def run(strand: Strand, who: Any, guard: Any) -> Any:
        named = named_lanes(strand, who)
        meet(strand, named)
        first = by_warp(strand, named).argmax(2)[..., None]
        elected = np.broadcast_to(first, (strand.group.count, strand.group.warps, 32))
        chosen = elected == np.arange(32)
        return [by_thread(strand, elected.astype("i4")), by_thread(strand, chosen)]

    return Step(run, ((i.operands[1], "u4"),), ((lane, "i4"), (predicate, "b1")), machine=True, converges="warp")


@define("redux")
def _(i: Instruction) -> Step:
    i.one_of("sync")
    how = i.one_of("add min max and or xor")
    dtype = DTYPES[i.one_of("u32 s32 b32")]
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
             "xor": np.bitwise_xor}[how]  # fmt: skip
    members = i.operands[2] if len(i.operands) > 2 else Immediate(-1)

    def run(strand: Strand, value: Any, who: Any, guard: Any) -> Any:
        named = named_lanes(strand, who)
        meet(strand, named)
        taking = by_warp(strand, named)
        whole = by_warp(strand, value)
        out = np.empty(whole.shape[:2], dtype)
        for c, w in np.ndindex(out.shape):
            out[c, w] = ufunc.reduce(whole[c, w][taking[c, w]]) if taking[c, w].any() else 0
        return by_thread(strand, np.repeat(out[..., None], 32, 2))

    sources = ((i.operands[1], dtype), (members, "u4"))
    return Step(run, sources, ((register(i, i.operands[0]), dtype),), machine=True, converges="warp")
