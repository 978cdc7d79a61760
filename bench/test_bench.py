"""Every case on every lane, a test each, with pytest-benchmark's statistics, tables and options.

pytest-benchmark times one test after the other, and figures taken minutes apart are not to be divided by one another.
So the first lane of a case to run has all the case's lanes measured in turn (`measure.py`), and each lane's test
replays its own rounds: the timer that pytest-benchmark reads is the tape of what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Session
from bench.measure import OUR_LANES, Key
from bench.suites import Plan

_tape: Iterator[float] = iter(())


def replay() -> float:
    """The timer: the start of a measured round, then its end."""
    return next(_tape)


@pytest.mark.benchmark(timer=replay)
def test_bench(plan: Plan, key: Key, lane: str, session: Session, benchmark: BenchmarkFixture) -> None:
    global _tape
    timed = session.timed(plan, key, lane)
    if "failed" in timed.row:
        session.keep(key, timed.row)
        (pytest.fail if lane.startswith(OUR_LANES) else pytest.skip)(timed.row["failed"])
    if benchmark.disabled:
        pytest.skip("not timed: pytest-benchmark is disabled")
    _tape = itertools.chain.from_iterable((0.0, seconds) for seconds in timed.samples)
    benchmark.group = str(key)
    benchmark.pedantic(lambda: None, rounds=len(timed.samples))
    assert benchmark.stats is not None
    stats = benchmark.stats.stats
    row = timed.row | {"seconds": stats.median, "spread": stats.iqr / stats.median, "rounds": stats.rounds}
    session.keep(key, row)
    benchmark.extra_info |= row
