"""Two gloo processes: DistributedDataParallel and FSDP2 over a fused model give the stock model's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import PROCESSES, sharded
from timm_vit import OPS, vit
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import vitkernels as vk

pytestmark = processes.needs_gloo
TOLERANCE = {"FSDP2, bfloat16": 0.1}  # of the largest gradient; 1e-4 for the rest


def _model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return vit(**sizes, init_values=0.5)


def _images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(PROCESSES, 3, 3, 16, 16)


def _checkpointed(model: Any) -> nn.Module:
    model.set_grad_checkpointing()
    return sharded(model)


_BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": lambda model: DistributedDataParallel(vk.fuse(model)),
    "fused after DDP": lambda model: vk.fuse(DistributedDataParallel(model)),
    "DDP, static graph": lambda model: DistributedDataParallel(vk.fuse(model), static_graph=True),
    "DDP, compiled": lambda model: torch.compile(DistributedDataParallel(vk.fuse(model)), backend="aot_eager"),
    "FSDP2": lambda model: sharded(vk.fuse(model)),
    "fused after FSDP2": lambda model: vk.fuse(sharded(model)),
    "FSDP2, checkpointed": lambda model: _checkpointed(vk.fuse(model)),
    "FSDP2, bfloat16": lambda model: sharded(vk.fuse(model), mp_policy=_BFLOAT16),
}


def _work(rank: int, folder: str) -> None:
    """One process: the gradients of every wrapper, the kernels that ran and what is said, saved by the first."""
    with processes.joined(rank, folder):
        model, images = _model(), _images()
        results = {}
        for name, wrap in WRAPPERS.items():
            wrapped = wrap(copy.deepcopy(model))
            gradients, calls = processes.gradients(wrapped, images[rank])
            ran = {(call.op, call.direction) for call in calls}
            results[name] = (gradients, ran, vk.explain(wrapped).summary)
        if rank == 0:
            torch.save(results, f"{folder}/results")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=PROCESSES)
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_are_those_of_the_stock_model_in_one_process(name: str, results: dict[str, Any]) -> None:
    model = _model()
    processes.loss(model, _images().flatten(0, 1)).backward()
    gradients, ran, _ = results[name]
    for (parameter_name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        largest, error = parameter.grad.abs().max(), (gradient - parameter.grad).abs().max()
        assert gradient.dtype == torch.float32
        assert error <= TOLERANCE.get(name, 1e-4) * largest + 1e-6, f"{parameter_name}: {error}, largest {largest}"
    assert ran == {(op, direction) for op in OPS for direction in ("forward", "backward")}


def test_explain_reads_a_wrapped_model(results: dict[str, Any]) -> None:
    assert results["DDP"][2] == results["fused after DDP"][2] == "2 of 2 blocks fused"
