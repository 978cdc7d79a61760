"""Two gloo processes: DistributedDataParallel and FSDP2 give the gradients of one process with all the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import PROCESSES, sharded
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import vitkernels as vk

pytestmark = processes.needs_gloo
TOLERANCE = {"FSDP2, bfloat16": 0.05}  # of the largest gradient; 1e-5 for the rest


class Block(nn.Module):
    """A Transformer block of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gamma = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.qkv.weight.dtype
        _, normed = vk.ops.add_layer_norm(x, None, self.norm1.weight, self.norm1.bias, out_dtype=dtype)
        branch = vk.ops.attention_qkv(vk.ops.linear(normed, self.qkv.weight, self.qkv.bias), 2)
        branch = vk.ops.linear(branch, self.proj.weight)
        total, normed = vk.ops.add_layer_norm(
            x,
            branch,
            self.norm2.weight,
            self.norm2.bias,
            branch_bias=self.proj.bias,
            scale=self.gamma,
            out_dtype=dtype,
        )
        return total + vk.ops.mlp(normed, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 16, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(4, 16))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, image: Tensor) -> Tensor:
        x = vk.ops.patch_embed(image, self.proj.weight, self.proj.bias, pos_embed=self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return x


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": DistributedDataParallel,
    "DDP, static graph": lambda model: DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True),
    "DDP, compiled": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
    "FSDP2": sharded,
    "FSDP2, bfloat16": lambda model: sharded(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
}


def _work(rank: int, folder: str) -> None:
    """One process: the gradients of every wrapper, and the kernels that ran, saved by the first."""
    with processes.joined(rank, folder):
        torch.manual_seed(0)
        model, images = Model(), torch.randn(PROCESSES, 3, 3, 8, 8)
        results = {}
        for name, wrap in WRAPPERS.items():
            gradients, calls = processes.gradients(wrap(copy.deepcopy(model)), images[rank])
            results[name] = (gradients, [(call.op, call.direction) for call in calls])
        if rank == 0:
            torch.save(results, f"{folder}/results")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Tensor], list[tuple[str, str]]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=PROCESSES)
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_are_those_of_one_process(name: str, results: dict) -> None:
    torch.manual_seed(0)
    model, images = Model(), torch.randn(PROCESSES, 3, 3, 8, 8)
    processes.loss(model, images.flatten(0, 1)).backward()
    gradients, calls = results[name]
    for (parameter_name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        largest = parameter.grad.abs().max()
        error = (gradient - parameter.grad).abs().max()
        assert gradient.dtype == torch.float32
        assert error <= TOLERANCE.get(name, 1e-5) * largest, f"{parameter_name}: error {error}, largest {largest}"
    steps = [calls[: len(calls) // 2], calls[len(calls) // 2 :]]
    for step in steps:
        assert sum(direction == "backward" for _, direction in step) == 1 + 2 * 6  # patch_embed, six ops a block
