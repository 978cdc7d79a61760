"""What a run shows while it goes: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vitkernels.settings import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

WINDOW = 20  # steps that the shown figures are means of
EVERY = 5.0  # seconds between lines


class Lines:
    """Plain lines: step, loss, learning rate, images a second, time left; a context manager."""

    def __init__(self, console: Console, total: int, completed: int, config: TrainConfig) -> None:
        self.console, self.total, self.batch_size = console, total, config.batch_size
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.start, self.before, self.shown = time.monotonic(), completed, 0.0

    def step(self, row: dict[str, Any], names: list[str]) -> None:
        """Take a step's row of figures, and show them, averaged with those before it."""
        self.recent.append(row)
        now = time.monotonic()
        if row["step"] == self.before + 1 or row["step"] == self.total or now - self.shown >= EVERY:
            self.shown = now
            left = (now - self.start) / (row["step"] - self.before) * (self.total - row["step"])
            self._show(row, names, timedelta(seconds=round(left)))

    def figures(self, row: dict[str, Any], names: list[str]) -> str:
        """Loss, accuracy and learning rate of the last model, and every model's images a second."""

        def mean(name: str, figure: str) -> float:
            return sum(each[name][figure] for each in self.recent) / len(self.recent)

        speeds = ", ".join(f"{name} {self.batch_size / mean(name, 'seconds'):,.0f}" for name in names)
        last = names[-1]
        learnt = f"loss {mean(last, 'loss'):.4f}, accuracy {mean(last, 'accuracy'):.1%}, lr {row['lr']:.2e}"
        return f"{learnt}, {speeds} images/s"

    def _show(self, row: dict[str, Any], names: list[str], left: timedelta) -> None:
        line = f"step {row['step']} of {self.total}: {self.figures(row, names)}, {left} left"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class Bar(Lines):
    """rich's progress bar with the same figures."""

    def __init__(self, console: Console, total: int, completed: int, config: TrainConfig) -> None:
        super().__init__(console, total, completed, config)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("train", total=total, completed=completed, figures="")

    def step(self, row: dict[str, Any], names: list[str]) -> None:
        self.recent.append(row)
        self.progress.update(self.task, completed=row["step"], figures=self.figures(row, names))

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress.stop()


def progress(console: Console, total: int, completed: int, config: TrainConfig) -> Lines:
    """A bar where the console is a terminal, else lines."""
    return (Bar if console.is_terminal else Lines)(console, total, completed, config)
