"""Proxy fences: what Triton's compiler leaves out before version 3.7.1, and tiles that do without.

From sm_90 on, a product reads its operands out of shared memory through the asynchronous proxy, so what `cp.async`
wrote there through the generic one has to be fenced (`fence.proxy.async`) first. Triton before 3.7.1 fences ordinary
stores alone (triton #9610), so the order holds by luck of timing. Operands come by `cp.async` where a loop is
pipelined; in one stage they pass through registers and are stored, which every version fences. What the copy engine
(TMA) brings needs no fence.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, TypeVar

import triton

Tile = TypeVar("Tile")

_READS_SHARED_MEMORY = (90, 100)  # chips whose tensor cores do; those of others read registers
FENCED = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) >= (3, 7, 1)


def fenced(tile: Tile, chip: int) -> Tile:
    """The tile, or row of tiles, in one stage where the compiler would leave out the fences of more.

    Args:
        tile: a row of `configs` whose kernels load by pointers.
        chip: as `configs.chip` has it.
    """
    return tile if FENCED or chip not in _READS_SHARED_MEMORY else _in_one_stage(tile)


@functools.cache
def _in_one_stage(tile: Any) -> Any:
    """With `stages` of 1, also in the tiles that are its fields."""
    values = {field.name: getattr(tile, field.name) for field in dataclasses.fields(tile)}
    changed = {name: _in_one_stage(value) for name, value in values.items() if hasattr(value, "stages")}
    return dataclasses.replace(tile, **changed, **({"stages": 1} if "stages" in values else {}))
