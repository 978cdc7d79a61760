"""Writes every figure that this repository shows, from bench/results/: `python -m bench.report`; nobody types them.

Between `<!-- figures: NAME -->` and `<!-- end -->`, in the README and in the pages of docs, stands what `BLOCKS[NAME]`
makes of the results files. bench/results/REPORT.md is made as a whole, with its pictures, and so is the README's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptx.rows import Rows

from bench import coverage, emulated, headline, host, kinds, plots, scaling, tables, versions
from bench.store import RESULTS
from bench.tables import NOT_MEASURED, Content

ROOT = Path(__file__).parent.parent
DOCS = ("index", "figures", "coverage", "scaling", "memory", "backends", "ops/index")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
REPORT = "REPORT.md"
LEGEND = """Made by `python -m bench.report` from the JSON files beside it.

Times are medians of rounds in which the lanes took turns; the spread is the distance of the quartiles over the median.
Bold: a lane that takes less time than ours; of a tower, one that is slower fused than stock. Inexact: a peer whose
results or gradients are further from float64 than ours may be. The limit is the larger of FLOPs over the rate of a
large matrix product and bytes over the rate of a large copy; MFU is of the matrix product alone. FLOPs and bytes are
what no kernel can do without. Memory is the most that a step takes of torch's allocator on top of weights and inputs.
"""
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Results:
    """Everything in a folder of results: one file for each device, and the demo's."""

    devices: dict[str, Content] = field(default_factory=dict)
    demo: dict[str, Any] | None = None
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict)
    host: dict[str, Any] | None = None
    kinds: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    emulated: Rows = field(default_factory=Rows)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """The files there; those that other programs wrote are left alone."""
        found = cls()
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text())
            if path.stem == "demo":
                found.demo = content
            elif path.stem.endswith("-coverage"):
                found.coverage[path.stem.removesuffix("-coverage")] = content
            elif path.stem == host.FILE.stem:
                found.host = content
            elif path.stem == kinds.FILE.stem:
                found.kinds = content
            elif path.stem == versions.FILE.stem:
                found.versions = content
            elif path.stem == emulated.FILE.stem:
                found.emulated = Rows.read(path)
            elif isinstance(content, dict) and {"device", "kind", "versions", "rows"} <= content.keys():
                found.devices[path.stem] = content
        return found

    @property
    def has_gpu(self) -> bool:
        return any(content["kind"] == "cuda" for content in self.devices.values())


def _with_gpu(text: str, results: Results) -> str:
    """Text, and a word where no figure is a GPU's."""
    return text if results.has_gpu else f"{text}\n{NOT_MEASURED}\n"


def _for_each(table: Callable[[Content], str]) -> Callable[[Results], str]:
    """A block with a part for each device, and a word where none is a GPU."""

    def block(results: Results) -> str:
        parts = "\n".join(part for content in results.devices.values() if (part := table(content)))
        return _with_gpu(parts, results)

    return block


BLOCKS: dict[str, Callable[[Results], str]] = {
    "headline": lambda results: _with_gpu(headline.sentence(results.devices.values()), results),
    "models": _for_each(tables.models),
    "towers": _for_each(tables.towers),
    "ops": _for_each(tables.ops),
    "demo": lambda results: tables.demo(results.demo) if results.demo else "Not yet measured.\n",
    "host": lambda results: host.report(results.host) if results.host else "Not yet measured.\n",
    "kinds": lambda results: kinds.report(results.kinds) if results.kinds else "Not yet measured.\n",
    "coverage": lambda results: (
        "\n".join(coverage.table(content) for content in results.coverage.values()) or "Not yet measured.\n"
    ),
    "memory": _for_each(tables.memory),
    "work": lambda results: tables.work(list(results.devices.values())),
    "versions": lambda results: versions.table(results.versions) if results.versions else "Not yet measured.\n",
    "emulated": lambda results: emulated.sentence(results.emulated),
    "scaling": lambda results: scaling.page(list(results.devices.values())),
}


def render(text: str, results: Results) -> str:
    """A page's text with every block of figures made anew.

    Raises:
        ValueError: a block of a name that is not in `BLOCKS`.
    """

    def fill(block: re.Match[str]) -> str:
        if block["name"] not in BLOCKS:
            raise ValueError(f"report: no figures {block['name']!r}; needs one of {', '.join(BLOCKS)}")
        return f"{block[1]}{BLOCKS[block['name']](results)}{block[3]}"

    return BLOCK.sub(fill, text)


def report(results: Results) -> str:
    """REPORT.md: for each device what it can do, every table, what has no figure and why, and the pictures."""
    parts = [f"# Results\n\n{LEGEND}"]
    for name, content in results.devices.items():
        versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
        machine = (
            f"{versions}.",
            tables.revisions(content),
            f"Peers that are not installed here: {', '.join(content.get('absent', [])) or 'none'}.",
            f"Ceilings of the same run: {tables.ceilings(content)}.",
        )
        parts.append("\n".join([f"## {content['device']}\n", *filter(None, machine), ""]))
        sections = {
            "Blocks and models": tables.models(content),
            "Towers of timm and transformers": tables.towers(content),
            "Ops": tables.ops(content),
            "Memory against time": tables.memory(content),
            "How cost grows": scaling.growth(content),
            **({"Time by kernel": by_kernel} if (by_kernel := tables.kernels(content)) else {}),
            "Every lane": f"{tables.lanes(content)}\n",
            "No figure, or one with a remark": f"{tables.wrong(content)}\n",
        }
        parts += [f"### {title}\n\n{text or 'Not yet measured.' + chr(10)}" for title, text in sections.items()]
        parts += [f"![{title}]({name}-{kind}.png)\n" for title, (kind, make) in plots.PICTURES.items() if make(content)]
    if not results.has_gpu:
        parts.append(f"## GPU\n\n{NOT_MEASURED}\n")
    parts.append(f"## Host time of a block\n\n{BLOCKS['host'](results)}")
    parts.append(f"## Training: the demo\n\n{BLOCKS['demo'](results)}")
    return "\n".join(parts)


def _whole(results: Results, folder: Path) -> dict[Path, str]:
    """The files that are made as a whole."""
    return {
        folder / REPORT: report(results),
        folder / headline.FILE: headline.picture(results.devices.values()),
    }


def stale(results: Results, folder: Path, pages: tuple[Path, ...] = PAGES) -> list[Path]:
    """The files whose figures are not those of the results."""
    made = {page: render(page.read_text(), results) for page in pages} | _whole(results, folder)
    return [path for path, text in made.items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 where a file and the results differ"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results, where the report goes too")
    known = parser.parse_args(arguments)
    results = Results.read(known.results)
    if known.check:
        old = stale(results, known.results)
        print("\n".join(f"{path}: differs from the results; run python -m bench.report" for path in old))
        return int(bool(old))
    for path, text in _whole(results, known.results).items():
        path.write_text(text)
    for name, content in results.devices.items():
        plots.draw(content, known.results, name)
    if known.results == RESULTS:
        for page in PAGES:
            page.write_text(render(page.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
