"""Run everything on the machine: `make emulate`, `make emulate TRITON=3.6.0`.

    python -m ptx.emulate [--backend triton cuda] [--only TEXT] [--capability 80 90] [--quick] [--faults | --no-faults]
                          [--fresh]
    python -m ptx.emulate --record build/emulate-*.jsonl

Every case in every layout and dtype on every capability, launches of real models last, then planted faults: of Triton's
kernels, and of the extension's CUDA C++ where there is a toolkit. What was done is kept under build/ and not done again
while launches, machine and reference are the same. Of trials that are alike (`alike`) one is run, the others have its
outcome. Two processes, progress, a table at the end; exit code 1 where something failed.

What of it is whole goes to bench/results/emulated.json (`rows`). A row there that passed is not run again in another
checkout either, as long as its digest is that of its trials: of the same sources it is, which takes milliseconds to
know; otherwise its trials are compiled. --record writes the rows that files of build/ make whole, and runs nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ptx import alike, cuda, rows, sample
from ptx.attempt import attempt
from ptx.plant import KERNELS, Planted, listing, plant
from ptx.rows import Place, Row, Rows, digest
from ptx.store import Store, by_place, compiler, found_wrong, hold, place_of, rows_of, same_sources, whole
from ptx.trials import BACKENDS, Trial, everything

WORKERS = 2
JOBS = 400  # of a process: Triton keeps all that it compiled there, 4 GB in an hour
ENOUGH = 0.95  # of the planted faults that are not redundant
LISTS = {"triton": "REDUNDANT.md", "cuda": "REDUNDANT-cuda.md"}


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


def _describe(backend: str, short: bool, numbers: list[int], known: frozenset[str]) -> list[dict[str, Any]]:
    """What trials launch, without running them."""
    return [{"key": alike.digest(_trials(backend, short)[number])} for number in numbers]


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
    done_already: Callable[[str], bool],
) -> None:
    """Do what is not done yet, in order, on two processes."""
    left = [job for job in jobs if not all(map(done_already, job[0]))]
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
                running[pool.submit(run, numbers, store.known())] = names
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


def table_of_trials(trials: list[Trial], store: Store, held: dict[Place, Row]) -> tuple[Table, int]:
    """Trials by capability, op and dtype, then rows that hold; and how many failed."""
    table = Table("GPU", "op", "dtype", "trials", "alike", "launches", "failed", "seconds")
    total = [0] * 5
    for place, each in by_place(trials).items():
        outcomes = [store.outcome(trial) for trial in each]
        own = [outcome for outcome, itself in outcomes if itself]
        failed = sum(bool(outcome.faults) for outcome, _ in outcomes)
        launches, seconds = sum(outcome.launches for outcome in own), round(sum(outcome.seconds for outcome in own))
        counts = [len(outcomes), len(outcomes) - len(own), launches, failed, seconds]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        table.add_row(*_title(place), *_cells(counts), style="red" if failed else "")
    for place, row in held.items():
        total[0] += row.trials
        table.add_row(*_title(place), str(row.trials), "", "as before", "", "")
    table.add_section()
    table.add_row("", "", "", *_cells(total))
    return table, total[3]


def _title(place: Place) -> tuple[str, str, str]:
    gpu, op, dtype, of = place
    return gpu, op if of == "cases" else f"{op}, {of}", dtype


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
    parser.add_argument("--results", type=Path, default=rows.FILE, help="file of rows, bench/results/emulated.json")
    parser.add_argument(
        "--record", type=Path, nargs="+", metavar="FILE", help="run nothing: write rows of what is in files of build/"
    )
    options = parser.parse_args(arguments)
    console = Console()
    if options.record:
        reasons = [_record(path, options.results, console) for path in options.record]
        console.print("\n".join(filter(None, reasons)), highlight=False, soft_wrap=True)
        return 2 if any(reasons) else 0
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
    order = {place: number for number, place in enumerate(by_place(trial for _, trial in jobs))}
    jobs = sorted(jobs, key=lambda job: order[place_of(job[1])])  # row by row: one that is whole is kept
    good = True
    if jobs and not options.faults:
        held = {} if options.quick or options.fresh else _held(backend, jobs, store, options.results, console)
        left = [(number, trial) for number, trial in jobs if place_of(trial) not in held]
        run = functools.partial(_attempt, backend, options.quick)
        try:
            work(store, together(left), run, console, store.settled)
        finally:  # stopped, too, what is whole is kept
            if not options.quick:
                record(store, compiler(backend), held, options.results)
        table, failed = table_of_trials([trial for _, trial in left], store, held)
        console.print(table)
        good = not failed
    if options.faults or (options.faults is None and not options.only and not options.quick and not options.capability):
        chosen = [(number, each) for number, each in enumerate(KERNELS) if each.backend == backend]
        work(store, [([str(each)], [number]) for number, each in chosen], _plant, console, store.told)
        planted = planted_of(backend, store)
        table, enough = table_of_faults(planted)
        console.print(table)
        good = good and enough
        if options.write:
            text = listing(planted, compiler(backend).replace("-", " "))
            (Path(__file__).parent / LISTS[backend]).write_text(text)
    return good


def _held(backend: str, jobs: list[tuple[int, Trial]], store: Store, path: Path, console: Console) -> dict[Place, Row]:
    """Rows of the repository's file that hold, for sources or launches are the same: their trials need not run."""
    all_of = by_place(_trials(backend, False))
    passed = whole([trial for _, trial in jobs], Rows.read(path).of(compiler(backend)), all_of)
    same = same_sources(store, passed, all_of)
    unsure = [(number, trial) for number, trial in jobs if place_of(trial) in passed.keys() - same]
    if unsure:
        console.print(f"{path.name}: {len(unsure)} trials are compiled, to see whether they launch what was executed")
        work(store, together(unsure), functools.partial(_describe, backend, False), console, store.told)
    return {
        place: row
        for place, row in passed.items()
        if not found_wrong(store, all_of[place]) and (place in same or hold(store, row, all_of[place]))
    }


def record(store: Store, name: str, held: dict[Place, Row], path: Path) -> int:
    """Write a compiler's rows: what outcomes make whole, and what holds. Gives how many."""
    all_of = by_place(everything(rows.backend_of(name)))
    found = rows_of(store, name, all_of, held)
    if found:
        written = Rows.read(path)
        written.put(name, found, all_of, sum(map(len, all_of.values())))
        written.write(path)
    return len(found)


def _record(path: Path, results: Path, console: Console) -> str | None:
    """Write the rows that a file of outcomes makes whole; gives why not."""
    named = re.fullmatch(r"emulate-(\w+-.+)-([0-9a-f]+)\.jsonl", path.name)
    if named is None or not path.exists():
        return f"--record {path}: needs a file of build/, emulate-<compiler>-<digest of the machine>.jsonl"
    here = compiler(rows.backend_of(named[1]))
    if named[1] != here:
        return f"--record {path}: needs {named[1]}, to see what it is of; here is {here}"
    if named[2] != rows.machine():
        return f"--record {path}: was executed by another machine than tests/ptx is now"
    store = Store(path, digest(rows.LAUNCHES[rows.backend_of(named[1])]))
    if not store.done:
        return f"--record {path}: is of other kernels or cases; at its own commit, or make emulate, which compares"
    count = record(store, named[1], {}, results)
    console.print(f"{path.name}: {len(store.done)} outcomes, {count} rows", highlight=False)
    return None


def _chosen(trials: list[Trial], options: argparse.Namespace) -> Iterator[tuple[int, Trial]]:
    for number, trial in enumerate(trials):
        if options.only in str(trial) and (
            options.capability is None or 10 * trial.capability[0] + trial.capability[1] in options.capability
        ):
            yield number, trial


if __name__ == "__main__":
    sys.exit(main())
