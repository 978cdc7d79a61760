"""Writes the README's figures from bench/results/: `python -m bench.readme`; nobody types them.

Between `<!-- figures: NAME -->` and `<!-- end -->` stands the table that the result file NAME.json makes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench import ops

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown: the demo's result.json, or what `bench.ops` wrote."""
    if "rows" not in result:
        return _demo_table(result)
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        parts.append(f"{result['device']}, torch {result['torch']}, {dtype}:\n\n{ops.table(rows)}\n")
    return "\n".join(parts)


def _demo_table(result: dict[str, Any]) -> str:
    names = list(result["images_per_second"])

    def row(title: str, figures: list[str]) -> str:
        return f"| {title} | {' | '.join(figures)} |"

    def each(figure: str, form: str) -> list[str]:
        return [form.format(result[figure][name]) for name in names]

    lines = [
        row(f"{result['model']}, {result['steps']} steps of {result['batch_size']} images", names),
        row("---", ["---:"] * len(names)),
        row("test accuracy", each("test_accuracy", "{:.2%}")),
        row("step, median", each("step_seconds", "{:.3f} s")),
        row("images per second", each("images_per_second", "{:,.0f}")),
        row("ratio", ["1", f"{result['ratio']:.2f}"]),
        row("largest difference of the two loss curves", ["", f"{result['largest_loss_difference']:.1e}"]),
    ]
    backends = sorted({op["backend"] for op in result["ops"]})
    where = (
        f"On {result['device']}, torch {result['torch']}; every op of the fused model ran on: {', '.join(backends)}."
    )
    return "\n".join(lines) + f"\n\n{where}\n"


def render(text: str) -> str:
    """The README's text with every block of figures made anew."""

    def fill(block: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{block['name']}.json").read_text())
        return f"{block[1]}{table(result)}{block[3]}"

    return BLOCK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README and results differ")
    check = parser.parse_args().check
    text = README.read_text()
    made = render(text)
    if check:
        return int(made != text)
    README.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
