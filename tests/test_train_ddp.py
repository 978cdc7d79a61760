"""Two processes under torchrun train as one does: the same batches in two halves, the gradients averaged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_setup import make_images, silent, tiny, tiny_words

from vitkernels.train import load_model, metrics, train


def _torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitkernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, env=environment, check=False)


def _losses(out: Path) -> list[tuple[float, int]]:
    rows = metrics.read(out / "metrics.jsonl")
    return [(row["fused"]["loss"], row["fused"]["images"]) for row in rows if "test" not in row]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    folder, alone, together = make_images(tmp_path / "images"), tmp_path / "alone", tmp_path / "together"
    result = train(tiny(folder, alone), silent())
    ran = _torchrun(tiny_words(folder, together, "--epochs", "2", "--device", "cpu"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("epoch 2 of 2") == 1, "the first process alone writes to the screen"

    ours, theirs = _losses(together), _losses(alone)
    assert [images for _, images in ours] == [images for _, images in theirs] == [4] * 8
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], abs=1e-5)
    weights = load_model(alone)[0].state_dict()
    for name, tensor in load_model(together)[0].state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=1e-3)
    tests = [row["test"]["fused"] for row in metrics.read(together / "metrics.jsonl") if "test" in row]
    assert [figures["images"] for figures in tests] == [6, 6], "each test image is counted once"
    assert tests[-1]["accuracy"] == result["test_accuracy"]["fused"]


def test_two_processes_resume_and_name_what_either_cannot_read(tmp_path: Path) -> None:
    folder, out = make_images(tmp_path / "images"), tmp_path / "run"
    bad = [folder / "green" / "0.png", folder / "red" / "4.jpg", folder / "blue" / "2.webp"]
    for path in bad:
        path.write_bytes(b"damaged")
    words = ["--device", "cpu", "--val-split", "0", "--checkpoint-every", "2", "--batch-size", "6"]
    whole = _torchrun(tiny_words(folder, out, *words))
    assert whole.returncode == 0, whole.stderr
    for path in bad:
        assert f"skipped an image that cannot be read: {path}" in whole.stdout
    assert sum(images for _, images in _losses(out)) == 2 * (24 - 3)
    again = _torchrun(tiny_words(folder, out, *words, "--resume"))
    assert again.returncode == 0, again.stderr
    assert "images skipped" in again.stdout


def test_a_fault_is_told_once(tmp_path: Path) -> None:
    ran = _torchrun(["train", "--data", str(tmp_path / "nowhere"), "--device", "cpu"])
    told = [line for line in ran.stderr.splitlines() if line.startswith("vitkernels:")]
    assert told == [f"vitkernels: train: argument --data got '{tmp_path}/nowhere', which is no folder"]
    assert set(re.findall(r"exitcode *: (\d+)", ran.stderr)) == {"2"}


def test_a_fault_of_one_process_is_told_by_it(tmp_path: Path) -> None:
    """Whoever reads the image, first or second: the other one has lost it, and is not who knows why."""
    folder = make_images(tmp_path / "images")
    (folder / "red/0.png").write_bytes(b"damaged")
    words = ("--strict", "--val-split", "0", "--device", "cpu")
    ran = _torchrun(tiny_words(folder, tmp_path / "run", *words))
    assert (
        f"vitkernels: train: argument --strict is set, and an image cannot be read: {folder}/red/0.png" in ran.stderr
    ), ran.stderr
