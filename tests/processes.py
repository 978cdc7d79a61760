"""Two gloo processes on this machine: what the tests of DistributedDataParallel and FSDP2 share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vitkernels as vk

PROCESSES = 2
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)


@contextlib.contextmanager
def joined(rank: int, folder: str) -> Iterator[None]:
    """A spawned process with one thread, in the group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    yield
    dist.destroy_process_group()


def sharded(model: Any, **options: Any) -> nn.Module:
    """FSDP2 on each block, and on what is left."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().mean()


def gradients(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[vk.Call]]:
    """Every parameter's whole gradient, and the calls of two steps: a static graph is known from its second on."""
    with vk.record() as calls:
        for _ in range(2):
            model.zero_grad()
            loss(model, images).backward()
    found: list[Any] = [parameter.grad for parameter in model.parameters()]
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found], calls
