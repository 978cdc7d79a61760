"""Tiles of `patch_embed`."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels.kernels.configs.table import Row, Table

PATCH_EMBED_DEPTH = 64  # what a patch is padded to: 128 bytes of bf16, the widest row that wgmma reads in one piece


@dataclass(frozen=True)
class PatchEmbedTile:
    """A tile of a product, rows x columns, the depth of a step of its loop, its launch, and the bytes it may spill."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    spills: int = 0


_FLOAT32 = Row(
    PatchEmbedTile(64, 64, 16, warps=8, stages=2),
    "exact products run on the ordinary cores; steps of 32 spill 8 bytes on sm_90",
    float32=True,
)
_AMPERE = Row(
    PatchEmbedTile(128, 128, 32, warps=8, stages=3), "shared memory of 99 KiB holds no deeper steps", 80, float32=False
)
_SPACE = {"rows": (64, 128, 256), "columns": (128, 256), "warps": (4, 8), "stages": (2, 3, 4)}

# Tables by kernel. Calls have float32, whether the weight is; converted, whether pixels are normalised, or of another
# dtype than the weight; wide, whether D is a multiple of 256, all patches are read, their rows are contiguous and
# multiples of 16 pixels, and the result has the weight's dtype.
PATCH_EMBED = {
    "embed": Table(
        _FLOAT32,
        _AMPERE,
        Row(
            PatchEmbedTile(128, 128, 64, warps=8, stages=1),
            "Pixels that are converted feed wgmma from registers, which those of the next step would overwrite while "
            "products of a pipelined loop are in flight: one stage waits for each product. 128 registers for uint8, "
            "180 for float32",
            90,
            float32=False,
            converted=True,
        ),
        Row(
            PatchEmbedTile(128, 256, 64, warps=8, stages=3),
            "half as many reads of the image, one program an SM, 212 to 231 registers; irregular patches would spill "
            "48 to 200 bytes with it, a wider result 80 to 96, and sm_100 280",
            90,
            float32=False,
            wide=True,
        ),
        Row(
            PatchEmbedTile(128, 128, 64, warps=8, stages=3, spills=8),
            "two programs an SM, so that one gathers while the other multiplies; no spills but on sm_100, in the "
            "epilogue of a float32 table",
            90,
            100,
            float32=False,
        ),
        space=_SPACE,
        by_pointers=True,
    ),
    "weight_gradient": Table(
        _FLOAT32,
        _AMPERE,
        Row(
            PatchEmbedTile(128, 128, 64, warps=8, stages=2),
            "three stages of float32 pixels leave room for one program only",
            90,
            float32=False,
        ),
        space=_SPACE,
        by_pointers=True,
    ),
    "image_gradient": Table(
        _FLOAT32,
        _AMPERE,
        Row(PatchEmbedTile(128, 128, 64, warps=8, stages=3), "two programs an SM", 90, float32=False),
        space=_SPACE,
        by_pointers=True,
    ),
}
PATCH_EMBED_SUM = Table(
    Row(PatchEmbedTile(16, 256, 0, warps=4, stages=1), "8 KiB in flight a program, nine programs an SM")
)
