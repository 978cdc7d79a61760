"""Tile choice: readable tables, one an op, with the reason beside each row and, once measured, the figure.

`pick` functions choose a row by shape, dtype and compute capability; no autotuning, which fails under the interpreter
and collapses under torch.compile. Rows are for one H100 unless they say otherwise; figures are "not yet measured" until
a GPU has measured them. The capability is (8, 0), (8, 6), (8, 9), (9, 0) or (10, 0); later ones take the last row.
"""

from __future__ import annotations

from dataclasses import dataclass

Capability = tuple[int, int]

# ---------------------------------------------------------------------------------------------------- add_layer_norm

# ---------------------------------------------------------------------------------------------------------- attention

# ---------------------------------------------------------------------------------------------------------------- mlp

# -------------------------------------------------------------------------------------------------------- patch_embed
