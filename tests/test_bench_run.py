"""What a run of the benches is: its suites and its limit, the commit and the machine that it names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import skip_without

import vitkernels as vk

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import machine, peers
from bench.conftest import Session
from bench.measure import OURS
from bench.suites import NAMES, PARTS, plans

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_the_commit_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words: str) -> str:
        who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init")
    root = tmp_path / "checkout"
    (root / "vitkernels").mkdir(parents=True)
    (root / "bench/results").mkdir(parents=True)
    (root / "bench/NOTES.md").write_text("notes")
    monkeypatch.setattr(machine, "ROOT", root)
    assert machine.revision() == f"version {vk.__version__}", "the checkout around it is another's"
    (tmp_path / ".git").rename(root / ".git")
    (root / "vitkernels/linear.py").write_text("x = 1")
    git("-C", "checkout", "add", ".")
    git("-C", "checkout", "commit", "--message=first")
    commit = git("-C", "checkout", "rev-parse", "--short=10", "HEAD").strip()
    (root / "bench/results/new.json").write_text("{}")
    (root / "bench/NOTES.md").write_text("more notes")
    assert machine.revision() == commit, "results and notes are no code"
    (root / "vitkernels/mlp.py").write_text("y = 1")
    assert machine.revision() == f"{commit}-dirty"
    git("-C", "checkout", "add", ".")
    git("-C", "checkout", "commit", "--message=second")
    (root / "vitkernels/mlp.py").write_text("y = 2")
    assert machine.revision() == f"{git('-C', 'checkout', 'rev-parse', '--short=10', 'HEAD').strip()}-dirty"


def test_ceilings_are_rates() -> None:
    assert machine.gemm_ceiling(CPU, torch.float32) > 1e9
    assert machine.copy_ceiling(CPU) > 1e8
    assert machine.cache_bytes(CPU) >= 2**20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", NAMES)
def test_every_suite_has_cases_of_its_own_for_each_device(suite: str, device: str) -> None:
    keys = [plan.make().key for plan in plans(suite, torch.device(device))]
    assert len(keys) == len(set(keys))
    assert len(keys) >= (1 if suite == "autotuned" else 4)
    if device == "cuda" and suite in PARTS:
        assert {key.dtype for key in keys} == {"float32", "bfloat16", "float16"}
        assert {"vit_large_patch14", "vit_so400m_patch14", "vit_giant_patch14"} <= {key.name for key in keys}


def test_absent_packages_are_listed() -> None:
    assert set(peers.absent()) <= {
        "apex",
        "flash_attn",
        "liger_kernel",
        "quack",
        "timm",
        "torchvision",
        "transformer_engine",
        "transformers",
        "xformers",
    }


def test_no_case_begins_after_the_limit(tmp_path: Path) -> None:
    (plan, *_) = plans("smoke", CPU)
    key = plan.make().key
    out = tmp_path / "results.json"
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        Session(out, limit=-1.0).timed(plan, key, OURS)
    assert len(Session(out, limit=60.0).timed(plan, key, OURS).samples) == 3


def test_pytest_benchmark_replays_what_was_measured(tmp_path: Path) -> None:
    skip_without("ext")
    out, statistics = tmp_path / "results.json", tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "bench.run", "--suite=smoke", f"--out={out}", f"--benchmark-json={statistics}"]
    # pytest-benchmark times nothing in a worker of pytest-xdist
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert {row["kind"] for row in rows} == {"op", "block", "model"}
    assert {row["direction"] for row in rows} == {"forward", "forward + backward", "training step"}
    assert content["versions"]["torch"] == torch.__version__
    needed = {"revision", "seconds", "spread", "rounds", "flops", "bytes", "gemm", "copy", "share", "mfu", "memory"}
    assert all(needed <= row.keys() for row in rows)
    medians = [each["stats"]["median"] for each in json.loads(statistics.read_text())["benchmarks"]]
    assert medians == [row["seconds"] for row in rows]
