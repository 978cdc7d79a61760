"""bench.versions: which Pythons are tried, what is kept of trials, and how they are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import versions

HERE = "{}.{}".format(*sys.version_info)


def test_a_python_is_found_by_its_path_and_told_by_its_version() -> None:
    assert versions.found(sys.executable) == (HERE, sys.executable)
    assert versions.found("9.99") is None


def test_without_a_wheel_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="run make wheel"):
        versions.packed()


def test_trials_of_the_same_wheel_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dist").mkdir()
    packed = tmp_path / "dist" / "vitkernels-1.whl"
    packed.write_bytes(b"a wheel")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "trial", lambda interpreter, torch, source: f"ten steps of {torch}")

    def trials(*torches: str, python: str = sys.executable) -> dict[str, dict[str, str]]:
        out = tmp_path / "versions.json"
        assert versions.main(["--python", python, "--torch", *torches, "--out", str(out)]) == 0
        return json.loads(out.read_text())["trials"]

    assert trials("2.11.0") == {HERE: {"2.11.0": "ten steps of 2.11.0"}}
    assert trials("2.13.0") == {HERE: {each: f"ten steps of {each}" for each in ("2.11.0", "2.13.0")}}
    assert trials("2.13.0", python="9.99")["9.99"] == {"2.13.0": "no such Python here"}
    packed.write_bytes(b"another wheel")
    assert trials("2.13.0") == {HERE: {"2.13.0": "ten steps of 2.13.0"}}


def test_a_trial_that_does_not_install_ends_with_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "packed", lambda ending="whl": tmp_path / f"vitkernels-1.{ending}")
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'looking' >&2\necho 'ERROR: nothing | found' >&2\nexit 1\n")
    interpreter.chmod(0o755)
    assert versions.trial(str(interpreter), "2.13.0", False) == "does not install: ERROR: nothing / found"


@pytest.mark.parametrize(("source", "told"), [(False, "ten steps"), (True, "ten steps, built there")])
def test_from_source_the_sdist_is_built_beside_torch(
    source: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "packed", lambda ending="whl": tmp_path / f"vitkernels-1.{ending}")
    interpreter, heard = tmp_path / "python", tmp_path / "heard"
    interpreter.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" >> {heard}\n')
    interpreter.chmod(0o755)
    assert versions.trial(str(interpreter), "2.11.0", source) == told
    needs, own = heard.read_text().splitlines()[:2]
    folder = own.split("--target ")[1].split()[0]
    assert own.startswith(f"{folder} "), "torch cannot be imported while the extension is built"
    assert f"vitkernels-1.{'tar.gz' if source else 'whl'}" in own
    assert ("setuptools" in needs) == source


def test_trials_are_told_as_a_grid() -> None:
    trials = {"3.10": {"2.11.0": "ten steps", "2.13.0": "ten steps"}, "3.13": {"2.13.0": "no such Python here"}}
    told = versions.table({"revision": "abc", "trials": trials})
    assert "|  | torch 2.11.0 | torch 2.12.1 | torch 2.13.0 | torch 2.14.1 |" in told
    assert "| Python 3.12 |  |  |  |  |" in told, "what was not tried has its place"
    assert "| Python 3.13 |  |  | no such Python here |  |" in told
    assert told.endswith("Tried at abc; empty: not tried.\n")
