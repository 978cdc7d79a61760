"""Outcomes of trials: where they are kept, and what of them is whole, a row of the repository's file."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import triton

from ptx import alike, cuda, rows
from ptx.attempt import Outcome
from ptx.rows import ROOT, Place, Row, Rows, digest
from ptx.trials import REAL, Trial, everything, name_of

_REAL = frozenset(REAL)


def compiler(backend: str) -> str:
    """What compiles a backend's kernels, with its version."""
    if backend == "triton":
        return f"triton-{triton.__version__}"
    toolkit = cuda.nvcc.find()
    assert toolkit is not None, cuda.why_not()
    return f"nvcc-{toolkit.version}"


class Store:
    """Outcomes, a line each in a file of this compiler and machine.

    Kernels that change leave the outcomes of trials whose launches are what they were: those are compiled again, but
    not run again.

    Attributes:
        done: lines by name, of these kernels.
        ran: lines of trials that were run, by what they launched (`alike.digest`).
        held: what trials launch that need not run, for a row of the repository's says that they passed.
    """

    def __init__(self, path: Path, launches: str) -> None:
        self.path, self._launches = path, launches
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""  # a last line may be half written
        lines = list(map(json.loads, written.splitlines()))
        self.done: dict[str, dict[str, Any]] = {each["name"]: each for each in lines if each["launches_of"] == launches}
        self.ran = {each["key"]: each for each in lines if each.get("key") and "faults" in each}
        self.held: set[str] = set()
        self._sources: dict[Place, str] = {}

    @classmethod
    def of(cls, backend: str, fresh: bool) -> Store:
        path = ROOT / "build" / f"emulate-{compiler(backend)}-{rows.machine()}.jsonl"
        path.parent.mkdir(exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        return cls(path, digest(rows.LAUNCHES[backend]))

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        line = self.done[name] = {"name": name, "launches_of": self._launches} | outcome
        if outcome.get("key") and "faults" in outcome:
            self.ran[outcome["key"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def known(self) -> frozenset[str]:
        """What trials launch that need not run."""
        return frozenset(self.ran) | self.held

    def told(self, name: str) -> bool:
        """Whether it was compiled, so that it is known what it launches."""
        return name in self.done

    def settled(self, name: str) -> bool:
        """Whether it, or one alike, was run."""
        own = self.done.get(name)
        if own is None or "faults" in own or "counts" in own:  # or planted faults
            return own is not None
        return own["key"] in self.ran or own["key"] in self.held

    def sources(self, place: Place, trials: list[Trial]) -> str:
        """Of a row's trials, `Row.sources`."""
        if place not in self._sources:
            self._sources[place] = rows.digest_of(map(alike.sources, trials))
        return self._sources[place]

    def outcome(self, trial: Trial) -> tuple[Outcome, bool]:
        """What came of a trial, and whether it was run itself rather than one alike."""
        own = self.done[str(trial)]
        found = own if "faults" in own else self.ran.get(own["key"])
        if found is None:
            assert own["key"] in self.held, f"{trial} was compiled, not run"
            return Outcome(), False
        names = [each.name for each in fields(Outcome)]
        return Outcome(**{name: found[name] for name in names}), found is own


def place_of(trial: Trial) -> Place:
    """Whose row a trial belongs to."""
    dtype = str(trial.dtype).removeprefix("torch.")
    kind = "models" if trial.case in _REAL else "cases"
    return name_of(trial.capability, trial.backend), trial.case.op, dtype, kind


def by_place(trials: Iterable[Trial]) -> dict[Place, list[Trial]]:
    found: dict[Place, list[Trial]] = defaultdict(list)
    for trial in trials:
        found[place_of(trial)].append(trial)
    return dict(found)


def whole(trials: list[Trial], before: dict[Place, Row], all_of: dict[Place, list[Trial]]) -> dict[Place, Row]:
    """Rows that passed, and all of whose trials are asked for: those that may not have to run."""
    asked = {place: len(each) for place, each in by_place(trials).items()}
    return {p: row for p, row in before.items() if row.passed and p in all_of and asked.get(p) == len(all_of[p])}


def same_sources(store: Store, passed: dict[Place, Row], all_of: dict[Place, list[Trial]]) -> set[Place]:
    """Rows that are valid for their trials would compile what was compiled."""
    return {
        place for place, row in passed.items() if row.sources and row.sources == store.sources(place, all_of[place])
    }


@functools.cache
def _trials_of(backend: str) -> dict[Place, list[Trial]]:
    return by_place(everything(backend))


@functools.cache
def is_executed(place: Place, backend: str, path: Path = rows.FILE) -> bool:
    """Whether the repository's file says that every trial of this row passed, of the sources as they are."""
    row = Rows.read(path).of(compiler(backend)).get(place)
    if row is None or not row.passed or not row.sources:
        return False
    return row.sources == rows.digest_of(map(alike.sources, _trials_of(backend)[place]))


def hold(store: Store, row: Row, trials: list[Trial]) -> bool:
    """Whether a row holds for its trials, which were compiled; if so none that launches the same need run."""
    keys = [store.done[str(trial)]["key"] for trial in trials]
    if rows.digest_of(keys) != row.digest:
        return False
    store.held |= set(keys)
    return True


def found_wrong(store: Store, trials: list[Trial]) -> bool:
    """Whether a finding of one of them is known, whatever a row says."""
    return any(store.outcome(trial)[0].faults for trial in trials if store.settled(str(trial)))


def rows_of(store: Store, compiler: str, all_of: dict[Place, list[Trial]], held: dict[Place, Row]) -> list[Row]:
    """The rows that outcomes make whole, those with a finding, whole or not, and those that hold.

    Args:
        store: outcomes.
        compiler: what they are of.
        all_of: every trial that there is, by place.
        held: rows that are valid as they are.
    """
    backend = rows.backend_of(compiler)
    now = rows.kernels(backend)
    counted = set(store.held)
    found = []
    for place, trials in all_of.items():
        if place in held:
            sources = store.sources(place, trials)
            found.append(replace(held[place], trials=len(trials), sources=sources, kernels=now))
            continue
        settled = [trial for trial in trials if store.settled(str(trial))]
        outcomes = [store.outcome(trial)[0] for trial in settled]
        failed = sum(bool(each.faults) for each in outcomes)
        if len(settled) < len(trials) and not failed:
            continue
        keys, launches = [store.done[str(trial)].get("key", "") for trial in settled], 0
        for key, outcome in zip(keys, outcomes, strict=True):
            launches += outcome.launches if key not in counted else 0
            counted |= {key} - {""}
        whole_row = len(settled) == len(trials)
        digests = (rows.digest_of(keys), store.sources(place, trials)) if whole_row else ("", "")
        found.append(Row(compiler, *place, len(settled), launches, failed, *digests, now))
    return found
