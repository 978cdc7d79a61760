"""Towers that are timed stock and fused: both are judged, both get a row, and the table says which is faster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import bench_results
import pytest
import torch
from conftest import skip_without
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import swapped, tables
from bench.measure import Effort, Key, measure
from bench.swapped import FUSED, KIND, STOCK, Tower, TowerBench
from vitkernels.fuse.swap import Fused

CPU = torch.device("cpu")
_QWEN = {"hidden_size": 48, "num_heads": 3, "intermediate_size": 96}
_SWIN = {"img_size": 56, "embed_dim": 24, "depths": (2,), "num_heads": (3,), "num_classes": 4, "drop_path_rate": 0.0}
SMALL: dict[str, Callable[[], Tower]] = {
    "packed": lambda: swapped.qwen2_5_vl(2, **_QWEN),
    "padded": lambda: swapped.naflex(2, embed_dim=48, num_heads=3, depth=1, num_classes=4),
    "windows": lambda: swapped.image_tower("swin_tiny_patch4_window7_224", 2, 56, **_SWIN),
    "tokens": lambda: swapped.swin_stage(0, 1),
}
BF16 = pytest.param(torch.bfloat16, id="bf16")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), BF16])
@pytest.mark.parametrize("name", ["packed", "padded", "windows"])
def test_a_tower_is_measured_stock_and_fused(name: str, dtype: torch.dtype) -> None:
    skip_without("ext")
    tower = SMALL[name]()
    if not tower.is_installed():
        pytest.skip(f"{tower.package} is not installed")
    timed = measure(TowerBench(tower, dtype, CPU), Effort(0.0, 3, 3))
    assert timed.keys() == {FUSED, STOCK}
    for lane, each in timed.items():
        assert "failed" not in each.row, (lane, each.row)
        assert len(each.samples) == 3
    assert timed[FUSED].row["backends"] == ["ext"]
    assert "backends" not in timed[STOCK].row


@pytest.mark.parametrize(("name", "blocks"), [("packed", 1), ("tokens", 2), ("padded", 1)])
def test_lanes_have_the_same_weights_and_one_is_fused(name: str, blocks: int) -> None:
    tower = SMALL[name]()
    if not tower.is_installed():
        pytest.skip(f"{tower.package} is not installed")
    bench = TowerBench(tower, torch.float32, CPU)
    stock, fused = bench.stock, bench.fused()
    assert not any(isinstance(each, Fused) for each in stock.modules())
    assert sum(isinstance(each, Fused) and each.is_block for each in fused.modules()) == blocks
    both = zip(stock.state_dict().items(), fused.state_dict().items(), strict=True)
    assert all(one == other and torch.equal(weight, copied) for (one, weight), (other, copied) in both)
    inputs = bench.inputs(1)
    assert (name != "padded") == any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in inputs.values()
    ), "a block's gradient of its tokens is timed, an image's is not"
    assert bench.flops > 0


def test_work_is_that_of_the_stock_model() -> None:
    tower = Tower("linear", "torch", "", lambda: nn.Linear(4, 8), lambda draw, device: {"input": draw(3, 4)})
    bench = TowerBench(tower, torch.float32, CPU)
    assert bench.flops == 3 * 2 * 3 * 4 * 8
    assert bench.bytes == 4 * (3 * (4 * 8 + 8) + 2 * 3 * 4)


def test_a_table_says_which_is_faster() -> None:
    key = Key(KIND, "Swin-T", "B=2", "float32", "forward + backward")
    slow = Key(KIND, "Hiera", "B=2", "float32", "forward + backward")
    missing = Key(KIND, "PVT", "B=2", "float32", "forward + backward")
    content = bench_results.content(
        bench_results.row(key, FUSED, 1.0),
        bench_results.row(key, STOCK, 1.5, memory=2**31),
        bench_results.row(slow, FUSED, 1.0),
        bench_results.row(slow, STOCK, 0.8, inexact="out"),
        bench_results.failed(missing, FUSED, "not timed, wrong: output"),
        bench_results.row(missing, STOCK, 1.0),
    )
    table = tables.towers(content)
    assert "| Swin-T | B=2 | 1.5 s | 1 s | 1.50 | 2.00 |" in table
    assert "| Hiera | B=2 | 800 ms | 1 s | **0.80** (inexact) | 1.00 |" in table
    assert "| PVT | B=2 | 1 s | not timed, wrong: output |  |  |" in table
    assert tables.models(content) == tables.ops(content) == "", "it is a table of its own"
