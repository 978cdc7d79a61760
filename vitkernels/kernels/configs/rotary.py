"""Tiles of `rotary` and `rotary_qkv`."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels.kernels.configs.table import Row, Table


@dataclass(frozen=True)
class RotaryTile:
    """Tokens that a program holds, heads that it walks, and its warps."""

    tokens: int
    heads: int
    warps: int


# Calls have width, of a head. So many tokens that a thread has 16 elements or more of a head, and bfloat16 moves in
# 16-byte pieces where pairs are halves apart too. Four heads share what is read of sines and cosines.
ROTARY = Table(
    Row(RotaryTile(tokens=32, heads=4, warps=4), "more heads would leave small batches few programs", width=64),
    Row(RotaryTile(tokens=16, heads=4, warps=4), "as many elements", width=128),
    Row(RotaryTile(tokens=8, heads=4, warps=4), "as many elements", width=256),
    space={"tokens": (8, 16, 32, 64), "heads": (1, 2, 4, 12), "warps": (2, 4, 8)},
)
