"""The README says what the result files say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import readme


def test_figures_are_those_of_the_result_files() -> None:
    text = readme.README.read_text()
    assert readme.BLOCK.search(text), "README.md has no block of figures"
    assert readme.render(text) == text, "README.md and bench/results differ: run python -m bench.readme"


def test_a_typed_figure_is_noticed() -> None:
    text = readme.README.read_text()
    block = readme.BLOCK.search(text)
    assert block is not None
    typed = text.replace(block[0], block[0].replace("| ratio | 1 |", "| ratio | 1 | 9.99 |"))
    assert typed != text
    assert readme.render(typed) == text


@pytest.mark.parametrize("target", ["make demo", "make test"])
def test_its_two_commands_are_targets(target: str) -> None:
    assert target in readme.README.read_text()
    makefile = (readme.ROOT / "Makefile").read_text()
    assert f"\n{target.removeprefix('make ')}:" in makefile
