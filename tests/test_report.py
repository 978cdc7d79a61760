"""The report from a made-up results file: every figure in its place, failures and slow cases too."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import peers as libraries
import pytest
import torch
from rich.console import Console

from vitkernels.nn import PRESETS, VisionTransformer

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_results import MODEL, OP, case, content, failed, row, swept

from bench import headline, report, scaling, tables, training
from bench.measure import OURS

ROWS = [
    *case(OP, 0.010, eager=0.008),
    row(OP, "rough", 0.030, inexact="out: worst error 2, allowed 1"),
    failed(OP, "sdpa flash", "RuntimeError: no kernel | for this"),
    *case(MODEL, 2.0, timm=3.0),
    row(MODEL, "naive", 4.0, memory=2**31),
    *swept(1.5),
]
DEMO = {
    "model": "vit_tiny",
    "steps": 3,
    "batch_size": 32,
    "device": "Abacus (2 threads)",
    "torch": "2.0",
    "test_accuracy": {"naive": 0.98, "fused": 0.975},
    "step_seconds": {"naive": 0.2, "fused": 0.1},
    "images_per_second": {"naive": 160.0, "fused": 320.0},
    "largest_loss_difference": 0.001,
    "seconds_to_97": {"naive": None, "fused": 12.5},
    "ops": [{"backend": "ext"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "abacus.json").write_text(json.dumps(content(*ROWS)))
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "other", "stages": {}}))
    return tmp_path


def test_the_report_and_its_pictures(folder: Path) -> None:
    assert report.main(["--results", str(folder)]) == 0
    text = (folder / report.REPORT).read_text()
    assert "| mlp | B=8 N=197 D=384 H=6 | forward + backward | **eager 0.80**; rough 3.00 (inexact); " in text
    assert "sdpa flash: RuntimeError: no kernel / for this | 10000% | 10 ms |" in text
    assert "| timm 1.50; naive 2.00 | timm 1.00; naive 2.00 | 50% | 1,024 MiB | 2 s |" in text
    assert "Peers that are not installed here: apex." in text
    assert "100 GFLOP/s in float32; 10.0 GB/s copied" in text
    assert "- mlp, B=8 N=197 D=384 H=6, float32, forward + backward: rough: inexact, out: worst error 2" in text
    assert "GPU: not yet measured." in text
    assert "| seconds of training to 97 % | not reached | 12.5 s |" in text
    for picture in ("speedup", "roofline", "tokens", "memory"):
        assert f"abacus-{picture}.png" in text
        assert (folder / f"abacus-{picture}.png").read_bytes().startswith(b"\x89PNG")
    results = report.Results.read(folder)
    assert report.stale(results, folder, pages=()) == []
    (folder / report.REPORT).write_text(text.replace("1.50", "1.60"))
    assert report.stale(results, folder, pages=()) == [folder / report.REPORT]


def test_the_commits_that_were_measured() -> None:
    old, new, changed = (row(OP, lane, 1.0) for lane in (OURS, "eager", "timm"))
    new["revision"], changed["revision"] = "abc", "abd-dirty"
    known = report.report(report.Results({"abacus": content(new, changed)}))
    assert "\ntorch 2.0.\nMeasured at abc, abd-dirty.\nPeers that are" in known
    assert tables.revisions(content(old, new)) == "Measured at commits that were not recorded, abc."
    assert "\ntorch 2.0.\nPeers that are" in report.report(report.Results({"abacus": content(old)}))
    assert "torch 2.0, measured at abc; every op" in tables.demo({**DEMO, "revision": "abc"})
    assert "torch 2.0; every op" in tables.demo(DEMO)


def test_of_which_run_a_model_is() -> None:
    slow, quick = (
        [{**each, "run": run} for each in case(MODEL, 2.0, timm=2.0 * gain)] for run, gain in ((1, 1.2), (2, 1.5))
    )
    assert tables.models(content(*slow)).endswith("\n\nEach row is of one run.\n")
    both = tables.models(content(*slow, *quick))
    assert "| timm 1.20 |" in both
    assert "1.50" not in both
    assert both.endswith("\n\nEach row is of one run: of 2 separate ones, the one where timm's ratio is lowest.\n")
    told = headline.sentence([content(*(row(MODEL, "vk.fuse(timm)", 2.0, run=run) for run in (1, 2)), *slow, *quick)])
    assert "takes 1.20 to 1.20 times as long" in told
    assert tables.models(content(row(OP, OURS, 1.0))) == ""


def test_a_wrong_case_has_no_figure_in_the_report() -> None:
    rows = [failed(OP, OURS, "not timed, wrong: gradient of w1: worst error 2"), row(OP, "eager", 0.008)]
    text = tables.ops(content(*rows))
    assert "| eager 8 ms |  | not timed, wrong: gradient of w1: worst error 2 |" in text


def test_ours_on_the_reference_is_said() -> None:
    ours = row(OP, OURS, 1.0, backends=["ext", "reference"])
    assert tables.wrong(content(ours)) == f"- {OP}: {OURS}: ran on the plain-torch reference"
    assert tables.wrong(content(row(OP, OURS, 1.0))) == "None."


def test_the_readme_shows_stock_over_fused() -> None:
    fused, stock = row(MODEL, "vk.fuse(timm)", 2.0, memory=2**20), row(MODEL, "timm", 3.0, memory=2**21)
    told = report.BLOCKS["headline"](report.Results({"abacus": content(fused, stock)}))
    assert "takes 1.50 to 1.50 times as long as the same model after `vk.fuse`" in told
    assert "and 2.00 to 2.00 times the memory" in told
    assert told.endswith("GPU: not yet measured.\n")
    drawn = headline.picture([content(fused, stock)])
    lengths = {kind: float(length) for length, kind in re.findall(r'width="([\d.]+)" height="14" class="(\w+)"', drawn)}
    assert lengths["memory"] / lengths["time"] == pytest.approx(2.0 / 1.5, rel=1e-2)
    assert ">1.50<" in drawn
    assert headline.sentence([content(stock)]) == "Not yet measured.\n"


def test_what_an_op_must_do_at_the_least() -> None:
    key = dataclasses.replace(OP, dtype="bfloat16", direction="forward + backward")
    told = tables.work([content(*case(key, 0.010))])
    expected = row(key, "", 1.0)
    assert f"| {key.name} | {key.shape} | {expected['flops'] / 1e9:,.2f} | " in told
    assert tables.work([content(*case(OP, 0.010))]) == "Not yet measured.\n"


def test_a_gpu_in_the_results_takes_the_place_of_not_yet_measured() -> None:
    cpu, gpu = content(*case(OP, 1.0, eager=2.0)), content(*case(OP, 0.5, eager=2.0), kind="cuda", device="Chip")
    block = report.BLOCKS["ops"]
    assert tables.NOT_MEASURED in block(report.Results({"cpu": cpu}))
    both = block(report.Results({"cpu": cpu, "gpu": gpu}))
    assert tables.NOT_MEASURED not in both
    assert both.index("Abacus") < both.index("Chip, torch 2.0, float32")
    assert "eager 4.00" in both


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    text = report.report(report.Results.read(tmp_path))
    assert tables.NOT_MEASURED in text
    assert "Not yet measured." in text


def test_a_block_of_no_such_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no figures 'speed'; needs one of"):
        report.render("<!-- figures: speed -->\n<!-- end -->", report.Results())


def test_exponents_are_fitted() -> None:
    assert scaling.exponent({size: 3e-6 * size**1.5 for size in (64, 256, 4096)}) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="needs 2 or more"):
        scaling.exponent({64: 1.0})
    text = scaling.growth(content(*swept(1.5)))
    assert f"| {OURS} | 512 ms | 4.1 s | 32.8 s | 1.50 |" in text
    assert "| timm | 1.02 s (2.00) | 8.19 s (2.00) | OutOfMemoryError: no more | 1.50 |" in text


def test_where_a_step_becomes_bound_by_communication() -> None:
    with torch.device("meta"):
        weights = sum(each.numel() for each in VisionTransformer(**PRESETS[MODEL.name]).parameters())
    assert scaling.parameters(MODEL.name) == weights
    sent = scaling.traffic(weights, devices=8)
    assert sent == 7 * weights
    # 8 images in 2 s: two thirds of a step of b images take b / 6 s
    batch = scaling.bound_batch(sent, 1.25e9, 2.0 / 8)
    assert batch / 6 == pytest.approx(sent / 1.25e9)
    text = scaling.many_devices(content(*case(MODEL, 2.0, timm=4.0)))
    assert f"| vit_small_patch16, float32 | {OURS} | 22 M | 154 MB | 250 ms | {batch:.1f} | 0.1 |" in text
    assert f"| vit_small_patch16, float32 | timm | 22 M | 154 MB | 500 ms | {batch / 2:.1f} | 0.0 |" in text


def test_the_demo_with_timm_beside_it(tmp_path: Path) -> None:
    libraries.import_timm()
    result = training.run(tmp_path / "run", Console(quiet=True), quick=True)
    assert list(result["last_loss"]) == ["naive", "timm", "fused"]
    first = result["last_loss"]["naive"]
    assert all(abs(loss - first) < 1e-4 for loss in result["last_loss"].values()), "they began with other weights"
    assert result["seconds_to_97"] == {"naive": None, "timm": None, "fused": None}
    assert "| ratio | 1.00 | " in tables.demo(result)


def test_seconds_to_an_accuracy_count_steps_alone() -> None:
    rows = [
        {"fused": {"seconds": 2.0}},
        {"fused": {"seconds": 3.0}},
        {"test": {"fused": {"accuracy": 0.9}}},
        {"fused": {"seconds": 4.0}},
        {"test": {"fused": {"accuracy": 0.97}}},
        {"fused": {"seconds": 5.0}},
    ]
    assert training.seconds_to(0.97, "fused", rows) == 9.0
    assert training.seconds_to(0.98, "fused", rows) is None
