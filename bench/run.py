"""Times this machine: `python -m bench.run`, the benches under pytest, into bench/results/<device>.json.

Prints the tables of the file, ratios and shares of the limit. Further options are those of `pytest bench/`:
`-k attention`, `--limit=SECONDS`, `--benchmark-json=FILE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from bench import machine, scaling, tables
from bench.store import RESULTS, read
from bench.suites import NAMES

QUICK_SECONDS = 100.0  # after so many no further case begins: two minutes in all


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; 0, or 1 where one of our own lanes is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=NAMES, default="full", help="what to time")
    parser.add_argument("--quick", action="store_true", help="the suite that ends within two minutes")
    parser.add_argument("--out", type=Path, help="results file")
    known, others = parser.parse_known_args(arguments)
    out = known.out or RESULTS / f"{machine.slug(machine.device())}.json"
    options = [f"--suite={'quick' if known.quick else known.suite}", f"--out={out}", "--benchmark-quiet"]
    if known.quick:
        options.append(f"--limit={QUICK_SECONDS}")
    code = pytest.main([str(Path(__file__).with_name("test_bench.py")), *options, *others])
    if out.exists():
        content = read(out)
        made = (table(content) for table in (tables.models, tables.towers, tables.ops, scaling.growth, tables.kernels))
        print("", f"Ceilings: {tables.ceilings(content)}.", *made, sep="\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
