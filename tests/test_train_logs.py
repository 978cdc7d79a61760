"""Where a run's curves go beside metrics.jsonl, and what its screen shows."""

from __future__ import annotations

import io
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from train_setup import make_images, silent, tiny

from vitkernels.train import metrics, train

COLOUR = re.compile(r"\x1b\[[\d;]*3\d")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


class Wandb(ModuleType):
    """What the trainer uses of the library `wandb`, and what it was told."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.refusal, self.rows, self.finished = refusal, {}, False

    def init(self, **options: Any) -> Wandb:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.options = options
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(numbers)

    def finish(self) -> None:
        self.finished = True


def test_curves_for_wandb(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tiny(folder, tmp_path / "run", log="wandb"), silent())
    assert wandb.options["dir"] == str(tmp_path / "run")
    assert wandb.options["config"]["lr"] == 3e-3
    assert list(wandb.rows) == list(range(1, 9))
    (row, *_) = metrics.read(tmp_path / "run/metrics.jsonl")
    assert wandb.rows[1]["fused/loss"] == row["fused"]["loss"]
    assert 0 <= wandb.rows[8]["test/fused/accuracy"] <= 1
    assert wandb.finished


def test_without_a_login_at_wandb_one_sentence_says_how(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb("No API key configured. Use `wandb login` to log in."))
    with pytest.raises(ValueError, match=r"'log' got 'wandb', which says: No API key .* needs a login, or WAND"):
        train(tiny(folder, tmp_path / "run", log="wandb"), silent())


def test_wandb_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tiny(folder, tmp_path / "run", log="wandb"), silent())
    (stored,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert b"test/fused/accuracy" in stored.read_bytes()


@pytest.mark.parametrize("variable", [None, "NO_COLOR"])
def test_no_colour_where_none_is_wanted(
    variable: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    train(tiny(folder, tmp_path / "run"), console)
    shown = console.file.getvalue()
    assert "test accuracy" in shown
    assert bool(COLOUR.search(shown)) == (variable is None)


def test_an_image_that_cannot_be_read_is_told_once(folder: Path, tmp_path: Path) -> None:
    (folder / "red/0.png").write_bytes(b"damaged")
    console = silent()
    result = train(tiny(folder, tmp_path / "run", batch_size=6, val_split=0.0, epochs=3), console)
    assert console.file.getvalue().count(f"skipped an image that cannot be read: {folder}/red/0.png") == 1
    assert [len(row["skipped"]) for row in metrics.read(tmp_path / "run/metrics.jsonl") if "skipped" in row] == [1] * 3
    assert result["skipped"]
