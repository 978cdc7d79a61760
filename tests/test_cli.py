"""The command line: words and settings, what each command does, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_setup import TINY, make_images, tiny_words

from vitkernels import dispatch
from vitkernels.cli import main
from vitkernels.train import TrainConfig, checkpoint, demo_config
from vitkernels.train.loop import Trainer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `images` in it, where the test's process stands."""
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--data", "x", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "--data", "x", "--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["demo", "--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_words_that_are_none(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("words", [["train"], ["train", "--epochs", "3"], ["train", "--resume"]])
def test_data_or_a_run_is_needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    sentence = "train: needs --data, a folder of images; or --resume --out, the folder of a run to continue"
    assert capsys.readouterr().err == f"vitkernels: {sentence}\n"


@pytest.mark.parametrize("pair", ["depth", "=3", "a b=3"])
def test_model_arguments_are_pairs(pair: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_words("images", "run", "--model-args", pair)) == 2
    assert f"argument --model-args got {pair!r}; needs KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "needs"),
    [
        ("epochs", "3", "int"),
        ("epochs", True, "int"),
        ("lr", "1", "float"),
        ("data", None, "str"),
        ("strict", 1, "bool"),
    ],
)
def test_types_are_checked(name: str, value: object, needs: str) -> None:
    with pytest.raises(TypeError, match=f"argument '{name}' got .* of type {type(value).__name__}; needs {needs}"):
        TrainConfig(**{"data": "images", name: value})


def test_a_run_to_resume_is_named() -> None:
    with pytest.raises(ValueError, match="argument 'resume' is set without 'out'; needs the folder of the run"):
        TrainConfig(data="images", resume=True)


def test_debug_shows_where_an_error_came_from(here: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["train", "--data", "nowhere", "--debug"])


def test_train_takes_every_setting(here: Path) -> None:
    """A word for every field of the settings, and what it sets arrives."""
    words = tiny_words(here / "images", here / "run", "--val-split", "0.5", "--amp", "bf16", "--seed", "3")
    assert main(words) == 0
    saved = json.loads((here / "run/config.json").read_text())
    assert set(saved["training"]) == {field.name for field in dataclasses.fields(TrainConfig)}
    expected = {**TINY, "val_split": 0.5, "amp": "bf16", "seed": 3, "strict": False}
    assert {name: saved["training"][name] for name in expected} == expected


def test_the_test_images_have_a_short_flag(here: Path) -> None:
    make_images(here / "held_out", each=1)
    assert main(tiny_words(here / "images", here / "run", "--val", str(here / "held_out"), "--epochs", "1")) == 0
    assert json.loads((here / "run/result.json").read_text())["test_images"] == 3


def test_demo_quick(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--out", "run", "--backend", "ext,reference"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert set(result["test_accuracy"]) == {"naive", "fused"}
    assert result["largest_loss_difference"] < 1e-4
    assert {row["op"] for row in result["ops"]} >= {"patch_embed", "attention_qkv", "add_layer_norm", "mlp"}
    shown = capsys.readouterr().out
    for words in ("test accuracy", "images per second, ratio", "largest difference of the losses", "add_layer_norm"):
        assert words in shown


def test_the_demo_differs_from_quick_in_size_alone() -> None:
    full, quick = demo_config(), demo_config(quick=True)
    differing = {
        field.name for field in dataclasses.fields(full) if getattr(full, field.name) != getattr(quick, field.name)
    }
    assert differing == {"model_args", "epochs", "batch_size", "warmup_epochs"}


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for words in (
        torch.__version__,
        "vitkernels",
        "python",
        "numpy",
        *dispatch.BACKENDS,
        *dispatch.backends().values(),
    ):
        assert words in shown, words


def test_ctrl_c_leaves_the_last_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Trainer._log

    def stop(trainer: Trainer, row: dict) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt
        log(trainer, row)

    monkeypatch.setattr(Trainer, "_log", stop)
    assert main(tiny_words(here / "images", here / "run")) == 130
    sentence = (
        f"vitkernels: interrupted at step 6; the last checkpoint is kept: continue with --resume --out {here}/run"
    )
    assert sentence in capsys.readouterr().err
    assert checkpoint.load(here / "run/checkpoint.pt")["step"] == 4


def test_a_real_ctrl_c(here: Path) -> None:
    """`python -m vitkernels` as a process of its own, with workers, interrupted by the signal that a terminal sends."""
    words = tiny_words("images", "run", "--epochs", "500", "--workers", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkernels", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    deadline = time.monotonic() + 60
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"continue with --resume --out run" in errors
    assert checkpoint.load(Path("run/checkpoint.pt"))["step"] > 0
