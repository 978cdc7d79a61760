"""Whether a float64 copy of a model, and a training step of it, fit into the machine's memory.

On a GPU the allocator says so itself. Linux does not: it ends a process that asked for too much. So what a step keeps
for its backward pass is counted while the model runs in its own dtype, and compared with what is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

_GROUP = Path("/sys/fs/cgroup")
_FLOAT64 = 8


@contextlib.contextmanager
def counting_saved() -> Iterator[dict[int, int]]:
    """Numbers that autograd keeps for backward passes, by the storage that holds them."""
    numbers: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        numbers[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield numbers


def too_large(model: nn.Module, saved: int) -> str | None:
    """Why a float64 step of the model cannot run beside it, in a sentence; None where it can, or where nobody knows.

    Args:
        model: on the CPU; on other devices their allocators raise.
        saved: numbers that a step of it keeps for its backward pass.
    """
    if any(each.device.type != "cpu" for each in model.parameters()):
        return None
    free = available()
    weights = sum(each.numel() for each in model.parameters())
    needed = _FLOAT64 * (saved + 3 * weights)  # the copy, its gradients, and a layer's working space
    if free is None or needed <= free:
        return None
    return f"a float64 run needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def available() -> int | None:
    """Bytes of main memory that this process can still have; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    with contextlib.suppress(OSError, LookupError, ValueError):  # "max" is no number: no limit
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]))
    return free
