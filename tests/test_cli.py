"""The command line: three commands, and one sentence for everything that a user can get wrong."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_setup import TINY, make_images, silent, tiny, tiny_words

from vitkernels import dispatch
from vitkernels.cli import main
from vitkernels.train import TrainConfig, checkpoint, demo_config, train
from vitkernels.train.loop import Trainer

Change = Callable[[Path, pytest.MonkeyPatch], None]


def _nothing(folder: Path, patch: pytest.MonkeyPatch) -> None:
    pass


def _damage_an_image(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "images/red/0.png").write_bytes(b"damaged")


def _damage_the_checkpoint(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "run").mkdir()
    (folder / "run/checkpoint.pt").write_bytes(b"damaged")


def _a_run_is_there(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "run").mkdir()
    checkpoint.save(folder / "run/checkpoint.pt", {"step": 1, "settings": {}})


def _an_empty_class(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "images/yellow").mkdir()


def _another_class(folder: Path, patch: pytest.MonkeyPatch) -> None:
    make_images(folder / "held_out", each=1)
    (folder / "held_out/red").rename(folder / "held_out/yellow")


def _a_file(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "run").write_text("a file")


def _full_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fail)


def _without(package: str) -> Change:
    def hide(folder: Path, patch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))

    return hide


def _no_timm(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "timm", None)


NUMBERS = {
    "epochs": (0, "needs 1 or more"),
    "batch_size": (0, "needs 1 or more"),
    "image_size": (-16, "needs 1 or more"),
    "lr": (-0.1, "needs more than 0"),
    "weight_decay": (-1.0, "needs 0 or more"),
    "warmup_epochs": (-1.0, "needs 0 or more"),
    "label_smoothing": (1.0, "needs 0 or more and less than 1"),
    "drop_path": (-0.1, "needs 0 or more and less than 1"),
    "val_split": (1.5, "needs 0 or more and less than 1"),
    "seed": (-1, "needs 0 or more"),
    "workers": (-1, "needs 0 or more"),
    "checkpoint_every": (-5, "needs 0 or more"),
}

# what is wrong -> settings that differ, what is done to the files before, the error that the Python API raises, and a
# part of the sentence
BAD: dict[str, tuple[dict[str, object], Change, type[BaseException], str]] = {
    **{
        f"{name} {value}": ({name: value}, _nothing, ValueError, f"argument '{name}' got {value}; {needs}")
        for name, (value, needs) in NUMBERS.items()
    },
    "lr nan": ({"lr": float("nan")}, _nothing, ValueError, "argument 'lr' got nan; needs more than 0"),
    "lr inf": ({"lr": float("inf")}, _nothing, ValueError, "argument 'lr' got inf; needs more than 0"),
    "warm-up too long": ({"warmup_epochs": 2.0}, _nothing, ValueError, "got 2.0; needs less than 'epochs', 2"),
    "no such folder": ({"data": "nowhere"}, _nothing, FileNotFoundError, "argument 'data' got 'nowhere', which is no"),
    "no class folders": (
        {"data": "{}/images/red"},
        _nothing,
        ValueError,
        "which holds 0 class folders; needs two or more",
    ),
    "an empty class": (
        {},
        _an_empty_class,
        ValueError,
        "whose class folder 'yellow' holds no image; needs .bmp, .jpeg",
    ),
    "no such test folder": ({"val_data": "nowhere"}, _nothing, FileNotFoundError, "argument 'val_data' got 'nowhere'"),
    "other classes": (
        {"val_data": "{}/held_out"},
        _another_class,
        ValueError,
        "same class folders (red, yellow in one",
    ),
    "a batch larger than the data": ({"batch_size": 64}, _nothing, ValueError, "'batch_size' got 64; needs 18 or less"),
    "unknown model": (
        {"model": "vit_smal_patch16"},
        _nothing,
        ValueError,
        "is 'vit_smal_patch16'; needs a preset such as",
    ),
    "unknown model argument": (
        {"model_args": {"dept": 3}},
        _nothing,
        ValueError,
        "cannot build model 'vit_tiny_patch16'",
    ),
    "unknown backend": ({"backend": "cuda"}, _nothing, ValueError, "argument 'backend' got 'cuda'; needs names of"),
    "a backend that is not there": (
        {"backend": "triton"},
        _nothing,
        dispatch.BackendError,
        "none that is there. triton:",
    ),
    "no multiple of the patch": (
        {"image_size": 20},
        _nothing,
        ValueError,
        "argument 'img_size' is 20; needs a multiple of",
    ),
    "naive with drop path": (
        {"compare": "naive", "drop_path": 0.1},
        _nothing,
        ValueError,
        "argument 'drop_path' got 0.1; needs 0 with compare='naive'",
    ),
    "naive with registers": (
        {"compare": "naive", "model_args": {"patch_size": 8, "depth": 1, "reg_tokens": 1}},
        _nothing,
        ValueError,
        "differs in ['reg_token']; needs what the naive model has",
    ),
    "resume without a checkpoint": ({"resume": True}, _nothing, FileNotFoundError, "there is no checkpoint at {}/run"),
    "resume from a damaged one": (
        {"resume": True},
        _damage_the_checkpoint,
        ValueError,
        "the checkpoint {}/run/checkpoint.pt is not a whole checkpoint (File is not a zip file); it was left as it is",
    ),
    "a run in the way": (
        {},
        _a_run_is_there,
        ValueError,
        "argument 'out' got '{}/run', which holds a run; needs 'resume'",
    ),
    "a file in the way": ({}, _a_file, OSError, "argument 'out': cannot make the folder {}/run: File exists"),
    "a corrupt image": (
        {"strict": True, "val_split": 0.0, "batch_size": 24},
        _damage_an_image,
        ValueError,
        "'strict' is set, and an image cannot be read: {}/images/red/0.png (cannot identify image file",
    ),
    "a full disk": ({}, _full_disk, OSError, "cannot write {}/run/config.json: No space left on device"),
    "no rich": (
        {},
        _without("rich"),
        ModuleNotFoundError,
        'rich not installed; needs: pip install "vitkernels[train]"',
    ),
    "no pillow": (
        {},
        _without("PIL"),
        ModuleNotFoundError,
        'pillow not installed; needs: pip install "vitkernels[train]"',
    ),
    "no timm": ({"model": "resnet18"}, _no_timm, ValueError, "timm's are not to be had"),
    "a loss that is no number": ({"lr": 1e38}, _nothing, FloatingPointError, "needs a lower 'lr' or a longer warm-up"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `images` in it, where the test's process stands."""
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _settings(what: str, here: Path) -> dict[str, object]:
    changes = BAD[what][0]
    return {name: value.format(here) if isinstance(value, str) else value for name, value in changes.items()}


def _words(settings: dict[str, object]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            words += [flag, *(f"{key}={each}" for key, each in value.items())]
        else:
            words.append(flag if value is True else f"{flag}={value}")
    return words


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_sentence(
    what: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, change, _, sentence = BAD[what]
    change(here, monkeypatch)
    before = _files(here)
    words = tiny_words(here / "images", here / "run", *_words(_settings(what, here)))
    with dispatch.record() as calls:
        assert main(words) == 2
    shown = capsys.readouterr().err
    assert sentence.format(here) in shown
    assert shown.startswith("vitkernels: ")
    assert shown.count("\n") == 1
    assert not calls or what == "a loss that is no number", "a kernel ran before the check"
    after = _files(here)
    assert {path: after.get(path) for path in before} == before, "what was there is untouched"


@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_in_python(what: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, change, error, sentence = BAD[what]
    change(here, monkeypatch)
    with pytest.raises(error) as raised:
        train(tiny(**{"data": here / "images", "out": here / "run", **_settings(what, here)}), silent())
    assert sentence.format(here) in str(raised.value)


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
    assert f"argument 'model_args' got {pair!r}; needs KEY=VALUE" in capsys.readouterr().err


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
