"""The pages that people read, in pieces: code by its language, with the line that it begins at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Args:
        kind: "python", "bash", "text" or nothing.
        text: what stands in it.
        line: of the page, where the text begins.
        follows: only blank lines stand between it and the block before.
    """

    kind: str
    text: str
    line: int
    follows: bool


def name(page: Path) -> str:
    """As pytest shows it."""
    return str(page.relative_to(ROOT))


def snippets(page: Path) -> Iterator[Snippet]:
    """All fenced blocks of a page, in order."""
    text, end = page.read_text(), 0
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("text")) + 1
        yield Snippet(fence["kind"], fence["text"], line, follows=not text[end : fence.start()].strip())
        end = fence.end()


def having(kind: str) -> list[Path]:
    """The pages with a block of that kind."""
    return [page for page in PAGES if any(each.kind == kind for each in snippets(page))]
