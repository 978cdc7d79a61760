"""Options and fixtures of the benches: `pytest bench/`, or `python -m bench.run`, which is the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bench import machine, peers
from bench.measure import Key, Row, Timed, measure
from bench.store import RESULTS, Store, seconds
from bench.suites import NAMES, Plan, plans


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitkernels")
    group.addoption("--suite", choices=NAMES, default="full", help="what to time")
    group.addoption("--out", type=Path, help="results file (default: bench/results/<device>.json)")
    group.addoption("--limit", type=float, default=float("inf"), help="start no case after so many seconds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case and lane; the lanes of a case one after the other."""
    if {"plan", "key", "lane"} <= set(metafunc.fixturenames):
        rows = []
        for plan in plans(metafunc.config.getoption("suite"), machine.device()):
            bench = plan.make()
            rows += [pytest.param(plan, bench.key, lane, id=f"{bench.key}: {lane}") for lane in bench.lanes()]
        metafunc.parametrize(("plan", "key", "lane"), rows)


class Session:
    """Measures each case once, for all its lanes, and keeps their rows."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self.device = machine.device()
        self.deadline = time.monotonic() + limit
        head = {**machine.describe(self.device), "absent": peers.absent()}
        self.store = Store(out or RESULTS / f"{machine.slug(self.device)}.json", head)
        self._key: Key | None = None
        self._timed: dict[str, Timed] = {}
        self._revision = machine.revision()
        self._copy = machine.copy_ceiling(self.device)
        self._gemm: dict[str, float] = {}

    def timed(self, plan: Plan, key: Key, lane: str) -> Timed:
        """A lane's figures; the first lane of a case to ask has all of them measured, in turn."""
        if key != self._key:
            if time.monotonic() > self.deadline:
                pytest.skip("not measured: out of time")
            self._timed = measure(plan.make(), plan.effort)
            self._key = key
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._timed[lane]

    def keep(self, key: Key, row: Row) -> None:
        """Write a row, with the commit, and its place under the two ceilings that this run measured."""
        if key.dtype not in self._gemm:
            self._gemm[key.dtype] = machine.gemm_ceiling(self.device, getattr(torch, key.dtype))
        row |= {"revision": self._revision, "gemm": self._gemm[key.dtype], "copy": self._copy}
        if "seconds" in row:
            row["share"] = max(row["flops"] / row["gemm"], row["bytes"] / row["copy"]) / seconds(row)
            row["mfu"] = row["flops"] / row["gemm"] / seconds(row)
        self.store.keep(key, row)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    option = request.config.getoption
    return Session(option("out"), option("limit"))
