"""Tiles of attention: of the short kernels, whose tile spans all keys, and of the long ones, which walk them."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels.kernels.configs.table import Row, Table


@dataclass(frozen=True)
class AttentionTile:
    """A tile of scores, queries x keys, how it is launched, and the bytes of spilled registers that it admits."""

    queries: int
    keys: int
    warps: int
    stages: int = 2
    maxnreg: int | None = None
    spills: int = 0


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


def row_of_keys(columns: int) -> int:
    """The power of two, 16 or more, that covers a row of an image of keys."""
    return max(16, 1 << (columns - 1).bit_length())


# ---------------------------------------------------------------------------------------------- any number of keys

# Calls have width, of a head, float32, and image: whether keys have positions. Exact products run on ordinary cores.
_EXACT = "small tiles, so that operands of exact products fit into registers"
_REGISTERS = "before sm_90 operands take registers too: smaller tiles, or fetched without a second stage"
_MASK = "a mask takes registers too"
_POSITIONS = "two biases a score take registers too; no spills but for 128-wide heads on sm_90"
_SPACE = {"queries": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}
LONG_FORWARD = Table(
    Row(AttentionTile(32, 32, 4, 1), _EXACT, float32=True, width=64),
    Row(AttentionTile(16, 32, 4, 1), _EXACT, float32=True, width=128),
    Row(AttentionTile(32, 32, 4), _POSITIONS, 80, float32=False, image=True, width=128),
    Row(AttentionTile(64, 32, 4, spills=64), _POSITIONS, 90, float32=False, image=True, width=128),
    Row(AttentionTile(128, 64, 8), "the most queries that share a fetch of keys", 80, float32=False, width=96),
    Row(AttentionTile(128, 32, 8), _REGISTERS, 80, float32=False, width=128),
    Row(AttentionTile(128, 64, 8), "the most queries that share a fetch of keys", 90, float32=False, width=128),
    space=_SPACE,
    by_pointers=True,
)
LONG_DKDV = Table(
    Row(AttentionTile(16, 32, 4, 1), _EXACT, float32=True, width=128),
    Row(
        AttentionTile(32, 64, 4, 1, spills=96),
        "no spills but for 80-wide heads over an image",
        80,
        float32=False,
        width=80,
    ),
    Row(AttentionTile(16, 64, 4), _REGISTERS, 80, float32=False, width=96),
    Row(AttentionTile(32, 64, 8), _REGISTERS, 80, float32=False, width=128),
    Row(AttentionTile(32, 128, 8), "dk and dv of 128 keys stay in registers", 90, float32=False, width=64),
    Row(AttentionTile(32, 64, 4), "dk and dv of 64 keys stay in registers", 90, float32=False, width=128),
    space=_SPACE | {"queries": (16, 32, 64)},
    by_pointers=True,
)
LONG_DQ = Table(
    Row(AttentionTile(32, 32, 4, 1), _EXACT, float32=True, width=64),
    Row(AttentionTile(32, 16, 4, 1), _EXACT, float32=True, width=128),
    Row(
        AttentionTile(64, 32, 4, spills=8),
        "no spills but where keys are hidden from heads 32 wide",
        80,
        float32=False,
        width=80,
    ),
    Row(AttentionTile(64, 32, 4), _REGISTERS, 80, float32=False, width=96),
    Row(AttentionTile(64, 32, 4, 1, spills=8), "no spills but for 104-wide heads", 80, float32=False, width=128),
    Row(AttentionTile(64, 64, 4), "dq of 64 queries stays in registers", 90, float32=False, width=64),
    Row(AttentionTile(64, 64, 4, 1), "wider keys in one stage, for registers", 90, float32=False, width=128),
    space=_SPACE,
    by_pointers=True,
)
# dq's where the gradient of the scores is stored, for a mask's
LONG_DS = Table(
    Row(AttentionTile(16, 32, 4, 1), _EXACT, float32=True, width=64),
    Row(AttentionTile(16, 16, 8, 1), _EXACT, float32=True, width=128),
    Row(AttentionTile(32, 32, 4), _MASK, 80, float32=False, width=128),
    Row(AttentionTile(64, 32, 4), _MASK, 90, float32=False, width=96),
    Row(AttentionTile(32, 32, 4), _MASK, 90, float32=False, width=128),
    by_pointers=True,
)
# dq's over an image, whose rows are its tiles of keys. Calls have the image's columns too.
_ROW = "of each query, a row of scores, of their gradients and of the columns' gradient stay in registers"
REL_POS_DQ = Table(
    Row(AttentionTile(16, 0, 4, 1, spills=16), _EXACT, float32=True, columns=32, width=128),
    Row(AttentionTile(16, 0, 8, 1, spills=16), _EXACT, float32=True, columns=64, width=128),
    Row(AttentionTile(32, 0, 4), _ROW, 80, float32=False, columns=16, width=96),
    Row(AttentionTile(32, 0, 4, 1), _ROW, 80, float32=False, columns=32, width=128),
    Row(AttentionTile(32, 0, 8, 1), _ROW, 80, float32=False, columns=64, width=64),
    Row(
        AttentionTile(32, 0, 8, 1, spills=344),
        "80-wide heads spill in tiles of 16 queries too",
        80,
        float32=False,
        columns=64,
        width=128,
    ),
    Row(AttentionTile(64, 0, 4), _ROW, 90, float32=False, columns=16, width=64),
    Row(AttentionTile(64, 0, 4, 1), _ROW, 90, float32=False, columns=32, width=64),
    Row(
        AttentionTile(64, 0, 8, 1, spills=64),
        "no spills but for 128-wide heads",
        90,
        float32=False,
        columns=64,
        width=128,
    ),
    space={"queries": (16, 32, 64), "warps": (4, 8), "stages": (1, 2)},
    by_pointers=True,
)
LONG_DELTA = Table(Row(AttentionTile(64, 0, 4, 1), "one pass over out and dout"), by_pointers=True)

# --------------------------------------------------------------------------------------------------------- few keys

# A multiprocessor needs so many of its programs, one a head, else the long kernels' tiles of queries share the work
SHORT_PROGRAMS = 2
# Tables by direction; a call that no row serves is the long kernels'. Calls have keys, width, of a head, and masked,
# whether they are causal or hide keys, which takes registers. Forward, the tile spans all keys, in `attention_keys`.
_ALL_KEYS = "scores of 64 queries and all keys stay in registers"
_FEWER = "more queries, keys or wider heads spill"
# Backward, dk and dv of all keys stay in registers: 255 of them at 256 keys of 64. With two stages the next queries
# come into registers while these are worked on (6 % on an H200 at 197 keys); where that spills, one, or tiles of 16.
_DKDV = "dk and dv of all keys stay in registers"
_AMPERE = f"{_DKDV}, within 99 KiB of shared memory"
SHORT = {
    "forward": Table(
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 80, keys=128, width=96),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 80, keys=128, width=128, masked=False),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 80, keys=208, width=64, masked=False),
        Row(AttentionTile(64, 0, 8, 1), _ALL_KEYS, 80, keys=208, width=80, masked=False),
        Row(AttentionTile(16, 0, 4, 1), _FEWER, 80, keys=256, width=48),
        Row(AttentionTile(32, 0, 4, 1), "257 keys spill, and so do wider heads", 80, keys=256, width=64),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 90, keys=128, width=128),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 90, keys=256, width=48),
        Row(
            AttentionTile(64, 0, 4, 1, maxnreg=168, spills=16),
            "3 programs a multiprocessor; 186 registers without. 197 keys spill 8 bytes, 196 keys 16",
            90,
            keys=208,
            width=64,
            masked=False,
        ),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 90, keys=256, width=80),
        Row(AttentionTile(64, 0, 4, 1), _FEWER, 90, keys=272, width=96, masked=False),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 100, keys=128, width=128),
        Row(AttentionTile(64, 0, 8, 1), _ALL_KEYS, 100, keys=256, width=48),
        Row(AttentionTile(64, 0, 4, 1), _ALL_KEYS, 100, keys=272, width=64, masked=False),
        Row(AttentionTile(64, 0, 8, 1), _ALL_KEYS, 100, keys=256, width=96),
        Row(AttentionTile(64, 0, 8, 1), _ALL_KEYS, 100, keys=272, width=96, masked=False),
        space={"queries": (16, 32, 64, 128), "warps": (4, 8), "maxnreg": (None, 168, 128)},
        by_pointers=True,
    ),
    "backward": Table(
        Row(AttentionTile(32, 64, 4, 1), _AMPERE, 80, 86, keys=64, width=80),
        Row(AttentionTile(32, 64, 8, 1), _AMPERE, 80, 86, keys=64, width=96),
        Row(AttentionTile(16, 64, 8, 1, spills=16), "no spills but for 104-wide heads", 80, 86, keys=64, width=128),
        Row(AttentionTile(32, 128, 8), _AMPERE, 80, 86, keys=128, width=64),
        Row(AttentionTile(16, 128, 8, 1, spills=56), "no spills but for 104-wide heads", 80, keys=128, width=128),
        Row(AttentionTile(16, 256, 8, 1, spills=8), "no spills where no keys are hidden", 80, keys=256, width=64),
        Row(AttentionTile(32, 64, 4), _DKDV, 90, keys=64, width=96),
        Row(AttentionTile(32, 64, 8, 1), "by 4 warps 104-wide heads spill", 90, keys=64, width=112),
        Row(AttentionTile(32, 64, 4, 1), _DKDV, 90, keys=64, width=128),
        Row(AttentionTile(32, 128, 8, spills=8), _DKDV, 90, keys=128, width=128),
        Row(
            AttentionTile(32, 256, 8, spills=72),
            "to 24 bytes by triton 3.7, to 72 by 3.6; none in tiles of 16 queries, which take 1.4 times as long",
            90,
            keys=256,
            width=64,
        ),
        Row(AttentionTile(32, 64, 4), _DKDV, 100, keys=64, width=64),
        Row(AttentionTile(32, 64, 4, 1), _DKDV, 100, keys=64, width=128),
        Row(AttentionTile(32, 128, 8, 1), _DKDV, 100, keys=128, width=96),
        Row(AttentionTile(16, 128, 8), _DKDV, 100, keys=128, width=128),
        Row(AttentionTile(16, 256, 8), _DKDV, 100, keys=256, width=64),
        space={"queries": (16, 32, 64, 128), "warps": (4, 8, 16), "stages": (1, 2)},
    ),
}
