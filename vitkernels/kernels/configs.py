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
        num_warps: 8 elements or more a thread, so that bfloat16 moves in 16-byte pieces.
        rows: forward, how many a program walks; backward, how many it holds at once.
        programs: backward, how many stay on a multiprocessor: what registers let reside on sm_90.
    """

    width: int
    num_warps: int
    rows: int
    programs: int = 0


LAYER_NORM_FORWARD = (
    RowTile(512, num_warps=1, rows=4),
    RowTile(1024, num_warps=1, rows=4),
    RowTile(2048, num_warps=4, rows=4),
    RowTile(4096, num_warps=8, rows=4),
    RowTile(8192, num_warps=8, rows=4),
    RowTile(16384, num_warps=16, rows=4),
)
LAYER_NORM_BACKWARD = (
    RowTile(256, num_warps=1, rows=4, programs=8),
    RowTile(512, num_warps=2, rows=2, programs=8),
    RowTile(1024, num_warps=4, rows=2, programs=4),
    RowTile(2048, num_warps=8, rows=1, programs=2),
    RowTile(4096, num_warps=16, rows=1, programs=1),
    RowTile(8192, num_warps=32, rows=1, programs=1),
    RowTile(16384, num_warps=32, rows=1, programs=1),
)
WIDEST_ROW = 16384


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
