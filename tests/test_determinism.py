"""Under torch.use_deterministic_algorithms(True): the same bits each time, while other threads take the cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from accuracy import run
from case import Case
from cases import PLAIN
from conftest import skip_without
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch

REPEATS = 20


def largest(op: str) -> Case:
    """The op's case with the most elements: its work is split among threads."""
    return max(
        (case for case in PLAIN if case.op == op and torch.float32 in case.dtypes),
        key=lambda case: sum(tensor.numel() for tensor in case.build(torch.float32).values() if tensor is not None),
    )


OPS = [largest(op) for op in dict.fromkeys(case.op for case in PLAIN)]


@pytest.fixture
def strict() -> Iterator[None]:
    """What has no deterministic algorithm raises; three threads, whatever cores there are."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    yield
    torch.set_deterministic_debug_mode(before)


class Contention:
    """Two threads that multiply matrices, on as many cores as they get, until the block ends."""

    def __enter__(self) -> None:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._work) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        matrix = torch.ones(96, 96)  # nothing is drawn: the model draws
        while not self.stop.is_set():
            matrix @ matrix

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def check_same(results: Iterator[dict[str, Tensor]]) -> None:
    first = next(results)
    for again in results:
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_every_op_is_here() -> None:
    assert {case.op for case in OPS} >= set(dispatch.OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.op)
def test_ops(case: Case, dtype: torch.dtype, backend: str, strict: None) -> None:
    tensors = case.build(dtype)
    with Contention(), vk.record() as calls:
        check_same(run(case, tensors, forward=backend) for _ in range(REPEATS))
    assert {call.backend for call in calls} == {backend}
    assert len(calls) == 2 * REPEATS


@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps_of_a_model(autocast: bool, strict: None) -> None:
    """With stochastic depth, patches that are dropped, and a loss: from one seed, one model."""
    skip_without("ext")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)

    def step() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = vk.nn.VisionTransformer(32, 8, num_classes=10, embed_dim=48, depth=2, num_heads=3, drop_path_rate=0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return {"loss": loss.detach()} | {name: each.grad for name, each in model.named_parameters()}

    with Contention(), vk.record() as calls:
        check_same(step() for _ in range(REPEATS))
    assert {call.backend for call in calls} == {"ext"}
