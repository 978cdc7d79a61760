"""A run's curves for TensorBoard or Weights & Biases, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vitkernels.libraries import needed


class Log:
    """Numbers of the run's rows, by step; a context manager. It writes nothing where no library is named.

    Args:
        library: "tensorboard", "wandb" or None.
        folder: the run's.
        settings: the run's, which wandb shows beside its curves.

    Raises:
        ModuleNotFoundError: that library is not installed.
        ValueError: wandb has no login.
    """

    def __init__(self, library: str | None, folder: Path, settings: Mapping[str, Any]) -> None:
        self.writer: Any = None
        self.run: Any = None
        if library == "tensorboard":
            needed("tensorboard", "argument 'log'")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"))
        elif library == "wandb":
            wandb = needed("wandb", "argument 'log'")
            try:
                self.run = wandb.init(dir=str(folder), name=folder.name, config=dict(settings))
            except wandb.Error as error:  # nobody is logged in, or its server is out of reach
                raise ValueError(
                    f"train: argument 'log' got 'wandb', which says: {str(error).rstrip('.')}; needs a login, or "
                    "WANDB_MODE=offline"
                ) from error

    def add(self, row: dict[str, Any]) -> None:
        """Write a row of metrics.jsonl."""
        if self.writer is not None:
            for name, value in _numbers(row):
                self.writer.add_scalar(name, value, row["step"])
        elif self.run is not None:
            self.run.log(dict(_numbers(row)), step=row["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()
        elif self.run is not None:
            self.run.finish()


def _numbers(row: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """{"fused": {"loss": 2.0}} -> ("fused/loss", 2.0)."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", value
