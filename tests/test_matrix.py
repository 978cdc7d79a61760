"""The frameworks that people train and serve with, a row each: a fused model's numbers in them are the stock model's.

A row is a function of `frameworks.py`, called with a model and with the same model fused, from the same random state:
losses, gradients and weights must agree, and the kernels must have run. DistributedDataParallel and FSDP2 have two
processes, and their gradients are those of one process with all the data.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import frameworks
import fused
import peers
import processes
import pytest
import torch
from frameworks import Numbers
from processes import PROCESSES, sharded
from timm_vit import OPS, vit
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import vitkernels as vk

WHOLE = "2 of 2 blocks fused"
ONE = "1 of 1 blocks fused"  # where a compiler takes its time


def own_vit() -> nn.Module:
    """The package's own, which takes images of any size."""
    model = vk.nn.VisionTransformer(**{**peers.SIZES, "depth": 1})
    fused.stir(model)
    return model


@dataclass(frozen=True)
class Row:
    """A framework.

    Attributes:
        run: what it makes of a model.
        model: builds the stock one.
        expected: what gives the stock model's numbers, where they need not come from the framework.
        needs: packages.
        error: allowed between the two, relative to a tensor's norm: float32's rounding, or what 16 bits make of it.
        forward, backward: ops that must have run, and no others.
        counts: of forward calls of an op, where the row is about them.
        summary: what `explain` says afterwards.
    """

    run: Callable[[nn.Module], Numbers]
    model: Callable[[], nn.Module] = vit
    expected: Callable[[nn.Module], Numbers] | None = None
    needs: tuple[str, ...] = ()
    error: float = 1e-5
    forward: frozenset[str] = frozenset(OPS)
    backward: frozenset[str] = frozenset(OPS)
    counts: dict[str, int] = field(default_factory=dict)
    summary: str = WHOLE


def any_size() -> nn.Module:
    return vit(dynamic_img_size=True, depth=1)


NOTHING: frozenset[str] = frozenset()
HALF = 2e-2
ROWS = {
    "compile": Row(frameworks.compiled, any_size, frameworks.of_two_sizes, summary=ONE),
    "compile, any size": Row(frameworks.compiled_for_any_size, own_vit, frameworks.of_two_sizes, summary=ONE),
    "export and AOTInductor": Row(
        frameworks.ahead_of_time,
        lambda: vit(depth=1),
        frameworks.in_eval,
        backward=NOTHING,
        summary=ONE,
    ),
    "CUDA graphs": Row(frameworks.cuda_graph),
    "autocast bf16": Row(lambda model: frameworks.steps(model, dtype=torch.bfloat16), error=HALF),
    "autocast fp16 with GradScaler": Row(frameworks.half_with_scaler, error=HALF),
    "selective checkpointing": Row(
        frameworks.selective_checkpointing, counts={"mlp": 2, "linear": 4, "attention_qkv": 4}
    ),
    "torch.func": Row(frameworks.functional),
    "Lightning": Row(frameworks.lightning, needs=("lightning",), error=HALF),
    "accelerate": Row(frameworks.accelerated, needs=("accelerate",), error=HALF),
    "transformers' Trainer": Row(frameworks.trainer, peers.transformers_vit, needs=("transformers", "accelerate")),
    "timm's training script": Row(frameworks.timm_loop, error=HALF),
    "EMA": Row(frameworks.ema),
    "SWA": Row(frameworks.swa),
    "LoRA": Row(frameworks.lora, needs=("peft",), backward=frozenset(OPS - {"patch_embed"})),  # it is frozen
    "torchao": Row(
        frameworks.quantized,
        needs=("torchao",),
        forward=frozenset({"patch_embed", "attention_qkv", "add_layer_norm"}),
        backward=NOTHING,
        summary="0 of 2 blocks fused; block 0: a Int8Tensor weight on qkv; block 1: a Int8Tensor weight on qkv",
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_framework(name: str) -> None:
    row = ROWS[name]
    for package in row.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    stock = row.model()
    model = vk.fuse(copy.deepcopy(stock))
    torch.manual_seed(0)
    expected = (row.expected or row.run)(stock)
    torch.manual_seed(0)
    with vk.record() as calls:
        got = row.run(model)
    for direction, ops in (("forward", row.forward), ("backward", row.backward)):
        assert {call.op for call in calls if call.direction == direction} == ops
    forward = [call.op for call in calls if call.direction == "forward"]
    assert {op: forward.count(op) for op in row.counts} == row.counts
    assert vk.explain(model).summary == row.summary
    assert not vk.explain(model).fallbacks
    assert got.keys() == expected.keys()
    for each, tensor in expected.items():
        difference = (got[each] - tensor).norm()
        assert difference <= row.error * tensor.norm() + 1e-5, f"{each}: {difference}, of {tensor.norm()}"


# --------------------------------------------------------------------------------------------------- two processes

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


@processes.needs_gloo
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


@processes.needs_gloo
def test_explain_reads_a_wrapped_model(results: dict[str, Any]) -> None:
    assert results["DDP"][2] == results["fused after DDP"][2] == WHOLE
