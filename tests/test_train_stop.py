"""Signals, other machines, other lengths: how a run stops, and in what it may go on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_setup import make_images, silent, tiny, tiny_words

from vitkernels.cli import main
from vitkernels.train import checkpoint, metrics, run, train
from vitkernels.train.distributed import World
from vitkernels.train.loop import Trainer
from vitkernels.train.stopping import Stopped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def _losses(out: Path) -> list[float]:
    return [row["fused"]["loss"] for row in metrics.read(out / "metrics.jsonl", key="lr")]


def _signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """A signal to this process in the middle of a step."""
    log = Trainer._log

    def send(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == step and "test" not in row:
            os.kill(os.getpid(), number)
        log(trainer, row)

    monkeypatch.setattr(Trainer, "_log", send)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_first_epochs_work(
    number: int,
    code: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    before = signal.getsignal(number)
    train(tiny(folder, whole), silent())
    with monkeypatch.context() as patch:
        _signal_at(patch, 1, number)
        assert main(tiny_words(folder, out)) == code
    shown = capfd.readouterr().err
    assert "vitkernels: stopping after this step" in shown
    assert f"vitkernels: stopped at step 2; the last checkpoint is kept: continue with --resume --out {out}" in shown
    assert checkpoint.load(out / "checkpoint.pt")["step"] == 2, "of four in the first epoch"
    assert signal.getsignal(number) == before
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert _losses(out) == _losses(whole)


def test_a_signal_in_the_last_step_lets_the_run_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _signal_at(monkeypatch, 8, signal.SIGTERM)
    assert main(tiny_words(folder, tmp_path / "run")) == 0
    assert (tmp_path / "run/result.json").exists()


def test_python_gets_an_exception_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _signal_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped at step 3") as raised:
        train(tiny(folder, tmp_path / "run"), silent())
    assert raised.value.signal == signal.SIGTERM


def test_a_signal_to_the_workers_too(folder: Path, tmp_path: Path) -> None:
    """A terminal and a scheduler send signals to the whole process group."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / str(number)
        words = tiny_words(folder, out, "--epochs", "500", "--workers", "2", "--checkpoint-every", "1")
        process = subprocess.Popen(
            [sys.executable, "-m", "vitkernels", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 60
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the run takes too long"
            time.sleep(0.01)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert f"continue with --resume --out {out}" in errors


def _torchrun(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitkernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_peer_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = tiny_words(folder, out, "--epochs", "500", "--device", "cpu", "--checkpoint-every", "1")
    process = _torchrun(words)
    deadline = time.monotonic() + 100
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    last = max(map(int, children.split()))
    os.kill(last, signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    ours = [line for line in errors.splitlines() if line.startswith("vitkernels: train: process 0 of 2 lost another")]
    assert len(ours) == 1, errors
    assert f"continue with --resume --out {out}" in ours[0]
    assert 'vitkernels/train/loop.py", line' not in errors, "no traceback of this package's"


def test_a_signal_while_the_group_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends a survivor with SIGTERM: what the survivor has to say comes first."""

    @contextlib.contextmanager
    def world(device: str | None) -> Iterator[World]:
        try:
            yield World(0, 1, torch.device("cpu"))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def lose(trainer: Trainer) -> None:
        raise ConnectionError("train: process 0 of 2 lost another one")

    monkeypatch.setattr(run, "world", world)
    monkeypatch.setattr(Trainer, "run", lose)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert main(tiny_words(folder, tmp_path / "run")) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard
    assert "vitkernels: train: process 0 of 2 lost another one" in capfd.readouterr().err


def test_a_run_of_one_goes_on_as_two(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(tiny(folder, whole), silent())
    with monkeypatch.context() as patch:
        _signal_at(patch, 4, signal.SIGINT)
        assert main(tiny_words(folder, out, "--device", "cpu")) == 130
    shown, errors = (process := _torchrun(["train", "--resume", "--out", str(out)])).communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "the run had 1 processes and has 2 now: the same batches" in shown
    assert _losses(out) == pytest.approx(_losses(whole), abs=1e-5)


def test_a_run_goes_on_from_another_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        _signal_at(patch, 5, signal.SIGINT)
        assert main(tiny_words("images", "run")) == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "--out", "../run"]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["data"] == str(folder)


@pytest.mark.parametrize("schedule", [None, "cosine"], ids=["torch's", "timm's"])
def test_a_run_goes_on_for_longer(schedule: str | None, folder: Path, tmp_path: Path) -> None:
    out, console = tmp_path / "run", silent()
    settings: dict[str, Any] = {"warmup_epochs": 1.0, "lr": 0.01, "sched": schedule}
    train(tiny(folder, out, epochs=2, **settings), silent())
    train(tiny(folder, out, epochs=5, resume=True, **settings), console)
    rows = list(metrics.read(out / "metrics.jsonl", key="lr"))
    assert [row["step"] for row in rows] == list(range(1, 21))
    longer = tmp_path / "longer"
    train(tiny(folder, longer, epochs=5, **settings), silent())
    rates = [row["lr"] for row in metrics.read(longer / "metrics.jsonl", key="lr")]
    assert [row["lr"] for row in rows[8:]] == pytest.approx(rates[8:]), "of a run that was that long from its start"
    assert rows[8]["lr"] > rows[7]["lr"]
    assert "the run had 2 epochs and has 5 now: from step 8 on the learning rate is that of a run of 5" in (
        console.file.getvalue()
    )
    assert all(math.isfinite(row["fused"]["loss"]) for row in rows)


def test_a_run_cannot_be_shorter_than_it_is(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(folder, out, epochs=3), silent())
    with pytest.raises(ValueError, match=r"argument 'epochs' got 1; needs more than the 12 steps of the checkpoint"):
        train(tiny(folder, out, epochs=1, resume=True), silent())
