"""Tables of tiles: which row serves a call on a chip, and what stands in one for a while."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the tables stand beside Triton's kernels, and triton is not installed", allow_module_level=True)

from vitkernels.kernels import configs
from vitkernels.kernels.configs import AttentionTile, Row, Table

TILE = AttentionTile(64, 32, 4)
TABLES = {
    f"{name} {key}": table
    for name in configs.__all__
    for key, table in (lambda found: found.items() if isinstance(found, dict) else [("", found)])(
        getattr(configs, name)
    )
    if isinstance(table, Table)
}


def tile(queries: int) -> AttentionTile:
    return replace(TILE, queries=queries)


@pytest.mark.parametrize(
    ("capability", "chip"),
    [((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 0), 120)],
)
def test_the_chip_of_a_capability(capability: tuple[int, int], chip: int) -> None:
    assert configs.chip(capability) == chip


def test_a_chip_without_rows_takes_those_of_the_one_that_it_resembles() -> None:
    table = Table(Row(tile(1), "", 80), Row(tile(2), "", 86), Row(tile(3), "", 90))
    for capability, queries in (((8, 0), 1), ((8, 6), 2), ((8, 9), 2), ((9, 0), 3), ((10, 0), 3), ((12, 0), 2)):
        assert table.pick(capability).queries == queries, capability
    own = Table(*table.rows, Row(tile(4), "", 120))
    assert own.pick((12, 0)).queries == 4
    assert own.pick((8, 9)).queries == 2


def test_the_first_row_that_serves_is_taken() -> None:
    table = Table(
        Row(tile(1), "", width=64, masked=False),
        Row(tile(2), "", width=64),
        Row(tile(3), "", width=128, masked=True),
    )
    assert table.pick((9, 0), width=64, masked=False).queries == 1
    assert table.pick((9, 0), width=8, masked=True).queries == 2
    assert table.pick((9, 0), width=65, masked=True).queries == 3
    assert table.find((9, 0), width=65, masked=False) is None
    assert table.find((9, 0), width=129, masked=True) is None
    assert table.widest("width") == 128


def test_candidates_are_the_tile_and_what_is_worth_trying() -> None:
    now = replace(TILE, spills=8)
    table = Table(Row(now, ""), space={"queries": (32, 64), "keys": (32, 64)}, prune=lambda each: each.keys <= 32)
    assert table.candidates(now) == (now, replace(TILE, queries=32), TILE)


def test_what_stands_in_a_row_leaves_with_the_block() -> None:
    table = Table(Row(tile(1), "", width=64), Row(tile(2), "", width=128))
    row = table.row((9, 0), width=100)
    assert row is not None
    with table.standing(row, tile(9)):
        assert [table.pick((9, 0), width=each).queries for each in (64, 128)] == [1, 9]
    assert table.pick((9, 0), width=128).queries == 2


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_its_reason_and_can_be_reached(name: str) -> None:
    """A row that another one before it serves wholly would never be taken."""
    rows = TABLES[name].rows
    for index, row in enumerate(rows):
        assert row.why
        for other in rows[:index]:
            chips = not other.chips or set(row.chips or (0,)) <= set(other.chips)
            covered = all(
                (row.limits[limit] == most if isinstance(most, bool) else row.limits[limit] <= most)
                if limit in row.limits
                else False
                for limit, most in other.limits.items()
            )
            assert not (chips and covered), f"{row.tile} behind {other.tile}"
