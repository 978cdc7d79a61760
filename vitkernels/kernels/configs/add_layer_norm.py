"""Tiles of `add_layer_norm` and `add_rms_norm`. All chips have the same registers, and memory is the bound on each."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels.kernels.configs.table import Row, Table


@dataclass(frozen=True)
class RowTile:
    """How rows are held.

    Args:
        warps: so many that a thread has 8 elements or more, and bfloat16 moves in 16-byte pieces.
        rows: forward, how many a program walks; backward, how many it holds at once.
        stages: backward, 2 where the next rows are fetched while these are worked on.
        programs: backward, how many stay on a multiprocessor: as many as registers let reside, for one more would
            run alone when all others are done.
        maxnreg: backward, registers a thread, where the compiler would rather spill than take more.
        spills: bytes that the widest rows spill.
    """

    warps: int
    rows: int
    stages: int = 1
    programs: int = 0
    maxnreg: int | None = None
    spills: int = 0


# Calls have width, of a row. Vectors are read anew for each row, from L1: kept in registers they would halve the warps
# there are.
_WARP = "one warp a row: no barrier"
_BLOCK = "8 elements a thread"
LAYER_NORM_FORWARD = Table(
    Row(RowTile(warps=1, rows=1), _WARP, width=512),
    Row(RowTile(warps=1, rows=1), _WARP, width=1024),
    Row(RowTile(warps=4, rows=4), _BLOCK, width=2048),
    Row(RowTile(warps=8, rows=4), _BLOCK, width=4096),
    Row(RowTile(warps=16, rows=4), _BLOCK, width=8192),
    Row(RowTile(warps=32, rows=4), _BLOCK, width=16384),
    space={"warps": (1, 2, 4, 8), "rows": (1, 2, 4, 8)},
)
_SPACE = {"warps": (2, 4, 8), "rows": (1, 2, 4), "stages": (1, 2), "programs": (2, 3, 4, 6, 8)}
# Two rows a step share the barriers of their sums, and with the next two fetched meanwhile 27 KiB a multiprocessor are
# always in flight at D=768, where 18 hide the latency.
_TWO_ROWS = "two rows share barriers, and the next two are fetched meanwhile"
_TWO_WARPS = "two warps meet at a barrier sooner than four, and hold one row"
_ONE_ROW = "registers hold one row, and the next one is fetched meanwhile"
_ALONE = "a second stage is past sm_86's shared memory"
LAYER_NORM_BACKWARD = Table(
    Row(RowTile(warps=1, rows=2, stages=2, programs=12), _TWO_ROWS, width=256),
    Row(RowTile(warps=2, rows=2, stages=2, programs=8), _TWO_ROWS, width=512),
    Row(RowTile(warps=2, rows=1, stages=2, programs=8), _TWO_WARPS, width=1024),
    Row(RowTile(warps=8, rows=1, stages=2, programs=2, maxnreg=128), _ONE_ROW, width=2048),
    Row(RowTile(warps=16, rows=1, stages=2, programs=1), _ONE_ROW, width=4096),
    Row(RowTile(warps=16, rows=1, programs=1, spills=72), _ALONE, width=8192),
    Row(RowTile(warps=32, rows=1, programs=1, spills=1024), _ALONE, width=16384),
    space=_SPACE,
)
# with the gradients of `scale` or `row_scale`: the branch is read too, and one more vector summed
LAYER_NORM_BACKWARD_SCALED = Table(
    Row(RowTile(warps=1, rows=2, stages=2, programs=8), _TWO_ROWS, width=256),
    Row(RowTile(warps=2, rows=2, stages=2, programs=6), _TWO_ROWS, width=512),
    Row(RowTile(warps=4, rows=2, stages=2, programs=3), _TWO_ROWS, width=1024),
    Row(RowTile(warps=8, rows=1, stages=2, programs=2, maxnreg=128), _ONE_ROW, width=2048),
    Row(RowTile(warps=16, rows=1, programs=1), _ALONE, width=4096),
    Row(RowTile(warps=16, rows=1, programs=1, spills=328), _ALONE, width=8192),
    Row(RowTile(warps=32, rows=1, programs=1, spills=2048), _ALONE, width=16384),
    space=_SPACE,
)
