"""`make gpu` without a GPU: what it would run is there, fits into its time, and a stopped stage loses nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import COMMANDS, PYTHON, ROOT, Outcome, Stage, run, run_all, stages


def python(name: str, code: str, limit: int = 30) -> Stage:
    return Stage(name, [PYTHON, "-c", code], limit)


EVERY = [stage for command in COMMANDS for stage in stages(command)]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("tests", ["install", "info", "behaviour", "cases", "benches"]),
        ("checks", ["install", "sanitizer", "behaviour, other ptxas", "cases, other ptxas"]),
        ("cuda", ["install with CUDA C++", "info", "cases", "benches"]),
        ("models", ["install", "models"]),
    ],
)
def test_limits_fit_into_nine_minutes(command: str, names: list[str]) -> None:
    assert sum(stage.limit for stage in stages(command)) <= gpu.LIMIT == 540
    assert [stage.name for stage in stages(command)] == names


@pytest.mark.parametrize("stage", EVERY, ids=lambda stage: stage.name)
def test_what_a_stage_runs_is_there(stage: Stage) -> None:
    """Its files and modules; the programs themselves are asked for when it runs."""
    words = [word for word in stage.command if word.endswith(".py")]
    words += [f"{word}" for before, word in zip(stage.command, stage.command[1:], strict=False) if before == "-m"]
    assert words
    for word in words:
        there = (ROOT / word).exists() if word.endswith(".py") else importlib.util.find_spec(word) is not None
        assert there, word


def test_without_workers_tests_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any("-n" in stage.command for command in COMMANDS for stage in stages(command))


def test_the_largest_cases_are_one_worker_s() -> None:
    behaviour = next(stage for stage in EVERY if stage.name == "behaviour")
    assert behaviour.command[behaviour.command.index("--dist") + 1] == "loadgroup"
    source = (ROOT / "tests" / "test_gpu.py").read_text()
    mark, test = source.index("@pytest.mark.xdist_group("), source.index("def test_more_than_2_31_elements")
    assert "def " not in source[mark:test]


def test_checks_run_the_same_tests_under_another_ptxas(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    first = {stage.name: stage for stage in stages("tests")}
    again = {stage.name: stage for stage in stages("checks")}
    for name in ("behaviour", "cases"):
        stage = again[f"{name}, other ptxas"]
        assert stage.command == first[name].command
        assert stage.environment["TRITON_PTXAS_PATH"] == str(gpu.other_ptxas())
        assert "TRITON_PTXAS_PATH" not in first[name].environment
        assert stage.missing is None, "triton brings it"
    absent = tmp_path / "ptxas-blackwell"
    assert Stage("cases", [PYTHON], 5, files=(absent,)).missing == str(absent)


def test_what_is_new_is_copied_out_though_a_later_stage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, out = tmp_path / "results", tmp_path / "out"
    figures.mkdir()
    (figures / "old.json").write_text("{}")
    os.utime(figures / "old.json", (0, 0))
    monkeypatch.setattr(gpu, "FIGURES", figures)
    code = f"import pathlib; pathlib.Path({str(figures / 'new.json')!r}).write_text('[1]')"
    planned = [python("benches", code), python("later", f"assert not __import__('os').path.exists({str(out)!r})")]
    run_all("a device", planned, tmp_path / "gpu.json", out)
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "new.json"]
    stages_written = json.loads((out / "gpu.json").read_text())["stages"]
    assert stages_written["benches"]["outcome"] == "passed"
    assert stages_written["later"]["outcome"] == "failed: exit code 1", "the copies were there before it ran"


def test_outcomes(tmp_path: Path) -> None:
    done = run_all(
        "a device",
        [python("good", "pass"), python("bad", "raise SystemExit(3)"), Stage("absent", ["no-such-program"], 5),
         Stage("needy", [PYTHON, "-c", "pass"], 5, ("no_such_package",))],
        tmp_path / "gpu.json",
    )  # fmt: skip
    assert [outcome.text for outcome in done.values()] == [
        "passed",
        "failed: exit code 3",
        "skipped: no-such-program is not installed",
        "skipped: no_such_package is not installed",
    ]
    assert [outcome.bad for outcome in done.values()] == [False, True, False, False]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "a device"
    assert {name: stage["outcome"] for name, stage in written["stages"].items()} == {
        name: outcome.text for name, outcome in done.items()
    }


def test_a_stage_past_its_limit_is_stopped_with_its_children_and_the_next_one_runs(tmp_path: Path) -> None:
    child, kept = tmp_path / "child", tmp_path / "kept"
    code = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(child)!r}).write_text(str(process.pid))
pathlib.Path({str(kept)!r}).write_text("half of the figures")
time.sleep(60)
"""
    start = time.monotonic()
    done = run_all("a device", [python("long", code, limit=5), python("next", "pass")], tmp_path / "gpu.json")
    assert time.monotonic() - start < 30
    assert done["long"].text == "stopped after 5 s"
    assert done["next"].text == "passed"
    assert kept.read_text() == "half of the figures"
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["long"]["outcome"] == "stopped after 5 s"
    stat = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split(") ")[1][0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split(") ")[1][0] == "Z", "the stage's child still runs"


def test_what_ran_before_an_interruption_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(stage: Stage) -> Outcome:
        if stage.name == "second":
            raise KeyboardInterrupt
        return run(stage)

    monkeypatch.setattr(gpu, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all("a device", [python("first", "pass"), python("second", "pass")], tmp_path / "gpu.json")
    assert list(json.loads((tmp_path / "gpu.json").read_text())["stages"]) == ["first"]


def test_a_stage_gets_its_environment() -> None:
    code = "import os; assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'; assert os.environ['PATH']"
    sanitizer = next(stage for stage in EVERY if stage.name == "sanitizer")
    assert run(Stage("environment", [PYTHON, "-c", code], 30, (), sanitizer.environment)).text == "passed"


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)], ids=["all stages passed", "a stage failed"])
def test_exit_code(failing: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(gpu, "OUTCOMES", tmp_path)
    monkeypatch.setattr(gpu, "stages", lambda command: [python("tests", f"raise SystemExit({int(failing)})")])
    assert gpu.main([]) == code
    assert "tests" in capfd.readouterr().out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "make gpu: torch sees no CUDA device; needs an NVIDIA GPU\n"


def test_it_needs_no_more_than_torch() -> None:
    """On a bare machine it must start: it imports nothing but the standard library until it asks torch for a GPU."""
    code = "import sys, bench.gpu; print([n for n in ('rich', 'pytest', 'triton', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
