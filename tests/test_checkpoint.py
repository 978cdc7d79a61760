"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vitkernels.train import checkpoint, metrics

STATE = {
    "step": 3,
    "lanes": {"fused": {"weight": torch.arange(5000.0)}},
    "random": [checkpoint.random_state(torch.device("cpu"))],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullDisk:
    """A disk that takes 1,000 bytes more."""

    def __init__(self, file: object) -> None:
        self.file, self.left = file, 1000

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        return _no_space() if self.left < 0 else self.file.write(data)  # type: ignore[attr-defined, return-value]

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # type: ignore[attr-defined]


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r": _FullDisk(opened(path, mode)) if "w" in mode else opened(path, mode)
    )


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing": _fill_the_disk,
    "while syncing": lambda patch: patch.setattr(os, "fsync", _no_space),
    "while moving": lambda patch: patch.setattr(os, "replace", _no_space),
}


def test_what_is_saved_comes_back(path: Path) -> None:
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert state["step"] == 3
    assert torch.equal(state["lanes"]["fused"]["weight"], STATE["lanes"]["fused"]["weight"])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_random_states_come_back(path: Path) -> None:
    device = torch.device("cpu")
    checkpoint.save(path, {"random": checkpoint.random_state(device)})
    drawn = torch.rand(3).tolist(), random.random()
    checkpoint.set_random_state(checkpoint.load(path)["random"], device)
    assert (torch.rand(3).tolist(), random.random()) == drawn


@pytest.mark.parametrize("when", FAILURES)
def test_a_full_disk_keeps_the_earlier_checkpoint(when: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        FAILURES[when](patch)
        with pytest.raises(OSError, match=f"cannot write {path}: No space left on device; the earlier one is kept"):
            checkpoint.save(path, {**STATE, "step": 4})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name], "the half-written file is gone"
    checkpoint.save(path, {**STATE, "step": 4})
    assert checkpoint.load(path)["step"] == 4


@pytest.mark.parametrize("when", FAILURES)
def test_a_full_disk_leaves_nothing_of_a_first_one(when: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAILURES[when](monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device$"):
        checkpoint.save(path, STATE)
    assert not list(path.parent.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write more than 4 KiB into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_write_that_the_system_refuses_is_a_sentence(path: Path) -> None:
    with pytest.raises(OSError, match=f"cannot write {path}: File too large"):
        checkpoint.save(path, STATE)
    assert not list(path.parent.iterdir())


def test_an_interrupt_while_writing_passes_through(path: Path) -> None:
    checkpoint.save(path, STATE)

    def stop(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.atomic_write(path, stop)
    assert checkpoint.load(path)["step"] == 3
    assert len(list(path.parent.iterdir())) == 1


def _flip(data: bytes) -> bytes:
    """One bit of a weight, in the middle of the file: torch alone would not see it."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 3",)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "one bit flipped": _flip,
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "a pickle with code": lambda data: pickle.dumps(_Code()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_left_alone(damage: str, path: Path) -> None:
    checkpoint.save(path, STATE)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=rf"the checkpoint {path} is not a whole checkpoint .*; it was left as it is"
    ) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_code_in_a_checkpoint_does_not_run(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "step": _Code()}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.load(path)


def test_a_file_of_another_kind_or_format_is_refused(path: Path) -> None:
    for other in ({"format": checkpoint.FORMAT + 1}, {"weights": torch.zeros(2)}, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            checkpoint.load(path)


def test_no_checkpoint(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
        checkpoint.load(path)


def test_metrics_hold_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = metrics.Metrics(path, 0)
    for step in range(1, 6):
        rows.append({"step": step})
    with path.open("ab") as file:
        file.write(b'{"step": 6, "los')  # killed here
    resumed = metrics.Metrics(path, 3)
    resumed.append({"step": 4, "again": True})
    assert list(metrics.read(path)) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    metrics.Metrics(path, 0)
    assert not list(metrics.read(path)), "a new run starts an empty file"


def test_metrics_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    rows.append({"step": 1})
    monkeypatch.setattr(rows, "file", _FullDisk(rows.file))
    with pytest.raises(
        OSError, match=r"cannot write .*metrics.jsonl: No space left on device; the last checkpoint is kept"
    ):
        rows.append({"step": 2, "much": "x" * 2000})
    assert list(metrics.read(rows.path)) == [{"step": 1}]
