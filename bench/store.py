"""A device's results file: what was measured with what, and a row for each case and lane.

A run replaces the rows of the cases that it measures and keeps the others, as long as device and versions are the same.
Ratios of a whole model, or of a block, differ more from one run to the next than within one: theirs are kept apart, as
many as were made of one commit, and readers get the one that gains least.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench.measure import OUR_LANES, Key, Row
from vitkernels.train.checkpoint import write_json

RESULTS = Path(__file__).parent / "results"
_HEAD = ("device", "versions")
_RUNS_APART = ("model", "block")


class Store:
    """The results of a run, written after every row: a run that is stopped keeps what it has.

    Args:
        path: the file; made where it is not there.
        head: `machine.describe`.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "rows": []}
        self._runs: dict[Key, int] = {}  # of the cases that were measured, the number of this run
        if path.exists():
            before = read(path)
            if all(before[field] == head[field] for field in _HEAD):
                self.content["rows"] = before["rows"]

    def keep(self, key: Key, row: Row) -> None:
        """Add a lane's row. Its case's rows of earlier runs go with the first; of models those of other code alone."""
        rows: list[Row] = self.content["rows"]
        if key not in self._runs:
            rows = [each for each in rows if key_of(each) != key or _beside(each, row)]
            self._runs[key] = 1 + max((run_of(each) for each in rows if key_of(each) == key), default=0)
        self.content["rows"] = [*rows, row | {"run": self._runs[key]}]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def _beside(before: Row, now: Row) -> bool:
    """Whether an earlier run of a case and this one are two of the same code."""
    revision = now.get("revision", "")
    known = bool(revision) and not revision.endswith("-dirty")
    return known and before.get("revision") == revision and now["kind"] in _RUNS_APART and not now["sweep"]


def key_of(row: Row) -> Key:
    return Key(**{field: row[field] for field in Key.__dataclass_fields__})


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: another kind of file.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not {"device", "versions", "rows"} <= content.keys():
        raise ValueError(f"{path}: needs a results file of bench.run, with 'device', 'versions' and 'rows'")
    return content


def run_of(row: Row) -> int:
    """The number of the run that a row is of, from 1 on."""
    return row.get("run", 1)  # type: ignore[no-any-return]


def runs(rows: list[Row]) -> dict[Key, list[dict[str, Row]]]:
    """Rows by case, then by run, then by lane."""
    cases: dict[Key, dict[int, dict[str, Row]]] = {}
    for row in rows:
        cases.setdefault(key_of(row), {}).setdefault(run_of(row), {})[row["lane"]] = row
    return {key: list(each.values()) for key, each in cases.items()}


def by_case(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by case, then by lane; of several runs of a case, those of the one that gains least."""
    return {key: min(each, key=_gain) for key, each in runs(rows).items()}


def _gain(lanes: dict[str, Row]) -> float:
    """timm's time over that of our slowest lane; the least where a lane of ours has no figure, which is to be seen."""
    ours = [row for name, row in lanes.items() if name.startswith(OUR_LANES)]
    if any("seconds" not in row for row in ours):
        return 0.0
    stock = lanes.get("timm", {})
    return seconds(stock) / max(map(seconds, ours)) if ours and "seconds" in stock else math.inf


def seconds(row: Row) -> float:
    """What a row says that a call takes: on the device itself where that was measured, launches and all otherwise."""
    return row.get("device_seconds") or row["seconds"]
