"""Charts as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitkernels.train.checkpoint import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_chart(path: Path, figure: Figure) -> None:
    """A figure as PNG, atomically, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    atomic_write(path, FigureCanvasAgg(figure).print_png)
