"""What is printed: tables as text, and by which process."""

from __future__ import annotations

import os
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns as wide as their widest cell, two spaces between them; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def is_first() -> bool:
    """Whether this process is alone, or the first that torchrun started on this machine: others would say the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ
