"""Tiles of the products of `mlp` and `glu_mlp`, whose epilogues hold the activation."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels.kernels.configs.table import Row, Table


@dataclass(frozen=True)
class ProductTile:
    """A tile of a product and how it is launched.

    Args:
        rows, columns, inner: of the tile, and of a step along the axis that is summed.
        warps, stages, maxnreg: launch options.
        pieces: 1, 2 or 4, left to right: the epilogue works on one at a time.
        programs: that stay on a multiprocessor for the whole call.
        tma: whether operands that suit it come by the copy engine, as tensor descriptors.
        tma_out: whether results leave by it, too: no addresses and masks in the epilogue, and stores that nobody
            waits for.
        spills: bytes of registers that it may spill.
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
    tma_out: bool = False
    spills: int = 0


GROUP = 8  # rows of tiles that are walked together

# Tables by direction. mlp's forward stores two elements for each one of the product, its backward loads one and stores
# two: pieces keep what the epilogue holds small, and where two programs share a multiprocessor one multiplies while the
# other one stores.
_SHARED = "two programs: one multiplies while the other one stores"
_MLP_SPACE = {
    "rows": (64, 128, 256),
    "columns": (128, 256),
    "stages": (3, 4),
    "pieces": (2, 4),
    "programs": (1, 2),
    "maxnreg": (None, 128),
    "tma_out": (False, True),
}


def _worth_trying(tile: ProductTile) -> bool:
    """Tiles of half an accumulator's registers or more, all of them but 256 x 256; registers are capped for two."""
    area = tile.rows * tile.columns
    return 128 * 128 <= area < 256 * 256 and (tile.maxnreg is None or tile.programs == 2)


MLP = {
    "forward": Table(
        Row(ProductTile(128, 128, 32, warps=8, stages=4, pieces=4, programs=2, maxnreg=128), _SHARED, 80),
        Row(
            ProductTile(128, 128, 32, warps=8, stages=3, pieces=4, programs=2, maxnreg=128),
            "100 KiB a multiprocessor",
            86,
        ),
        Row(
            ProductTile(128, 128, 64, warps=8, stages=3, pieces=2, programs=2, tma=True, maxnreg=128, tma_out=True),
            f"{_SHARED}; 128 x 256 has more operations for each byte out of L2, and takes 7 % longer on an H200",
            90,
        ),
        Row(
            ProductTile(128, 256, 64, warps=8, stages=3, pieces=4, tma=True),
            "sums live in tensor memory",
            100,
        ),
        space=_MLP_SPACE,
        prune=_worth_trying,
    ),
    "backward": Table(
        Row(ProductTile(128, 128, 32, warps=8, stages=3, pieces=4, programs=2, maxnreg=128), _SHARED, 80),
        Row(
            ProductTile(
                128, 128, 64, warps=8, stages=3, pieces=4, programs=2, tma=True, maxnreg=128, tma_out=True, spills=32
            ),
            "the heavier epilogue wants two programs: 128 x 256 takes 254 registers, and the tensor cores would wait "
            "for it; none spilled by triton 3.6, 8 bytes by 3.7, 32 by pointers",
            90,
        ),
        Row(
            ProductTile(128, 128, 64, warps=8, stages=3, pieces=4, programs=2, tma=True),
            "two programs; sums live in tensor memory",
            100,
        ),
        space=_MLP_SPACE,
        prune=_worth_trying,
    ),
}
MLP_SMALL = Table(
    Row(
        ProductTile(64, 64, 64, warps=4, stages=3),
        "fewer tiles than multiprocessors otherwise: smaller ones, for more of them",
    )
)

# glu_mlp's forward multiplies two tiles of half the columns, the gate's and the other one's, for the same registers.
# Without TMA pieces stay as wide, for addresses take registers too, and the compiler fits all into 128 by itself, where
# it spills if it is told to. Its backward loads two elements for each one of the product and stores three.
_HALVED = "mlp's, for two products of half the columns"
_HEAVY = "half of mlp's columns: the epilogue would spill"
GLU_MLP = {
    "forward": Table(
        Row(ProductTile(128, 64, 32, warps=8, stages=4, pieces=2, programs=2), _HALVED, 80),
        Row(ProductTile(128, 64, 32, warps=8, stages=3, pieces=2, programs=2), _HALVED, 86),
        Row(ProductTile(128, 128, 64, warps=8, stages=4, pieces=4, tma=True), _HALVED, 90),
        Row(ProductTile(128, 128, 64, warps=8, stages=3, pieces=4, tma=True), _HALVED, 100),
    ),
    "backward": Table(
        Row(ProductTile(128, 64, 32, warps=8, stages=3, pieces=4, programs=2, maxnreg=128), _HEAVY, 80),
        Row(
            ProductTile(128, 128, 64, warps=8, stages=3, pieces=4, programs=2, tma=True, maxnreg=128),
            "as mlp's",
            90,
        ),
        Row(ProductTile(128, 64, 64, warps=8, stages=3, pieces=4, programs=2, tma=True), _HEAVY, 100),
    ),
}
GLU_MLP_SMALL = Table(Row(ProductTile(64, 32, 64, warps=4, stages=3), _HALVED))

ELEMENTWISE = Table(
    Row(
        ProductTile(64, 64, 0, warps=4, stages=1, programs=3),
        "float32: the product is there, and its elements pass once",
    )
)
