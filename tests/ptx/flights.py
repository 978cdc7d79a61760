"""Asynchronous operations between their issue and the wait that ends them.

`cp.async`, `wgmma` and bulk stores are counted in groups: a thread commits what it issued since its last commit, and
`wait_group N` waits until all but its N latest groups have ended. Until then nothing may be assumed about an operation,
so the machine lets it take effect at the last moment, which is that wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class _Operation:
    group: Any  # [CTAs, threads]: number of the group that it belongs to, thread by thread
    mask: Any  # [CTAs, threads]: who issued it, and has not waited for it yet
    land: Callable[[Any], None]  # takes the mask of threads whose part ends


class Queue:
    """The operations of one kind. Masks are of all CTAs of a cohort, [CTAs, threads]."""

    def __init__(self, count: int, threads: int) -> None:
        self.committed = np.zeros((count, threads), "i4")
        self.operations: list[_Operation] = []

    def issue(self, mask: Any, land: Callable[[Any], None]) -> None:
        """Begin an operation; `land` is called with the threads that waited for their part of it."""
        self.operations.append(_Operation(self.committed.copy(), mask, land))

    def commit(self, mask: Any) -> None:
        self.committed += mask

    def wait(self, mask: Any, newest: int) -> None:
        """End all groups of the threads in `mask` but their `newest` last ones."""
        left = []
        for operation in self.operations:
            done = operation.mask & mask & (operation.group < self.committed - newest)
            if done.any():
                operation.land(done)
                operation.mask = operation.mask & ~done
            if operation.mask.any():
                left.append(operation)
        self.operations = left
