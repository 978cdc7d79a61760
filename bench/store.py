"""A device's results file: what was measured with what, and a row for each case and lane.

A run replaces the rows of the cases that it measures and keeps the others, as long as device and versions are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.measure import Key, Row
from vitkernels.train.checkpoint import write_json

RESULTS = Path(__file__).parent / "results"
_HEAD = ("device", "versions")


class Store:
    """The results of a run, written after every row: a run that is stopped keeps what it has.

    Args:
        path: the file; made where it is not there.
        head: `machine.describe`.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "rows": []}
        self._measured: set[Key] = set()
        if path.exists():
            before = read(path)
            if all(before[field] == head[field] for field in _HEAD):
                self.content["rows"] = before["rows"]

    def keep(self, key: Key, row: Row) -> None:
        """Add a lane's row; the case's rows of an earlier run go with the first one."""
        rows: list[Row] = self.content["rows"]
        if key not in self._measured:
            rows = [each for each in rows if key_of(each) != key]
            self._measured.add(key)
        self.content["rows"] = [*rows, row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


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


def by_case(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by case, then by lane."""
    cases: dict[Key, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(key_of(row), {})[row["lane"]] = row
    return cases


def seconds(row: Row) -> float:
    """What a row says that a call takes: on the device itself where that was measured, launches and all otherwise."""
    return row.get("device_seconds") or row["seconds"]
