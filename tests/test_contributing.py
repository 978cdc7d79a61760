"""CONTRIBUTING's lists of files are those that the ops, and the commands, stand in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitkernels import dispatch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = re.findall(r"^\| `([^`]+)` \|", TEXT.partition("## Add an op")[2].partition("\n## ")[0], re.M)


def _files(pattern: str) -> list[Path]:
    return [path for path in ROOT.glob(pattern) if path.is_file()]


@pytest.mark.parametrize("place", PLACES)
def test_every_op_stands_where_the_list_says(place: str) -> None:
    assert len(PLACES) > 5
    words = set()
    for path in _files(place):
        words |= set(re.findall(r"\w+", path.read_text()))
    assert {op for op in dispatch.OPS if op not in words} == set()


def test_what_it_names_is_there() -> None:
    """Files by their paths from the root, or within the package; `<op>` and the like are any name."""
    named = {each for each in re.findall(r"`([\w/<>*.]+\.(?:py|cpp|h|md))`", TEXT) if "/" in each}
    assert len(named) > 20
    patterns = {each: re.sub(r"<\w+>\*?", "*", each) for each in named}
    missing = [each for each, path in patterns.items() if not _files(path) and not _files(f"vitkernels/{path}")]
    assert missing == []


def test_its_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)", TEXT)) - {"help"}
    assert {each for each in targets if f"\n{each}:" not in makefile} == set()
