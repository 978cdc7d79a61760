"""Tile choice: readable tables, one an op, with the reason beside each row and, once measured, the figure.

`pick` functions choose a row by shape, dtype and compute capability; no autotuning, which fails under the interpreter
and collapses under torch.compile. Rows are for one H100 unless they say otherwise; figures are "not yet measured" until
a GPU has measured them. The capability is (8, 0), (8, 6), (8, 9), (9, 0) or (10, 0); later ones take the last row.
"""

from __future__ import annotations

from dataclasses import dataclass

Capability = tuple[int, int]

# ---------------------------------------------------------------------------------------------------- add_layer_norm


@dataclass(frozen=True)
class RowTile:
    """How rows of up to `width` elements are held.

    Args:
        width: widest row it serves.
        warps: so many that a thread has 8 elements or more, and bfloat16 moves in 16-byte pieces.
        rows: forward, how many a program walks; backward, how many it holds at once.
        stages: backward, 2 where the next rows are fetched while these are worked on.
        programs: backward, how many stay on a multiprocessor: as many as registers let reside, for one more would
            run alone when all others are done.
        spills: bytes that the widest rows spill.
    """

    width: int
    warps: int
    rows: int
    stages: int = 1
    programs: int = 0
    spills: int = 0


# Vectors are read anew for each row, from L1: kept in registers they would halve the warps there are. All capabilities
# have the same registers, and memory is the bound on each. Not yet measured.
LAYER_NORM_FORWARD = (
    RowTile(512, warps=1, rows=4),
    RowTile(1024, warps=1, rows=4),  # one warp a row: no barrier
    RowTile(2048, warps=4, rows=4),
    RowTile(4096, warps=8, rows=4),
    RowTile(8192, warps=16, rows=4),
    RowTile(16384, warps=32, rows=4),
)
# Two rows a step share the barriers of their sums, and with the next two fetched meanwhile 27 KiB a multiprocessor are
# always in flight at D=768, where 18 hide the latency. Wider rows' second stage is past sm_86's shared memory. Not yet
# measured.
LAYER_NORM_BACKWARD = (
    RowTile(256, warps=1, rows=2, stages=2, programs=16),
    RowTile(512, warps=2, rows=2, stages=2, programs=6),
    RowTile(1024, warps=4, rows=2, stages=2, programs=3),
    RowTile(2048, warps=8, rows=1, stages=2, programs=3),
    RowTile(4096, warps=16, rows=1, stages=2, programs=1),
    RowTile(8192, warps=16, rows=1, programs=1),
    RowTile(16384, warps=32, rows=1, programs=1, spills=1024),
)
# With the gradients of `scale` or `row_scale`: the branch is read too, and one more vector summed. Not yet measured.
LAYER_NORM_BACKWARD_SCALED = (
    RowTile(256, warps=1, rows=2, stages=2, programs=12),
    RowTile(512, warps=2, rows=2, stages=2, programs=6),
    RowTile(1024, warps=4, rows=2, stages=2, programs=3),
    RowTile(2048, warps=8, rows=1, stages=2, programs=2),
    RowTile(4096, warps=16, rows=1, programs=1),
    RowTile(8192, warps=16, rows=1, programs=1, spills=256),
    RowTile(16384, warps=32, rows=1, programs=1, spills=2048),
)


def pick_row_tile(table: tuple[RowTile, ...], width: int) -> RowTile:
    """The first row that is wide enough."""
    return next(row for row in table if width <= row.width)


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionTile:
    """A tile of scores, queries x keys, and how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int = 2
    maxnreg: int | None = None


@dataclass(frozen=True)
class AttentionLong:
    """Tiles for any number of keys."""

    forward: AttentionTile
    dkdv: AttentionTile
    dq: AttentionTile
    delta: AttentionTile = AttentionTile(64, 0, 4, 1)


# widest padded head: tiles
_LONG_16_BIT = {
    64: AttentionLong(AttentionTile(128, 64, 8), AttentionTile(32, 64, 4), AttentionTile(64, 64, 4)),
    128: AttentionLong(AttentionTile(128, 64, 8), AttentionTile(32, 64, 4), AttentionTile(64, 64, 4, 1)),
}
# exact products run on the ordinary cores: small tiles, so that operands fit into registers
_LONG_FLOAT32 = AttentionLong(AttentionTile(32, 32, 4, 1), AttentionTile(32, 32, 4, 1), AttentionTile(32, 32, 4, 1))


def attention_widths(width: int) -> tuple[int, ...]:
    """Pieces of powers of two, 16 or more, that cover a head's width: 72 is (64, 16), 104 is (64, 32, 16)."""
    rest = -(-width // 16)
    return tuple(16 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)


def attention_keys(keys: int) -> tuple[int, ...]:
    """One or two powers of two, 16 or more, that cover the keys: the second where it spares 3/8 of the work or more."""
    whole = max(16, 1 << (keys - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << (keys - half - 1).bit_length())
    return (half, rest) if rest <= half // 4 else (whole,)


@dataclass(frozen=True)
class AttentionShort:
    """A row for up to so many keys in heads up to so wide; the forward's tile spans all keys, in `attention_keys`."""

    keys: int
    width: int
    tile: AttentionTile


_SHORT_FORWARD = (
    AttentionShort(128, 128, AttentionTile(64, 0, 4, 1)),
    AttentionShort(256, 64, AttentionTile(64, 0, 4, 1, maxnreg=168)),  # 3 programs a multiprocessor; 186 without
    AttentionShort(272, 96, AttentionTile(64, 0, 4, 1)),  # wider heads or more keys spill
)
# dk and dv of all keys stay in registers: 255 of them at 256 keys of 64, which no other row may add to
_SHORT_BACKWARD = (
    AttentionShort(64, 128, AttentionTile(32, 64, 4)),
    AttentionShort(128, 128, AttentionTile(32, 128, 8)),
    AttentionShort(256, 64, AttentionTile(32, 256, 8)),
)


def attention_short_forward(keys: int, width: int, float32: bool, capability: Capability) -> AttentionTile | None:
    """The row for few keys, or None where the long kernels serve."""
    return None if float32 else _first(_SHORT_FORWARD, keys, width)


def attention_short_backward(keys: int, width: int, float32: bool, capability: Capability) -> AttentionTile | None:
    return None if float32 else _first(_SHORT_BACKWARD, keys, width)


def _first(rows: tuple[AttentionShort, ...], keys: int, width: int) -> AttentionTile | None:
    return next((row.tile for row in rows if keys <= row.keys and width <= row.width), None)


def attention_long(width: int, float32: bool, capability: Capability) -> AttentionLong:
    """The row for heads of a width up to 128."""
    if float32:
        return _LONG_FLOAT32
    return next(row for widest, row in _LONG_16_BIT.items() if sum(attention_widths(width)) <= widest)


# ---------------------------------------------------------------------------------------------------------------- mlp

# -------------------------------------------------------------------------------------------------------- patch_embed


@dataclass(frozen=True)
class PatchEmbedTile:
    """A tile of a product, rows x columns, the depth of one step of its loop, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


PATCH_EMBED_DEPTH = 64  # what a patch is padded to: 128 bytes of bf16, the widest row that wgmma reads in one piece

_PATCH_EMBED_16_BIT = {
    "embed": PatchEmbedTile(128, 128, 64, 8, 3),
    "weight_gradient": PatchEmbedTile(128, 128, 64, 8, 3),
    "image_gradient": PatchEmbedTile(128, 128, 64, 8, 3),
}
_PATCH_EMBED_FLOAT32 = {
    "embed": PatchEmbedTile(64, 64, 32, 8, 2),
    "weight_gradient": PatchEmbedTile(64, 64, 32, 8, 2),
    "image_gradient": PatchEmbedTile(64, 64, 32, 8, 2),
}
PATCH_EMBED_SUM = PatchEmbedTile(16, 256, 0, 4, 1)


def patch_embed(kernel: str, float32: bool, capability: Capability) -> PatchEmbedTile:
    """The row for one of the kernels that multiply."""
    return (_PATCH_EMBED_FLOAT32 if float32 else _PATCH_EMBED_16_BIT)[kernel]
