"""One process or many: what torchrun started, and the few sums and lists that the processes share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: its rank, how many there are, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the screen."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == "cpu" else [self.device])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def is_lost(error: BaseException) -> bool:
    """Whether this says that another process of the group is gone: gloo and NCCL say it in words."""
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "socket", "broken pipe")
    return any(each in str(error).lower() for each in words)


@contextlib.contextmanager
def world(device: str | None) -> Iterator[World]:
    """The world that torchrun set up (gloo on CPUs, NCCL on GPUs), or a world of one.

    Raises:
        ValueError: device="cuda" where torch sees none.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: argument 'device' got 'cuda'; needs a CUDA device, and torch sees none")
    if not dist.is_torchelastic_launched():
        yield World(0, 1, torch.device(kind))
        return
    here = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()
