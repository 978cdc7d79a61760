"""The read-only registers: which thread of which program one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.state import Strand


def _full(value: int) -> Any:
    return np.full((1, 1), value, "i4")


def _thread(axis: str) -> Callable[[Strand], Any]:
    def of(strand: Strand) -> Any:
        x, y, _ = strand.group.launch.block
        number = np.arange(strand.group.threads, dtype="i4")[None, :]
        return {"x": number % x, "y": number // x % y, "z": number // (x * y)}[axis].astype("i4")

    return of


def _lane(strand: Strand) -> Any:
    return (np.arange(strand.group.threads, dtype="i4") & 31)[None, :]


def _lanes_below(strand: Strand) -> Any:
    return (np.uint32(1) << _lane(strand).astype("u4")) - np.uint32(1)


def _own(strand: Strand) -> Any:
    return np.uint32(1) << _lane(strand).astype("u4")


SPECIALS: dict[str, Callable[[Strand], Any]] = {
    "%laneid": _lane,
    "%warpid": lambda strand: (np.arange(strand.group.threads, dtype="i4") // 32)[None, :],
    "%nwarpid": lambda strand: _full(strand.group.warps),
    "%smid": lambda strand: _full(0),
    "%nsmid": lambda strand: _full(1),
    "%dynamic_smem_size": lambda strand: _full(strand.group.launch.dynamic),
    "%lanemask_eq": _own,
    "%lanemask_lt": _lanes_below,
    "%lanemask_le": lambda strand: _lanes_below(strand) | _own(strand),
    "%lanemask_gt": lambda strand: ~(_lanes_below(strand) | _own(strand)),
    "%lanemask_ge": lambda strand: ~_lanes_below(strand),
}
for _number, _axis in enumerate("xyz"):
    SPECIALS[f"%tid.{_axis}"] = _thread(_axis)
    SPECIALS[f"%ntid.{_axis}"] = lambda strand, n=_number: _full(strand.group.launch.block[n])
    SPECIALS[f"%nctaid.{_axis}"] = lambda strand, n=_number: _full(strand.group.launch.grid[n])
    SPECIALS[f"%ctaid.{_axis}"] = lambda strand, axis=_axis: strand.group.ctaid[axis].astype("i4")
