"""Tile choice: a table an op, all of one shape, each row with its reason.

A table picks its first row that serves a call, by shape, dtype and chip; no autotuning, which fails under the
interpreter and collapses under torch.compile. `make tune` walks each table's search space on a GPU. `table` says how to
read them.
"""

from __future__ import annotations

from vitkernels.kernels.configs.add_layer_norm import (
    LAYER_NORM_BACKWARD,
    LAYER_NORM_BACKWARD_SCALED,
    LAYER_NORM_FORWARD,
    RowTile,
)
from vitkernels.kernels.configs.attention import (
    LONG_DELTA,
    LONG_DKDV,
    LONG_DQ,
    LONG_DS,
    LONG_FORWARD,
    REL_POS_DQ,
    SHORT,
    SHORT_PROGRAMS,
    AttentionTile,
    attention_keys,
    attention_widths,
    row_of_keys,
)
from vitkernels.kernels.configs.patch_embed import PATCH_EMBED, PATCH_EMBED_DEPTH, PATCH_EMBED_SUM, PatchEmbedTile
from vitkernels.kernels.configs.products import (
    ELEMENTWISE,
    GLU_MLP,
    GLU_MLP_SMALL,
    GROUP,
    MLP,
    MLP_SMALL,
    ProductTile,
)
from vitkernels.kernels.configs.rotary import ROTARY, RotaryTile
from vitkernels.kernels.configs.table import Capability, Row, Table, chip

__all__ = [
    "ELEMENTWISE",
    "GLU_MLP",
    "GLU_MLP_SMALL",
    "GROUP",
    "LAYER_NORM_BACKWARD",
    "LAYER_NORM_BACKWARD_SCALED",
    "LAYER_NORM_FORWARD",
    "LONG_DELTA",
    "LONG_DKDV",
    "LONG_DQ",
    "LONG_DS",
    "LONG_FORWARD",
    "MLP",
    "MLP_SMALL",
    "PATCH_EMBED",
    "PATCH_EMBED_DEPTH",
    "PATCH_EMBED_SUM",
    "REL_POS_DQ",
    "ROTARY",
    "SHORT",
    "SHORT_PROGRAMS",
    "AttentionTile",
    "Capability",
    "PatchEmbedTile",
    "ProductTile",
    "RotaryTile",
    "Row",
    "RowTile",
    "Table",
    "attention_keys",
    "attention_widths",
    "chip",
    "row_of_keys",
]
