"""What is timed, by suite: the same list for every device, at sizes that each can bear.

quick      each op, a block and a small model: minutes
ops        each op, forward and with its backward
models     blocks and whole models against every library's
scaling    how cost grows with tokens, batch, width and depth
towers     what people train beside plain ViTs, stock and after `vk.fuse`
memory     memory against time: whole models, stock and fused, with and without running each block again in backward
training   whole models at the sizes that people train at, against eager and compiled timm
full       ops, models and scaling
autotuned  one whole model, at the size of training, against the fastest that torch.compile makes
smoke      seconds: what the tests run, too small to say anything

torch.compile's max-autotune is for GPUs: on a CPU it tries matrix products for minutes, for what the default gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import OURS, Bench, Effort
from bench.models import ModelBench
from bench.ops import OpBench, Size, of_size
from bench.swapped import TowerBench, all_towers

FORWARD, BOTH = False, True
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EAGER = (OURS, "vk.fuse(timm)", "naive", "timm")
LIBRARIES = (*EAGER, "timm, compiled", "transformers", "torchvision")
TRAINED = ("vk.fuse(timm)", "timm", "timm, compiled", "naive")
RECOMPUTE = ("timm", "timm, recompute", OURS, f"{OURS}, recompute", "vk.fuse(timm)", "vk.fuse(timm), recompute")
EVERY = (*LIBRARIES, "naive, conv2d", f"{OURS}, compiled", "timm, max-autotune")


@dataclass(frozen=True)
class Plan:
    """A case still to be built, and how long to measure it."""

    make: Callable[[], Bench]
    effort: Effort


def plans(suite: str, device: torch.device) -> Iterator[Plan]:
    """The cases of a suite, in the order in which they are measured."""
    for name in PARTS.get(suite, (suite,)):
        yield from SUITES[name](device)


def _ops(
    device: torch.device, size: Size, dtype: torch.dtype, effort: Effort, *directions: bool, **more: Any
) -> Iterator[Plan]:
    for case in of_size(size):
        for backward in directions:
            yield Plan(functools.partial(OpBench, case, dtype, device, backward, **more), effort)


def _model(effort: Effort, *arguments: Any, **more: Any) -> Plan:
    return Plan(functools.partial(ModelBench, *arguments, **more), effort)


def _block(
    effort: Effort, size: Size, dtype: torch.dtype, device: torch.device, lanes: tuple[str, ...], **sweep: Any
) -> Plan:
    arguments: dict[str, Any] = {"embed_dim": size.width, "num_heads": size.heads, "depth": 1}
    arguments |= {"img_size": 32, "patch_size": 16}  # a block sees neither
    if size.hidden:
        arguments["mlp_ratio"] = size.hidden / size.width
    return _model(effort, "block", arguments, size.batch, dtype, device, lanes, block=True, tokens=size.tokens, **sweep)


def quick(device: torch.device) -> Iterator[Plan]:
    if device.type == "cuda":
        effort, size = Effort(0.5, 7, 31), Size(64, 197, 768, 12)
        yield _model(Effort(4, 7, 31), "vit_base_patch16", {}, 128, BF16, device, EAGER, update=True)
        yield _block(effort, size, BF16, device, (*EAGER, "timm, compiled"))
        yield from _ops(device, size, BF16, effort, BOTH, FORWARD, autotune=False)
        return
    effort, size = Effort(1.0, 5, 15), Size(8, 197, 384, 6)
    for dtype in (F32, BF16):
        yield from _ops(device, size, dtype, effort, BOTH)
        yield _block(effort, size, dtype, device, EAGER)
    yield _model(effort, "vit_tiny_patch16", {}, 4, F32, device, EAGER)


def ops(device: torch.device) -> Iterator[Plan]:
    if device.type == "cpu":
        for dtype in (F32, BF16):
            yield from _ops(device, Size(8, 197, 384, 6), dtype, Effort(1.0, 9, 31), FORWARD, BOTH)
        return
    effort = Effort(1.0, 9, 51)
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16)):
        for batch, tokens, patch in ((256, 197, 16), (256, 257, 14), (64, 577, 16), (32, 1370, 14)):
            yield from _ops(device, Size(batch, tokens, width, heads, patch=patch), BF16, effort, FORWARD, BOTH)
    for size in (Size(128, 256, 1152, 16, 4304, 14), Size(64, 257, 1408, 16, 6144, 14)):  # so400m, giant
        yield from _ops(device, size, BF16, effort, FORWARD, BOTH)
    for dtype in (F32, F16):
        yield from _ops(device, Size(64, 197, 768, 12), dtype, effort, FORWARD, BOTH)


def models(device: torch.device) -> Iterator[Plan]:
    if device.type == "cpu":
        for dtype in (F32, BF16):
            yield _model(Effort(12, 5, 9), "vit_small_patch16", {}, 8, dtype, device, LIBRARIES)
        for name, batch in (("vit_base_patch16", 4), ("vit_tiny_patch16", 16)):
            for dtype in (F32, BF16):
                yield _model(Effort(6, 5, 9), name, {}, batch, dtype, device, EAGER)
        return
    effort = Effort(10, 7, 31)
    for size in (Size(256, 197, 768, 12), Size(64, 577, 1024, 16)):
        yield _block(effort, size, BF16, device, EVERY)
    for name, batches in (
        ("tiny", (512, 128, 64)),
        ("small", (512, 128, 64)),
        ("base", (256, 64, 32)),
        ("large", (128, 32, 16)),
    ):
        for batch, side, patch in zip(batches, (224, 384, 518), (16, 16, 14), strict=True):
            yield _model(
                effort, f"vit_{name}_patch{patch}", {"img_size": side}, batch, BF16, device, EVERY, update=True
            )
    for name, more in (("so400m", {"class_token": False, "global_pool": "avg"}), ("giant", {})):
        yield _model(effort, f"vit_{name}_patch14", more, 32, BF16, device, EVERY, update=True)
    for dtype in (F32, F16):
        yield _model(effort, "vit_base_patch16", {}, 64, dtype, device, EVERY, update=True)


def scaling(device: torch.device) -> Iterator[Plan]:
    gpu = device.type == "cuda"
    dtype, grown = (BF16, 16) if gpu else (F32, 1)  # a GPU bears 16 times the batch
    width, heads = (768, 12) if gpu else (384, 6)
    lanes = (*EAGER, "timm, compiled") if gpu else EAGER
    effort = Effort(2.0, 5, 15)
    for tokens in (64, 256, 1024, 4096):
        # small: the judge holds N x N scores in float64
        size = Size(4, tokens, width, heads) if gpu else Size(1, tokens, width // 2, heads // 2)
        (attention,) = (case for case in of_size(size) if case.op == "attention_qkv")
        sweep: dict[str, Any] = {"sweep": "tokens", "at": tokens}
        yield Plan(functools.partial(OpBench, attention, dtype, device, True, **sweep), effort)
        yield _block(effort, size, dtype, device, lanes, **sweep)
    for batch in (1, 4, 16):
        size = Size(batch * grown, 197, width, heads)
        yield _block(effort, size, dtype, device, lanes, sweep="batch", at=batch * grown)
    for wide in (width // 2, width, width * 2):
        yield _block(effort, Size(4 * grown, 197, wide, wide // 64), dtype, device, lanes, sweep="width", at=wide)
    for depth in (2, 4, 8):
        arguments = {"embed_dim": width // 2, "num_heads": heads // 2, "depth": depth, "patch_size": 16}
        yield _model(effort, "vit", arguments, 4 * grown, dtype, device, lanes, sweep="depth", at=depth)


def towers(device: torch.device) -> Iterator[Plan]:
    gpu = device.type == "cuda"
    for tower in all_towers(16 if gpu else 1):
        for dtype in (BF16,) if gpu else (F32, BF16):
            yield Plan(functools.partial(TowerBench, tower, dtype, device), Effort(2.0, 5, 15))


def memory(device: torch.device) -> Iterator[Plan]:
    gpu = device.type == "cuda"
    batches = {"tiny": 512, "small": 256, "base": 128, "large": 64} if gpu else {"tiny": 16, "small": 8}
    for dtype in (BF16,) if gpu else (F32, BF16):
        for name, batch in batches.items():
            yield _model(Effort(8, 5, 15), f"vit_{name}_patch16", {}, batch, dtype, device, RECOMPUTE, kind="memory")


def training(device: torch.device) -> Iterator[Plan]:
    gpu = device.type == "cuda"
    for name, batch, side, patch, more in (
        ("base", 256, 224, 16, (OURS, "vk.fuse(timm), compiled")),
        ("small", 256, 224, 16, ()),
        ("large", 128, 224, 16, ()),
        ("large", 16, 518, 14, ()),  # as DINOv2 is trained
    ):
        arguments = {"img_size": side} if gpu else {"img_size": side, "depth": 1}
        yield _model(
            Effort(4, 5, 15), f"vit_{name}_patch{patch}", arguments, batch if gpu else 1, BF16, device,
            (*TRAINED, *more), update=True,
        )  # fmt: skip


def autotuned(device: torch.device) -> Iterator[Plan]:
    gpu = device.type == "cuda"
    peer = "timm, max-autotune" if gpu else "timm, compiled"
    effort, batch = (Effort(60, 7, 31), 256) if gpu else (Effort(12, 5, 9), 4)
    yield _model(effort, "vit_base_patch16", {}, batch, BF16, device, (OURS, "timm", peer), update=True)


def smoke(device: torch.device) -> Iterator[Plan]:
    effort, size = Effort(0.0, 3, 3), Size(1, 16, 32, 2)
    yield from (plan for plan in _ops(device, size, F32, effort, FORWARD, BOTH) if plan.make().key.name == "linear")
    yield _block(effort, size, F32, device, (OURS, "naive"))
    arguments = {"embed_dim": 32, "num_heads": 2, "depth": 1, "img_size": 32, "patch_size": 16}
    yield _model(effort, "vit", arguments, 2, F32, device, (OURS, "naive"), update=True)


SUITES: dict[str, Callable[[torch.device], Iterator[Plan]]] = {
    "quick": quick,
    "ops": ops,
    "models": models,
    "scaling": scaling,
    "towers": towers,
    "memory": memory,
    "training": training,
    "autotuned": autotuned,
    "smoke": smoke,
}
PARTS = {"full": ("ops", "models", "scaling")}
NAMES = (*SUITES, *PARTS)
