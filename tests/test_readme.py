"""The README and the pages beside it say what the result files say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import report
from bench.store import RESULTS

README = report.ROOT / "README.md"


def test_figures_are_those_of_the_result_files() -> None:
    assert report.stale(report.Results.read(RESULTS), RESULTS) == [], "run python -m bench.report"


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_a_typed_figure_is_noticed(page: Path) -> None:
    results = report.Results.read(RESULTS)
    text = page.read_text()
    block = report.BLOCK.search(text)
    assert block is not None, f"{page.name} has no block of figures"
    typed = text.replace(block[0], block[0].replace("<!-- end -->", "9.99 times as fast\n<!-- end -->"))
    assert typed != text
    assert report.render(typed, results) == text


def test_its_pictures_are_there() -> None:
    text = (RESULTS / report.REPORT).read_text()
    named = [line.partition("](")[2].removesuffix(")") for line in text.splitlines() if line.startswith("![")]
    assert [name for name in named if not (RESULTS / name).exists()] == []


@pytest.mark.parametrize("target", ["make demo", "make test", "make bench", "make bench-quick"])
def test_its_commands_are_targets(target: str) -> None:
    assert target in README.read_text()
    makefile = (report.ROOT / "Makefile").read_text()
    assert f"\n{target.removeprefix('make ')}:" in makefile
