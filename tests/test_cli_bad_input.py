"""What a user can get wrong in a run ends in one sentence, in Python's words and in those that were typed."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from train_setup import make_images, silent, tiny, tiny_words

from vitkernels import dispatch
from vitkernels.cli import main
from vitkernels.train import TrainConfig, checkpoint, train

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
        "whose class folder 'yellow' holds no image; needs files that Pillow reads",
    ),
    "no such test folder": ({"val_data": "nowhere"}, _nothing, FileNotFoundError, "argument 'val_data' got 'nowhere'"),
    "other classes": (
        {"val_data": "{}/held_out"},
        _another_class,
        ValueError,
        "same class folders (red, yellow in one",
    ),
    "a batch larger than the data": (
        {"batch_size": 64},
        _nothing,
        ValueError,
        "argument 'batch_size' got 64; needs 18 or less",
    ),
    "unknown model": (
        {"model": "vit_smal_patch16"},
        _nothing,
        ValueError,
        "argument 'model' got 'vit_smal_patch16'; needs a preset or a name that timm knows, such as vit_small_patch16",
    ),
    "unknown model argument": (
        {"model_args": {"dept": 3}},
        _nothing,
        ValueError,
        "argument 'model' got 'vit_tiny_patch16', which cannot be built for images of 16 x 16 with {{'dept': 3}}: ",
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
        "argument 'strict' is set, and an image cannot be read: {}/images/red/0.png (cannot identify image file",
    ),
    "a full disk": ({}, _full_disk, OSError, "cannot write {}/run/config.json: No space left on device"),
    "no rich": (
        {},
        _without("rich"),
        ModuleNotFoundError,
        "rich not installed; needs: pip install rich",
    ),
    "no pillow": (
        {},
        _without("PIL"),
        ModuleNotFoundError,
        "pillow not installed; needs: pip install pillow",
    ),
    "no timm": (
        {"model": "vit_smal"},
        _without("timm"),
        ModuleNotFoundError,
        "argument 'model' got 'vit_smal' (no preset; vit_small is one), which needs timm: pip install timm",
    ),
    "accumulate past the batch": (
        {"accumulate": 5},
        _nothing,
        ValueError,
        "argument 'accumulate' got 5; needs at most 'batch_size', 4",
    ),
    "naive with weights to start from": (
        {"compare": "naive", "init_from": "x"},
        _nothing,
        ValueError,
        "argument 'compare' is set with 'init_from' or 'freeze'",
    ),
    "no such weights": (
        {"init_from": "nowhere.pt"},
        _nothing,
        FileNotFoundError,
        "argument 'init_from' got 'nowhere.pt', which is no file",
    ),
    "unknown optimizer": ({"opt": "adamm"}, _nothing, ValueError, "optimizers that timm knows, such as adam"),
    "unknown schedule": ({"sched": "cosin"}, _nothing, ValueError, "argument 'sched' got 'cosin'; needs one of cosine"),
    "unknown augmentation": (
        {"aug": "rnd-m9"},
        _nothing,
        ValueError,
        "argument 'aug' got 'rnd-m9', which timm does not",
    ),
    "an odd batch to mix": (
        {"mixup": 0.8, "batch_size": 3},
        _nothing,
        ValueError,
        "argument 'batch_size' got 3, 3 a process; needs an even number there with 'mixup' or 'cutmix'",
    ),
    "unknown model, before the data": (
        {"model": "timm:vit_tinny_patch16_224", "data": "nowhere"},
        _nothing,
        ValueError,
        "argument 'model' got 'timm:vit_tinny_patch16_224'; needs a name that timm knows, such as vit_tiny_patch16_224",
    ),
    "no wandb": ({"log": "wandb"}, _without("wandb"), ModuleNotFoundError, "argument 'log' needs wandb: pip install"),
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


def _typed(sentence: str) -> str:
    """Settings by their flags."""
    for field in dataclasses.fields(TrainConfig):
        for before in ("argument ", "than ", "most ", "needs ", "or ", "with "):
            flag = f"--{field.name.replace('_', '-')}"
            sentence = sentence.replace(f"{before}'{field.name}'", f"{before}{flag}")
    return sentence


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
    assert _typed(sentence.format(here)) in shown
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
