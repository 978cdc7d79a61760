"""Tile choice: readable tables, one an op, with the reason beside each row and, once measured, the figure.

`pick` functions choose a row by shape, dtype and compute capability; no autotuning, which fails under the interpreter
and collapses under torch.compile. Rows are for one H100 unless they say otherwise; figures are "not yet measured" until
a GPU has measured them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitkernels.kernels.fences import fenced

Capability = tuple[int, int]


def chip(capability: Capability) -> int:
    """Whose rows serve: 80, 86, 90 or 100; 8.9 and 12.x have the shared memory of 8.6, and no tensor memory."""
    number = capability[0] * 10 + capability[1]
    return 86 if number >= 120 else max(chip for chip in (80, 86, 90, 100) if chip <= number)


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
        maxnreg: backward, registers a thread, where the compiler would rather spill than take more.
        spills: bytes that the widest rows spill.
    """

    width: int
    warps: int
    rows: int
    stages: int = 1
    programs: int = 0
    maxnreg: int | None = None
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
    RowTile(256, warps=1, rows=2, stages=2, programs=12),
    RowTile(512, warps=2, rows=2, stages=2, programs=6),
    RowTile(1024, warps=4, rows=2, stages=2, programs=3),
    RowTile(2048, warps=8, rows=1, stages=2, programs=2, maxnreg=128),
    RowTile(4096, warps=16, rows=1, stages=2, programs=1),
    RowTile(8192, warps=16, rows=1, programs=1, spills=64),
    RowTile(16384, warps=32, rows=1, programs=1, spills=1024),
)
# With the gradients of `scale` or `row_scale`: the branch is read too, and one more vector summed. Not yet measured.
LAYER_NORM_BACKWARD_SCALED = (
    RowTile(256, warps=1, rows=2, stages=2, programs=8),
    RowTile(512, warps=2, rows=2, stages=2, programs=6),
    RowTile(1024, warps=4, rows=2, stages=2, programs=3),
    RowTile(2048, warps=8, rows=1, stages=2, programs=2, maxnreg=128),
    RowTile(4096, warps=16, rows=1, programs=1),
    RowTile(8192, warps=16, rows=1, programs=1, spills=320),
    RowTile(16384, warps=32, rows=1, programs=1, spills=2048),
)


def pick_row_tile(table: tuple[RowTile, ...], width: int) -> RowTile:
    """The first row that is wide enough."""
    return next(row for row in table if width <= row.width)


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionTile:
    """A tile of scores, queries x keys, how it is launched, and the bytes of spilled registers that it admits."""

    queries: int
    keys: int
    warps: int
    stages: int = 2
    maxnreg: int | None = None
    spills: int = 0


@dataclass(frozen=True)
class AttentionLong:
    """Tiles for any number of keys; `ds` is dq's where the gradient of the scores is stored, for a mask's."""

    forward: AttentionTile
    dkdv: AttentionTile
    dq: AttentionTile
    ds: AttentionTile
    delta: AttentionTile = AttentionTile(64, 0, 4, 1)


# widest padded head: tiles
_LONG_SM_90 = {
    64: AttentionLong(
        AttentionTile(128, 64, 8), AttentionTile(32, 64, 4), AttentionTile(64, 64, 4), AttentionTile(64, 32, 4)
    ),
    96: AttentionLong(
        AttentionTile(128, 64, 8), AttentionTile(32, 64, 4), AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4)
    ),
    128: AttentionLong(
        AttentionTile(128, 64, 8), AttentionTile(32, 64, 4), AttentionTile(64, 64, 4, 1), AttentionTile(32, 32, 4)
    ),
}
# before sm_90 operands take registers too, and a mask more of them: smaller tiles, or fetched without a second stage
_LONG_SM_80 = {
    80: AttentionLong(
        AttentionTile(128, 64, 8),
        AttentionTile(32, 64, 4, 1),
        AttentionTile(64, 32, 4, spills=8),  # 0 but where keys are hidden from heads 32 wide
        AttentionTile(32, 32, 4),
    ),
    96: AttentionLong(
        AttentionTile(128, 64, 8), AttentionTile(16, 64, 4), AttentionTile(64, 32, 4), AttentionTile(32, 32, 4)
    ),
    128: AttentionLong(
        AttentionTile(128, 32, 8),
        AttentionTile(32, 64, 8),
        AttentionTile(64, 32, 4, 1, spills=8),  # 0 but for 104-wide heads
        AttentionTile(32, 32, 4),
    ),
}
LONG = {80: _LONG_SM_80, 86: _LONG_SM_80, 90: _LONG_SM_90, 100: _LONG_SM_90}
# exact products run on the ordinary cores: small tiles, so that operands fit into registers
_EXACT = AttentionTile(16, 32, 4, 1)
_LONG_FLOAT32 = {
    64: AttentionLong(AttentionTile(32, 32, 4, 1), _EXACT, AttentionTile(32, 32, 4, 1), _EXACT),
    128: AttentionLong(_EXACT, _EXACT, AttentionTile(32, 16, 4, 1), AttentionTile(16, 16, 8, 1)),
}


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
    """A row for up to so many keys in heads up to so wide; the forward's tile spans all keys, in `attention_keys`.

    `masked` says whether it also serves calls that are causal or hide keys, which take more registers.
    """

    keys: int
    width: int
    tile: AttentionTile
    masked: bool = True


_SHORT_FORWARD_SM_80 = (
    AttentionShort(128, 96, AttentionTile(64, 0, 4, 1)),
    AttentionShort(128, 128, AttentionTile(64, 0, 4, 1), masked=False),
    AttentionShort(208, 64, AttentionTile(64, 0, 4, 1), masked=False),
    AttentionShort(208, 80, AttentionTile(64, 0, 8, 1), masked=False),
    AttentionShort(256, 48, AttentionTile(16, 0, 4, 1)),
    AttentionShort(256, 64, AttentionTile(32, 0, 4, 1)),  # 257 keys spill, and so do wider heads
)
SHORT_FORWARD: Mapping[int, tuple[AttentionShort, ...]] = {
    80: _SHORT_FORWARD_SM_80,
    86: _SHORT_FORWARD_SM_80,
    90: (
        AttentionShort(128, 128, AttentionTile(64, 0, 4, 1)),
        AttentionShort(256, 48, AttentionTile(64, 0, 4, 1)),
        # 3 programs a multiprocessor; 186 registers without. 197 keys spill 8 bytes, 196 keys 16
        AttentionShort(208, 64, AttentionTile(64, 0, 4, 1, maxnreg=168, spills=16), masked=False),
        AttentionShort(256, 80, AttentionTile(64, 0, 4, 1)),
        AttentionShort(272, 96, AttentionTile(64, 0, 4, 1), masked=False),  # more keys spill, and so do wider heads
    ),
    100: (
        AttentionShort(128, 128, AttentionTile(64, 0, 4, 1)),
        AttentionShort(256, 48, AttentionTile(64, 0, 8, 1)),
        AttentionShort(272, 64, AttentionTile(64, 0, 4, 1), masked=False),
        AttentionShort(256, 96, AttentionTile(64, 0, 8, 1)),
        AttentionShort(272, 96, AttentionTile(64, 0, 8, 1), masked=False),
    ),
}
# dk and dv of all keys stay in registers: 255 of them at 256 keys of 64. Where tiles of 32 queries spill, tiles of 16,
# or one stage: the next queries are fetched later, and their addresses need no registers meanwhile.
_SHORT_BACKWARD_SM_86 = (  # within 99 KiB of shared memory
    AttentionShort(64, 80, AttentionTile(32, 64, 4, 1)),
    AttentionShort(64, 104, AttentionTile(32, 64, 8, 1)),
    AttentionShort(64, 128, AttentionTile(16, 64, 8, 1)),
    AttentionShort(128, 64, AttentionTile(32, 128, 8)),
)
SHORT_BACKWARD: Mapping[int, tuple[AttentionShort, ...]] = {
    80: (
        *_SHORT_BACKWARD_SM_86,
        AttentionShort(128, 128, AttentionTile(16, 128, 8, 1, spills=56)),  # 0 but for 104-wide heads
        AttentionShort(256, 64, AttentionTile(16, 256, 8, 1, spills=8)),  # 0 where no keys are hidden
    ),
    86: _SHORT_BACKWARD_SM_86,
    90: (
        # so few keys leave registers of a product's operand constant, and the next value is put there in a pipelined
        # loop while the product is in flight
        AttentionShort(8, 96, AttentionTile(32, 64, 4, 1)),
        AttentionShort(64, 96, AttentionTile(32, 64, 4)),
        # 0 but for 104-wide heads by triton 3.6
        AttentionShort(64, 128, AttentionTile(32, 64, 4, 1, spills=8)),
        AttentionShort(128, 128, AttentionTile(32, 128, 8, spills=8)),
        # 8 bytes by triton 3.7, to 40 by 3.6; none in tiles of 16 queries, which feed the tensor cores half as well
        AttentionShort(256, 64, AttentionTile(32, 256, 8, spills=40)),
    ),
    100: (
        AttentionShort(64, 64, AttentionTile(32, 64, 4)),
        AttentionShort(64, 128, AttentionTile(32, 64, 4, 1)),
        AttentionShort(128, 96, AttentionTile(32, 128, 8, 1)),
        AttentionShort(128, 128, AttentionTile(16, 128, 8)),
        AttentionShort(256, 64, AttentionTile(16, 256, 8)),
    ),
}


# A multiprocessor needs so many of its programs, one a head, else the long kernels' tiles of queries share the work
SHORT_PROGRAMS = 2


def attention_short(
    direction: str, keys: int, masked: bool, width: int, float32: bool, capability: Capability
) -> AttentionTile | None:
    """The row for few keys, "forward" or "backward", or None where the long kernels serve."""
    if float32:
        return None
    for row in {"forward": SHORT_FORWARD, "backward": SHORT_BACKWARD}[direction][chip(capability)]:
        if keys <= row.keys and width <= row.width and (row.masked or not masked):
            return fenced(row.tile, chip(capability))
    return None


def attention_long(width: int, float32: bool, capability: Capability) -> AttentionLong:
    """The row for heads of a width up to 128."""
    table = _LONG_FLOAT32 if float32 else LONG[chip(capability)]
    row = next(row for widest, row in table.items() if sum(attention_widths(width)) <= widest)
    return fenced(row, chip(capability))


# ------------------------------------------------------------------------------------------------------------- rotary


@dataclass(frozen=True)
class RotaryTile:
    """Tokens that a program holds of heads up to `width`, heads that it walks, and its warps."""

    width: int
    tokens: int
    heads: int
    warps: int


# So many tokens that a thread has 16 numbers or more of a head, and bfloat16 moves in 16-byte pieces where pairs are
# halves apart too. Four heads share what is read of sines and cosines; more would leave small batches few programs. Not
# yet measured.
ROTARY = (
    RotaryTile(64, tokens=32, heads=4, warps=4),
    RotaryTile(128, tokens=16, heads=4, warps=4),
    RotaryTile(256, tokens=8, heads=4, warps=4),
)


def pick_rotary_tile(width: int) -> RotaryTile:
    """The first row that is wide enough."""
    return next(row for row in ROTARY if width <= row.width)


# ---------------------------------------------------------------------------------------------------------------- mlp


@dataclass(frozen=True)
class ProductTile:
    """A tile of a product and how it is launched.

    Args:
        rows, columns, inner: of the tile, and of a step along the axis that is summed.
        warps, stages, maxnreg: launch options.
        pieces: 1, 2 or 4, left to right: the epilogue works on one at a time.
        programs: that stay on a multiprocessor for the whole call.
        tma: whether operands that suit it come by the copy engine, as tensor descriptors.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    pieces: int = 1
    programs: int = 1
    tma: bool = False
    maxnreg: int | None = None


MLP_GROUP = 8  # rows of tiles that are walked together
# Forward stores two numbers an element, backward loads one and stores two: pieces keep what the epilogue holds small,
# and where two programs share a multiprocessor one multiplies while the other one stores. Not yet measured.
_MLP_SM_80 = ProductTile(128, 128, 32, warps=8, stages=4, pieces=4, programs=2, maxnreg=128)
_MLP_SM_86 = ProductTile(128, 128, 32, warps=8, stages=3, pieces=4, programs=2, maxnreg=128)  # 100 KiB a multiprocessor
# 85 operations for each byte out of L2, where 128 x 128 has 64; that one runs two programs, with 105 registers. One
# launch fills the chip 36 times at ViT-B's size, so the last tiles' waste is small.
_MLP_SM_90 = ProductTile(128, 256, 64, warps=8, stages=4, pieces=4, tma=True)
# The heavier epilogue wants two programs: 128 x 256 takes 254 registers, and the tensor cores would wait for it.
_MLP_SM_90_BACKWARD = ProductTile(128, 128, 64, warps=8, stages=3, pieces=4, programs=2, tma=True, maxnreg=128)
_MLP_SM_100 = ProductTile(128, 256, 64, warps=8, stages=3, pieces=4, tma=True)  # sums live in tensor memory
MLP_FORWARD = {80: _MLP_SM_80, 86: _MLP_SM_86, 90: _MLP_SM_90, 100: _MLP_SM_100}
MLP_BACKWARD = {
    80: ProductTile(128, 128, 32, warps=8, stages=3, pieces=4, programs=2, maxnreg=128),
    86: _MLP_SM_86,
    90: _MLP_SM_90_BACKWARD,
    100: ProductTile(128, 128, 64, warps=8, stages=3, pieces=4, programs=2, tma=True),
}
# fewer tiles than multiprocessors: smaller ones, for more of them
MLP_SMALL = ProductTile(64, 64, 64, warps=4, stages=3)
# float32: the product is there, and its elements pass once
MLP_ELEMENTWISE = ProductTile(64, 64, 0, warps=4, stages=1, programs=3)


def pick_product_tile(table: dict[int, ProductTile], capability: Capability) -> ProductTile:
    """The row of the capability's chip."""
    return table[chip(capability)]


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

# Registers and programs per SM as compiled; times not yet measured.
_PATCH_EMBED_HOPPER = {
    # two programs an SM, so that one gathers while the other multiplies
    "embed": PatchEmbedTile(128, 128, 64, 8, 3),
    "weight_gradient": PatchEmbedTile(128, 128, 64, 8, 2),  # three stages of float32 pixels leave room for one only
    "image_gradient": PatchEmbedTile(128, 128, 64, 8, 3),
}
# half as many reads of the image, one program an SM, 212 to 231 registers; irregular patches would spill 48 to 200
# bytes with it, a wider result 80 to 96, and sm_100 280
_PATCH_EMBED_WIDE = PatchEmbedTile(128, 256, 64, 8, 3)
# Pixels that are converted feed wgmma from registers, which those of the next step would overwrite while products of a
# pipelined loop are in flight: one stage waits for each product. 128 registers for uint8, 180 for float32.
_PATCH_EMBED_CONVERTED = PatchEmbedTile(128, 128, 64, 8, 1)
# shared memory of 99 KiB holds no deeper steps
_PATCH_EMBED_AMPERE = PatchEmbedTile(128, 128, 32, 8, 3)
# exact products run on the ordinary cores; steps of 32 spill 8 bytes on sm_90
_PATCH_EMBED_FLOAT32 = PatchEmbedTile(64, 64, 16, 8, 2)
# 8 KiB in flight a program, nine programs an SM
PATCH_EMBED_SUM = PatchEmbedTile(16, 256, 0, 4, 1)


def patch_embed(
    kernel: str, width: int, regular: bool, converted: bool, float32: bool, capability: Capability
) -> PatchEmbedTile:
    """The row for a kernel that multiplies, of a D and a weight that may be float32.

    Args:
        regular: whether all patches are read, their rows are contiguous and multiples of 16 pixels, and the result has
            weight's dtype.
        converted: whether pixels are normalised, or of another dtype than weight.
    """
    if float32:
        return _PATCH_EMBED_FLOAT32
    row = _PATCH_EMBED_AMPERE if chip(capability) < 90 else _PATCH_EMBED_HOPPER[kernel]
    if kernel == "embed" and chip(capability) == 90 and (converted or (regular and width % 256 == 0)):
        row = _PATCH_EMBED_CONVERTED if converted else _PATCH_EMBED_WIDE
    return fenced(row, chip(capability))
