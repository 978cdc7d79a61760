"""Did a change make something slower? `python -m bench.compare BASE NEW`, two results files of one device.

A case of ours regressed where it takes longer than before by more than both runs' spread and 5 %, after what its peers
take longer in the same two runs is taken out: a machine that is slow today is slow for all. Regressions are listed, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.measure import OUR_LANES, Row
from bench.store import by_case, read, seconds

LEAST = 0.05


def regressions(base: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A sentence for each case of ours that is slower in `new`, or has no figure there any more.

    Raises:
        ValueError: results of two devices, or without a case in common.
    """
    if base["device"] != new["device"]:
        raise ValueError(f"compare: base is of {base['device']!r} and new of {new['device']!r}; needs one device")
    before, after = by_case(base["rows"]), by_case(new["rows"])
    common = [key for key in after if key in before]
    if not common:
        raise ValueError("compare: base and new have no case in common")
    found = []
    for key in common:
        drift = _drift(before[key], after[key])
        for lane in (lane for lane in after[key] if lane.startswith(OUR_LANES)):
            sentence = _judge(before[key].get(lane), after[key][lane], drift)
            if sentence is not None:
                found.append(f"{key}: {lane} {sentence}")
    return found


def _drift(before: dict[str, Row], after: dict[str, Row]) -> float:
    """How many times as long the peers of a case take now."""
    ratios = [
        seconds(after[lane]) / seconds(before[lane])
        for lane in after
        if not lane.startswith(OUR_LANES) and "seconds" in after[lane] and "seconds" in before.get(lane, {})
    ]
    return statistics.median(ratios) if ratios else 1.0


def _judge(before: Row | None, after: Row, drift: float) -> str | None:
    if before is None or "seconds" not in before:
        return None
    if "seconds" not in after:
        return f"has no figure any more: {after['failed']}"
    change = seconds(after) / seconds(before) / drift - 1
    noise = max(LEAST, before["spread"] + after["spread"])
    if change <= noise:
        return None
    return (
        f"takes {change:.0%} longer (noise {noise:.0%}): {seconds(before) * 1e3:.3f} ms -> "
        f"{seconds(after) * 1e3:.3f} ms, peers {drift - 1:+.0%}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="results file of before")
    parser.add_argument("new", type=Path, help="results file of now")
    known = parser.parse_args(arguments)
    try:
        found = regressions(read(known.base), read(known.new))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(found) or "no regression beyond the noise")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
