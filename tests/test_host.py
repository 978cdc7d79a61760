"""The bench of host time: it counts what it says, and its figures reach the report."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the driver that launches nothing is Triton's")

from bench import host, kinds
from vitkernels import kernels

if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is launched", allow_module_level=True)


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compile_it", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    out = tmp_path / "host.json"
    assert host.main(["--rounds", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    rows = {(row["width"], row["library"], row["dtype"], row["backend"]): row for row in content["rows"]}
    assert len(rows) == 2 * 2 * 21, (
        "of each width and dtype timm's three twice, transformers', vk.nn's, towers', products"
    )
    for (_, library, _, backend), row in rows.items():
        assert row["microseconds"] > 0
        assert row["calls"] > 0
        assert row["allocations"] > 0
        assert (row["launches"] > 0) == (backend.split(",")[0] in ("ext", "triton")), library
    for compiled in ("", ", compiled"):
        assert rows[48, "timm", "float32", f"ext{compiled}"]["launches"] == 12, "six launches a block each way"
    assert capsys.readouterr().out.splitlines()[-1].startswith("host: float32 ext ")
    assert all(row["stock"] == row["microseconds"] for row in rows.values() if row["backend"] == "stock")
    for (
        tower
    ) in host.TOWERS:  # a block is one launch for the norm, four or five for attention, two for the feed-forward
        assert 12 <= rows[48, tower, "float32", "ext"]["launches"] <= 14
    assert host.report(content).count(" | timm | ") == 24


def test_no_lane_runs_twice_in_a_row_and_each_comes_after_every_other() -> None:
    orders = list(host.turns(200, 5))
    assert all(sorted(order) == list(range(5)) for order in orders)
    row = [lane for order in orders for lane in order]
    pairs = list(itertools.pairwise(row))
    assert all(one != other for one, other in pairs)
    counts = [pairs.count((one, other)) for one in range(5) for other in range(5) if one != other]
    assert min(counts) > 25, "of 50"


def test_kinds_of_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of those that are asked for, stock and on both backends; the table has the dearest first."""
    out = tmp_path / "kinds.json"
    assert kinds.main(["--rounds", "2", "--only", "twins", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert {row["block"] for row in content["rows"]} >= {"twins, windows", "twins, a smaller image"}
    for row in content["rows"]:
        assert row["microseconds"] > 0
        assert row["ratios"].keys() == {"ext", "triton"}
    lines = [line for line in kinds.report(content).splitlines() if line.startswith("| timm")]
    dearest = [max(map(float, line.rstrip(" |").split(" | ")[2:])) for line in lines]
    assert len(lines) == len(content["rows"])
    assert dearest == sorted(dearest, reverse=True)
    assert kinds.main(["--only", "no such block", "--out", str(out)]) == 2
    assert "no such block" in capsys.readouterr().out
