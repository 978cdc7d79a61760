"""What a run measured, as JSON lines: one row a step, one an epoch. They outlive a kill, and hold no step twice.

A step's row: {"step", "epoch", "lr", MODEL: {"loss", "accuracy", "top5", "images", "seconds"}, ..., "decoding": seconds
that reading its images took}, "skipped" where images could not be read, and "ops" at the first step of every process.
An epoch's row: {"step", "epoch", "test": {MODEL: {...}}}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vitkernels.train.checkpoint import atomic_write


class Metrics:
    """Rows appended to a file; a context manager. Rows past `step`, of a process that was killed, are dropped first.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = list(read(path, step)) if step else []
        atomic_write(path, lambda file: file.writelines(_line(row) for row in kept))
        self.file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is with the operating system when this returns."""
        try:
            self.file.write(_line(row))
            self.file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is kept") from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.file.close()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self.file.fileno())


def read(path: Path, step: int | None = None, key: str = "step") -> Iterator[dict[str, Any]]:
    """The rows of a file that have `key`, up to a half-written one, or to those after `step`."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            row = json.loads(line)
            if key in row and (step is None or row["step"] <= step):
                yield row


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
