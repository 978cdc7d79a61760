"""The progress bar of a run, with loss, accuracy and images per second."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WINDOW = 20  # steps that the shown figures are means of


class Bar:
    """A rich progress bar over the steps of a run; a context manager."""

    def __init__(self, console: Console, total: int, completed: int, batch_size: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.batch_size = batch_size
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("train", total=total, completed=completed, figures="")

    def step(self, row: dict[str, Any], names: list[str]) -> None:
        """Show a step's row of figures, averaged with those before it."""
        self.recent.append(row)

        def mean(name: str, figure: str) -> float:
            return sum(each[name][figure] for each in self.recent) / len(self.recent)

        speeds = " ".join(f"{name} {self.batch_size / mean(name, 'seconds'):,.0f}" for name in names)
        fused = names[-1]
        figures = f"loss {mean(fused, 'loss'):.4f}  acc {mean(fused, 'accuracy'):.1%}  {speeds} images/s"
        self.progress.update(self.task, completed=row["step"], figures=figures)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress.stop()
