"""A run that is stopped anywhere and resumed is, to the last bit, the run that was left alone."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_setup import TINY, make_images, silent, tiny, tiny_words

from vitkernels.cli import main
from vitkernels.train import TrainConfig, checkpoint, load_model, metrics, train
from vitkernels.train.loop import Trainer

# DropPath draws random numbers in every step, 6 steps an epoch
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 3, "drop_path": 0.3, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def _run(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return train(tiny(folder, out, **{**SETTINGS, **changes}), silent())


def _history(out: Path) -> list[dict[str, Any]]:
    """Every row without what differs from run to run: the time, and which process recorded the ops."""
    rows = list(metrics.read(out / "metrics.jsonl"))
    for row in rows:
        row.pop("ops", None)
        row.pop("decoding", None)
        for figures in row.values():
            if isinstance(figures, dict):
                figures.pop("seconds", None)
    return rows


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out)[0].state_dict()


def _assert_same(ours: Path, theirs: Path) -> None:
    assert _history(ours) == _history(theirs)
    weights = _weights(theirs)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in _weights(ours).items())


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was left alone."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    _run(folder, out)
    return out


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int, kind: str = "step") -> None:
    """Interrupt a step after its update of the weights, or the test after it, before its row is written."""
    log = Trainer._log

    def stop(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == step and ("test" in row) == (kind == "test"):
            raise KeyboardInterrupt
        log(trainer, row)

    monkeypatch.setattr(Trainer, "_log", stop)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [[("step", 8)], [("step", 7), ("test", 12)], [("step", 18)]], ids=str)
def test_interrupted_and_resumed(
    stops: list[tuple[str, int]],
    workers: int,
    folder: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    for number, (kind, step) in enumerate(stops):
        with monkeypatch.context() as patch:
            _stop_at(patch, step, kind)
            sentence = f"interrupted at step {step}; the last checkpoint is kept: continue with --resume --out {out}"
            with pytest.raises(KeyboardInterrupt, match=sentence):
                _run(folder, out, checkpoint_every=2, workers=workers, resume=number > 0)
        torch.rand(number + 1)  # another process would have another random state
    _run(folder, out, checkpoint_every=2, workers=workers, resume=True)
    _assert_same(out, whole)


def test_interrupted_before_the_first_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 2; no checkpoint was written yet"):
        _run(folder, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        _run(folder, tmp_path / "run", resume=True)


def test_two_models_resume_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"compare": "naive", "drop_path": 0.0, "checkpoint_every": 3}
    _run(folder, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        _stop_at(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            _run(folder, tmp_path / "run", **changes)
    _run(folder, tmp_path / "run", **changes, resume=True)
    _assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_disk_that_fills_up_while_saving(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saves = tmp_path / "run", []
    save = checkpoint.save

    def fail_at_the_second(path: Path, state: dict[str, Any]) -> None:
        saves.append(state["step"])
        if len(saves) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda descriptor: _no_space())
                save(path, state)
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail_at_the_second)
        with pytest.raises(OSError, match=r"checkpoint\.pt: No space left on device; the earlier one is kept"):
            _run(folder, out)
    assert saves == [6, 12]
    assert checkpoint.load(out / "checkpoint.pt")["step"] == 6
    assert not list(out.glob("*.part"))
    _run(folder, out, resume=True)
    _assert_same(out, whole)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_finished_run_resumes_into_its_report(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = _run(folder, out)
    (out / "result.json").unlink()
    assert _run(folder, out, resume=True) == first
    assert (out / "result.json").exists()
    _assert_same(out, whole)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "'resume': seed is 1, and 0 in the checkpoint"),
        ({"lr": 0.5}, "'resume': lr is 0.5, and 0.003 in the checkpoint"),
        ({"model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}}, "'resume': model_args is"),
        ({"val_split": 0.5}, "'resume': val_split is 0.5"),
    ],
)
def test_other_settings_do_not_resume(change: dict[str, Any], sentence: str, folder: Path, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match=sentence):
        _run(folder, whole, resume=True, **change)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_stock_model_does_not_go_on_as_a_fused_one(folder: Path, tmp_path: Path) -> None:
    """As runs of timm's models were once."""
    out = tmp_path / "run"
    _run(folder, out, epochs=1, warmup_epochs=0.0)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save({**state, "lanes": {"timm": state["lanes"]["fused"]}}, out / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"'resume': the checkpoint in .* is of timm, and the run trains fused; needs"):
        _run(folder, out, epochs=1, warmup_epochs=0.0, resume=True)


def test_other_data_do_not_resume(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'resume': training images is 12, and 18 in the checkpoint"):
        _run(make_images(tmp_path / "images", each=5), whole, resume=True)


def test_a_run_is_not_written_over(folder: Path, whole: Path) -> None:
    with pytest.raises(
        ValueError, match=r"argument 'out' got .*, which holds a run; needs 'resume', or another folder"
    ):
        _run(folder, whole)


# ------------------------------------------------------------------------------------------- the options of a run


def _stopped_run(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by the command line, interrupted after its first epoch of three."""
    with monkeypatch.context() as patch:
        _stop_at(patch, 8)
        words = ["--epochs", "3", "--batch-size", "3", "--drop-path", "0.3", "--label-smoothing", "0.1"]
        assert main(tiny_words(folder, out, *words)) == 130


def test_a_run_goes_on_with_its_options(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    _stopped_run(folder, out, monkeypatch)
    assert f"continue with --resume --out {out}" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 0
    _assert_same(out, whole)


def test_options_may_be_given_again(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ones, and ones that leave the numbers alone."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    _stopped_run(folder, out, monkeypatch)
    shutil.copytree(folder, tmp_path / "images")
    out.rename(moved)
    before = (moved / "config.json").read_bytes()
    assert main(["train", "--resume", "--out", str(moved), "--lr", "0.5"]) == 2
    assert "argument --resume: lr is 0.5, and 0.003 in the checkpoint" in capsys.readouterr().err
    assert (moved / "config.json").read_bytes() == before
    again = ["--lr", "3e-3", "--data", str(tmp_path / "images"), "--checkpoint-every", "5"]
    assert main(["train", "--resume", "--out", str(moved), *again]) == 0
    _assert_same(moved, whole)
    kept = json.loads((moved / "config.json").read_text())["training"]
    assert (kept["data"], kept["checkpoint_every"], kept["lr"]) == (str(tmp_path / "images"), 5, 3e-3)


@pytest.mark.parametrize("command", ["demo", "train"])
def test_the_demo_goes_on_with_its_options(command: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["demo", "--quick", "--seed", "3", "--out", str(out)]) == 0
    first = (out / "result.json").read_bytes()
    (out / "result.json").unlink()
    assert main([command, "--resume", "--out", str(out)]) == 0
    assert (out / "result.json").read_bytes() == first


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "there is no run in {0}: no {0}/config.json"), ("{", "{0}/config.json does not hold a run's settings")],
)
def test_a_folder_without_a_run(
    text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert sentence.format(tmp_path) in shown
    assert shown.count("\n") == 1


# What the first version wrote: a folder that it left must go on, and a command line that it took must be taken.
FIRST_DEFAULTS: dict[str, Any] = {
    "val_data": None,
    "val_split": 0.1,
    "model": "vit_small_patch16",
    "model_args": None,
    "image_size": 224,
    "epochs": 100,
    "batch_size": 128,
    "lr": 5e-4,
    "weight_decay": 0.05,
    "warmup_epochs": None,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "position_std": None,
    "amp": None,
    "backend": None,
    "compare": None,
    "device": None,
    "seed": 0,
    "workers": 2,
    "strict": False,
    "out": None,
    "resume": False,
    "checkpoint_every": 0,
}
FIRST_MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16",
    "image_size": 16,
    "num_classes": 3,
    "channels": 3,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "drop_path": 0.3,
    "arguments": TINY["model_args"],
}
FREE = ("val_data", "backend", "device", "workers", "strict", "out", "resume", "checkpoint_every")


def test_a_folder_that_the_first_version_left(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    _stopped_run(folder, out, monkeypatch)
    training = {**FIRST_DEFAULTS, **TINY, **SETTINGS, "data": str(folder), "out": str(out)}
    config = {"model": FIRST_MODEL, "classes": ["blue", "green", "red"], "training": training}
    (out / "config.json").write_text(json.dumps(config))
    state = checkpoint.load(out / "checkpoint.pt")
    assert list(state) == ["format", "step", "settings", "lanes", "random"]
    assert list(state["lanes"]["fused"]) == ["model", "optimizer", "schedule"]
    state["settings"] = {
        **{name: value for name, value in training.items() if name not in ("data", *FREE)},
        "processes": 1,
        "classes": ["blue", "green", "red"],
        "training images": 18,
    }
    torch.save({**state, "format": 1}, out / "checkpoint.pt")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    _assert_same(out, whole)


def test_flags_and_defaults_of_the_first_version() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert {name: fields[name] for name in FIRST_DEFAULTS} == FIRST_DEFAULTS
    shown = subprocess.run(
        [sys.executable, "-m", "vitkernels", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"--{name.replace('_', '-')}" in shown for name in ("data", *FIRST_DEFAULTS))


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-c",
        "import sys, torch; torch.set_num_threads(1); from vitkernels.cli import main; sys.exit(main())",
    ]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_and_resumed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at a moment of the kernel's choosing, twice; then to the end."""
    settings = ("--epochs", "8", "--batch-size", "3", "--drop-path", "0.3", "--checkpoint-every", "1")
    whole, out = tmp_path / "whole", tmp_path / "run"
    rows = out / "metrics.jsonl"
    for number, enough in enumerate((5, 20)):
        resume = ("--resume",) if number else ()
        process = _start(tiny_words(folder, out, *settings, *resume))
        deadline = time.monotonic() + 60
        while not rows.exists() or rows.read_bytes().count(b"\n") < enough:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run takes too long"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert checkpoint.load(out / "checkpoint.pt")["step"] < 48, "it was killed before its end"
    process = _start(tiny_words(folder, out, *settings, "--resume"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    _run(folder, whole, epochs=8, label_smoothing=0.0)
    assert len(_history(out)) == 48 + 8
    _assert_same(out, whole)
