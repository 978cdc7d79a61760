"""Two gloo processes: FullyShardedDataParallel (FSDP1), whose units gather their weights while they are called."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dino_blocks as dino
import processes
import pytest
import torch
from processes import PROCESSES
from timm_vit import OPS, timm, vit
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

import vitkernels as vk

pytestmark = processes.needs_gloo
RATE = 0.5
EACH_BLOCK = ModuleWrapPolicy({timm.models.vision_transformer.Block, dino.Block, vk.nn.Block})
EACH_NORM = ModuleWrapPolicy({nn.LayerNorm, timm.models.vision_transformer.Block})
BY_SIZE = functools.partial(size_based_auto_wrap_policy, min_num_params=500)


def _timm() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return vit(**sizes, init_values=0.5)


def _own() -> nn.Module:
    return vk.nn.VisionTransformer(16, 8, num_classes=5, embed_dim=32, depth=2, num_heads=2, init_values=0.5)


class _Dino(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.encoder = dino.Encoder([dino.Block(32, 2, mlp_ratio=2, init_values=0.5) for _ in range(2)], 32)

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(self.patches(image).flatten(2).mT).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {"timm": _timm, "DINO": _Dino, "vitkernels": _own}
WRAPS: dict[str, Any] = {"each block": EACH_BLOCK, "each norm": EACH_NORM, "by size": BY_SIZE, "whole": None}
CASES = [
    (model, wrap, original, first)
    for model, wrap, original in itertools.product(MODELS, WRAPS, (False, True))
    for first in (("fuse", "wrap") if model == "timm" and wrap == "each block" else ("fuse",))
    if model == "timm" or wrap == "each block"
]


def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def _images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(PROCESSES, 3, 3, 16, 16)


def _wrapped(case: tuple[str, str, bool, str], **options: Any) -> nn.Module:
    name, wrap, original, first = case

    def shard(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=WRAPS[wrap],
            device_id=torch.device("cpu"),
            use_orig_params=original,
            **options,
        )

    model = _built(name)
    return shard(vk.fuse(model)) if first == "fuse" else vk.fuse(shard(model))


def _whole_weights(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {name: each.detach().clone() for name, each in model.named_parameters()}


def _work(rank: int, folder: str) -> None:
    """One process: outputs, the weights after a step of training, and the kernels that ran, for every case."""
    with processes.joined(rank, folder):
        results = {}
        for case in CASES:
            model, images = _wrapped(case), _images()[rank]
            with vk.record() as calls:
                with torch.no_grad():
                    output = model.eval()(images)
                optimizer = torch.optim.SGD(model.parameters(), RATE)
                processes.loss(model.train(), images).backward()
                optimizer.step()
            ran = {(call.op, call.direction) for call in calls}
            results[case] = (output, _whole_weights(model), ran, vk.explain(model).summary)
        if rank == 0:
            torch.save(results, f"{folder}/results")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=PROCESSES)
    return torch.load(folder / "results")  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_a_step_are_those_of_the_stock_model(case: tuple[str, str, bool, str], results: Any) -> None:
    model = _built(case[0])
    output, weights, ran, summary = results[case]
    with torch.no_grad():
        torch.testing.assert_close(output, copy.deepcopy(model).eval()(_images()[0]), atol=1e-5, rtol=1e-5)
    processes.loss(model, _images().flatten(0, 1)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight.detach(), atol=1e-5, rtol=1e-4, msg=name)
    apart = {"each norm": {"add_layer_norm"}, "by size": {"linear", "mlp"}}.get(case[1], set())  # units are called
    if case[2:] == (False, "wrap"):
        assert summary.startswith("0 of 2 blocks fused; block 0: it has the parameters _flat_param")
        apart = {"add_layer_norm"}
    assert ran == {(op, direction) for op in OPS - apart for direction in ("forward", "backward")}
    if case[1] == "by size":
        assert summary.startswith("0 of 2 blocks fused; block 0: qkv is FullyShardedDataParallel")
