"""Tables of tiles: rows with their reasons, the chips that they are for, and what `make tune` tries in their place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from vitkernels.kernels.fences import fenced

Capability = tuple[int, int]
Tile = TypeVar("Tile")

NOT_MEASURED = "not yet measured"
# Whose rows a chip takes where a table has none of its own. 8.9 and 12.0 have the shared memory of 8.6, and 12.0 no
# tensor memory; 12.0 multiplies as 8.x does.
_INHERITS = {80: None, 86: 80, 89: 86, 90: 80, 100: 90, 120: 86}


def chip(capability: Capability) -> int:
    """The newest chip that tables know up to a compute capability, 8.0 or later: 90 for (9, 0), 86 for (8, 7)."""
    number = 10 * capability[0] + capability[1]
    return max(each for each in _INHERITS if each <= number)


class Row(Generic[Tile]):
    """A tile, and where it serves.

    Args:
        tile: what it says of a launch.
        why: the reason for it.
        chips: that it is for; none named, for all.
        measured: its time on one of them, once a GPU has measured it.
        limits: by the names that a table's calls have: the greatest size that it serves, or for what may be so or not
            which of the two it serves. Without a limit it serves any.
    """

    def __init__(self, tile: Tile, why: str, *chips: int, measured: str = NOT_MEASURED, **limits: int | bool) -> None:
        self.tile, self.why, self.chips, self.measured, self.limits = tile, why, chips, measured, limits

    def serves(self, call: Mapping[str, int | bool]) -> bool:
        return all(
            call[name] == limit if isinstance(limit, bool) else call[name] <= limit
            for name, limit in self.limits.items()
        )


class Table(Generic[Tile]):
    """Rows; the first one that serves a call is taken.

    Args:
        rows: in order.
        space: what `make tune` tries in a row's place: values by a field of the tile.
        prune: whether a tile of that space is worth trying.
        by_pointers: whether its kernels load operands of products by pointers, which some compilers do not fence
            (`fences`); float32 is not the tensor cores'.
    """

    def __init__(
        self,
        *rows: Row[Tile],
        space: Mapping[str, Sequence[Any]] | None = None,
        prune: Callable[[Tile], bool] = lambda tile: True,
        by_pointers: bool = False,
    ) -> None:
        self.rows, self._by_pointers = rows, by_pointers
        self._space, self._prune = space or {}, prune

    def of(self, capability: Capability) -> list[Row[Tile]]:
        """The rows of a chip: those for all, and those that name it, or the nearest one that it inherits from."""
        named: int | None = chip(capability)
        while named is not None and not any(named in row.chips for row in self.rows):
            named = _INHERITS[named]
        return [row for row in self.rows if not row.chips or named in row.chips]

    def row(self, capability: Capability, **call: int | bool) -> Row[Tile] | None:
        """The row that serves a call, or None."""
        return next((row for row in self.of(capability) if row.serves(call)), None)

    def find(self, capability: Capability, **call: int | bool) -> Tile | None:
        """The tile that serves a call, or None."""
        row = self.row(capability, **call)
        if row is None:
            return None
        exact = row.limits.get("float32") is True
        return fenced(row.tile, chip(capability)) if self._by_pointers and not exact else row.tile

    def pick(self, capability: Capability, **call: int | bool) -> Tile:
        """The tile that serves a call that the table was made for."""
        tile = self.find(capability, **call)
        assert tile is not None, f"no row serves {call}"
        return tile

    def widest(self, name: str) -> int:
        """The greatest size of that name that a row serves."""
        return max(row.limits[name] for row in self.rows)

    def candidates(self, now: Tile) -> tuple[Tile, ...]:
        """A row's tile, then those of the space; no spills are admitted to these."""
        fresh: dict[str, Any] = {"spills": 0} if hasattr(now, "spills") else {}
        grid = (dict(zip(self._space, values, strict=True)) for values in itertools.product(*self._space.values()))
        tiles = (dataclasses.replace(now, **fresh, **fields) for fields in grid)  # type: ignore[type-var]
        return tuple(dict.fromkeys((now, *filter(self._prune, tiles))))

    @contextlib.contextmanager
    def standing(self, row: Row[Tile], tile: Tile) -> Iterator[None]:
        """Another tile in a row's place, inside the block."""
        before = self.rows
        other = copy.copy(row)
        other.tile = tile
        self.rows = tuple(other if each is row else each for each in before)
        try:
            yield
        finally:
            self.rows = before
