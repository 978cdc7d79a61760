"""Run everything on the machine: `make emulate`, `make emulate TRITON=3.6.0`.

    python -m ptx.emulate [--backend triton cuda] [--only TEXT] [--capability 80 90] [--quick] [--faults | --no-faults]
                          [--fresh]

Every case in every layout and dtype on every capability, launches of real models last, then planted faults: of Triton's
kernels, and of the extension's CUDA C++ where there is a toolkit. What was done is kept under build/ and not done again
while launches, machine and reference are the same. Of trials that are alike (`alike`) one is run, the others have its
outcome. Two processes, progress, a table at the end; exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ptx import alike, cuda, sample
from ptx.attempt import Outcome, attempt
from ptx.plant import KERNELS, Planted, listing, plant
from ptx.trials import BACKENDS, Trial, everything, name_of

ROOT = Path(__file__).parents[2]
WORKERS = 2
JOBS = 400  # of a process: Triton keeps all that it compiled there, 4 GB in an hour
ENOUGH = 0.95  # of the planted faults that are not redundant
# what decides, beside launches, numbers drawn and references, what comes of a trial
MACHINE = ("tests/ptx/*.py", "tests/ptx/*.cpp", "tests/accuracy.py", "vitkernels/accuracy.py")
# files there that say what is done, and how it is kept
CHOOSING = ("emulate.py", "trials.py", "sample.py", "plant.py", "alike.py")
# what decides about launches, numbers and references
_CASES = ("tests/case*.py", "tests/layouts.py", "tests/draws.py", "tests/ptx/trials.py", "vitkernels/ops/*.py")
LAUNCHES = {
    "triton": ("vitkernels/kernels/**/*.py", *_CASES),
    "cuda": ("vitkernels/ext*.py", "csrc/nvcc.py", "csrc/cuda/*", "csrc/shared/*", *_CASES),
}
LISTS = {"triton": "REDUNDANT.md", "cuda": "REDUNDANT-cuda.md"}


def digest(patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """Of the files' contents."""
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.name not in without)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


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
    """

    def __init__(self, path: Path, launches: str) -> None:
        self.path, self._launches = path, launches
        lines = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {each["name"]: each for each in lines if each["launches_of"] == launches}
        self.ran = {each["key"]: each for each in lines if each.get("key") and "faults" in each}

    @classmethod
    def of(cls, backend: str, fresh: bool) -> Store:
        path = ROOT / "build" / f"emulate-{compiler(backend)}-{digest(MACHINE, CHOOSING)}.jsonl"
        path.parent.mkdir(exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        return cls(path, digest(LAUNCHES[backend]))

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        line = self.done[name] = {"name": name, "launches_of": self._launches} | outcome
        if outcome.get("key") and "faults" in outcome:
            self.ran[outcome["key"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def outcome(self, trial: Trial) -> tuple[Outcome, bool]:
        """What came of a trial, and whether it was run itself rather than one alike."""
        own = self.done[str(trial)]
        found = own if "faults" in own else self.ran[own["key"]]
        names = [each.name for each in fields(Outcome)]
        return Outcome(**{name: found[name] for name in names}), found is own


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


@functools.cache
def _trials(backend: str, short: bool) -> list[Trial]:
    return sample.of(backend) if short else everything(backend)


def _attempt(backend: str, short: bool, numbers: list[int], known: frozenset[str]) -> list[dict[str, Any]]:
    """Trials by their numbers, for cases hold functions that do not travel between processes.

    Args:
        backend, short: whose list they are numbers of.
        numbers: of trials.
        known: digests of trials that were run; those alike have no outcome of their own.
    """
    outcomes = []
    for number in numbers:
        trial = _trials(backend, short)[number]
        key = alike.digest(trial)
        outcomes.append({"key": key} if key in known else asdict(attempt(trial)) | {"key": key})
        known |= {key} - {""}
    return outcomes


def _plant(numbers: list[int], known: frozenset[str]) -> list[dict[str, Any]]:
    return [asdict(plant(KERNELS[number])) for number in numbers]


Job = tuple[list[str], list[int]]  # names, and numbers that go with them


def together(trials: list[tuple[int, Trial]]) -> list[Job]:
    """Jobs: trials that differ in multiprocessors alone share what was parsed."""
    groups = itertools.groupby(trials, lambda each: (each[1].case, each[1].dtype, each[1].capability))
    lists = [list(group) for _, group in groups]
    return [([str(trial) for _, trial in group], [number for number, _ in group]) for group in lists]


def work(
    store: Store,
    jobs: list[Job],
    run: Callable[[list[int], frozenset[str]], list[dict[str, Any]]],
    console: Console,
) -> None:
    """Do what is not done yet, in order, on two processes."""
    left = [job for job in jobs if not store.done.keys() >= set(job[0])]
    total, todo = (sum(len(names) for names, _ in each) for each in (jobs, left))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(
            WORKERS, mp_context=get_context("spawn"), initializer=_prepare, max_tasks_per_child=JOBS
        ) as pool,
    ):
        task = progress.add_task("", total=total, completed=total - todo)
        waiting = iter(left)
        running: dict[Any, list[str]] = {}

        def start() -> None:
            for names, numbers in waiting:
                running[pool.submit(run, numbers, frozenset(store.ran))] = names
                return

        for _ in range(WORKERS + 1):
            start()
        while running:
            done = next(as_completed(running))
            names = running.pop(done)
            start()
            for name, outcome in zip(names, done.result(), strict=True):
                store.add(name, outcome)
                progress.update(task, advance=1, description=name[:60])
                for fault in outcome.get("faults", ()):
                    progress.console.print(f"[red]{name}[/red]\n{fault}", highlight=False)


def table_of_trials(trials: list[Trial], store: Store) -> tuple[Table, int]:
    """Trials by capability, op and dtype; and how many failed."""
    table = Table("GPU", "op", "dtype", "trials", "alike", "launches", "failed", "seconds")
    rows: dict[tuple[str, str, str], list[tuple[Outcome, bool]]] = defaultdict(list)
    for trial in trials:
        dtype = str(trial.dtype).removeprefix("torch.")
        rows[name_of(trial.capability, trial.backend), trial.case.op, dtype].append(store.outcome(trial))
    total = [0] * 5
    for row, outcomes in rows.items():
        own = [each for each, itself in outcomes if itself]
        failed = sum(bool(each.faults) for each, _ in outcomes)
        launches, seconds = sum(each.launches for each in own), round(sum(each.seconds for each in own))
        counts = [len(outcomes), len(outcomes) - len(own), launches, failed, seconds]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        table.add_row(*row, *_cells(counts), style="red" if failed else "")
    table.add_section()
    table.add_row("", "", "", *_cells(total))
    return table, total[3]


def _cells(counts: list[int]) -> list[str]:
    count, alike, launches, failed, seconds = counts
    return [str(count), str(alike or ""), str(launches), str(failed or ""), str(seconds)]


def planted_of(backend: str, store: Store) -> dict[str, Planted]:
    done = {str(each): store.done[str(each)] for each in KERNELS if each.backend == backend}
    return {name: Planted(each["counts"], each["open"]) for name, each in done.items()}


def table_of_faults(planted_in: dict[str, Planted]) -> tuple[Table, bool]:
    """Planted faults by kernel; and whether enough of them were seen."""
    table = Table("kernel", "fault", "planted", "seen", "redundant", "open")
    seen = planted = 0
    for each, found in planted_in.items():
        for kernel, fault, total, shown, spare in found.rows():
            table.add_row(
                f"{each}: {kernel}", fault, str(total), str(shown), str(spare), str(total - shown - spare or "")
            )
            seen, planted = seen + shown, planted + total - spare
    table.add_row("", "", "", f"{seen} of {planted}", "", "")
    return table, seen >= ENOUGH * planted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.emulate", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="trials whose name has this in it")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="whose kernels; default: all that compile here")
    parser.add_argument("--capability", type=int, nargs="+", help="75, 80, 86, 89, 90: these alone")
    parser.add_argument("--quick", action="store_true", help="what make test runs")
    parser.add_argument(
        "--faults", action=argparse.BooleanOptionalAction, default=None, help="planted faults alone, or not"
    )
    parser.add_argument("--fresh", action="store_true", help="do again what was done")
    parser.add_argument("--write", action="store_true", help="write the lists of redundant statements")
    options = parser.parse_args(arguments)
    console = Console()
    reason = cuda.why_not()
    if reason is not None and "cuda" in (options.backend or BACKENDS):
        console.print(f"CUDA C++ is not run: {reason}")
    backends = [each for each in options.backend or BACKENDS if reason is None or each != "cuda"]
    jobs = {each: list(_chosen(_trials(each, options.quick), options)) for each in backends}
    if not options.faults and not any(jobs.values()):
        console.print(f"--only, --capability: no trial is called so: {options.only!r}, {options.capability}")
        return 2
    good = [_run(each, jobs[each], options, console) for each in backends]  # all of them, whatever comes of the first
    return 0 if all(good) else 1


def _run(backend: str, jobs: list[tuple[int, Trial]], options: argparse.Namespace, console: Console) -> bool:
    """What was asked for of one backend; gives whether all is well."""
    store = Store.of(backend, options.fresh)
    good = True
    if jobs and not options.faults:
        work(store, together(jobs), functools.partial(_attempt, backend, options.quick), console)
        table, failed = table_of_trials([trial for _, trial in jobs], store)
        console.print(table)
        good = not failed
    if options.faults or (options.faults is None and not options.only and not options.quick and not options.capability):
        chosen = [(number, each) for number, each in enumerate(KERNELS) if each.backend == backend]
        work(store, [([str(each)], [number]) for number, each in chosen], _plant, console)
        planted = planted_of(backend, store)
        table, enough = table_of_faults(planted)
        console.print(table)
        good = good and enough
        if options.write:
            text = listing(planted, compiler(backend).replace("-", " "))
            (Path(__file__).parent / LISTS[backend]).write_text(text)
    return good


def _chosen(trials: list[Trial], options: argparse.Namespace) -> Iterator[tuple[int, Trial]]:
    for number, trial in enumerate(trials):
        if options.only in str(trial) and (
            options.capability is None or 10 * trial.capability[0] + trial.capability[1] in options.capability
        ):
            yield number, trial


if __name__ == "__main__":
    sys.exit(main())
