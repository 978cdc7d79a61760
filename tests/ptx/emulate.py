"""Run everything on the machine: `make emulate`, `make emulate TRITON=3.6.0`.

    python -m ptx.emulate [--only TEXT] [--capability 80 90] [--quick] [--faults | --no-faults] [--fresh]

Every case in every layout and dtype on every capability, launches of real models last, then planted faults. What was
done is kept under build/ and not done again while the code is the same. Two processes, progress, a table at the end;
exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ptx.plant import KERNELS, Planted, listing, plant
from ptx.trials import Outcome, Trial, attempt, everything, quick

ROOT = Path(__file__).parents[2]
WORKERS = 2
ENOUGH = 0.95  # of the planted faults that are not redundant
SOURCES = ("vitkernels/kernels/*.py", "vitkernels/ops/*.py", "vitkernels/accuracy.py", "tests/ptx/*.py", "tests/ca*.py")


def code() -> str:
    """A digest of what decides the outcomes."""
    files = sorted(path for pattern in (*SOURCES, "tests/layouts.py", "tests/draws.py") for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class Store:
    """Outcomes by name, a line each in a file of this code and triton."""

    def __init__(self, fresh: bool) -> None:
        self.path = ROOT / "build" / f"emulate-{triton.__version__}-{code()}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done: dict[str, dict[str, Any]] = {each["name"]: each for each in map(json.loads, lines)}

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        self.done[name] = {"name": name} | outcome
        with self.path.open("a") as file:
            file.write(json.dumps(self.done[name]) + "\n")


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def _attempt(number: int, short: bool) -> dict[str, Any]:
    """A trial by its number: cases hold functions that do not travel between processes."""
    return asdict(attempt((quick() if short else everything())[number]))


def _plant(number: int, short: bool) -> dict[str, Any]:
    return asdict(plant(KERNELS[number]))


def work(
    store: Store, jobs: list[tuple[str, int]], run: Callable[[int, bool], dict[str, Any]], short: bool, console: Console
) -> None:
    """Do what is not done yet, in order, on two processes."""
    left = [(name, number) for name, number in jobs if name not in store.done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=_prepare) as pool,
    ):
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(left))
        waiting = iter(left)
        running: dict[Any, str] = {}

        def start() -> None:
            for name, number in waiting:
                running[pool.submit(run, number, short)] = name
                return

        for _ in range(2 * WORKERS):
            start()
        while running:
            done = next(as_completed(running))
            name = running.pop(done)
            start()
            outcome = done.result()
            store.add(name, outcome)
            progress.update(task, advance=1, description=name[:60])
            for fault in outcome.get("faults", ()):
                progress.console.print(f"[red]{name}[/red]\n{fault}", highlight=False)


def table_of_trials(trials: list[Trial], store: Store) -> tuple[Table, int]:
    """Trials by capability, op and dtype; and how many failed."""
    table = Table("GPU", "op", "dtype", "trials", "launches", "failed", "known findings", "seconds")
    rows: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for trial in trials:
        outcome = Outcome(**{key: value for key, value in store.done[str(trial)].items() if key != "name"})
        major, minor = trial.capability
        rows[f"sm_{major}{minor}", trial.case.op, str(trial.dtype).removeprefix("torch.")].append(outcome)
    for (gpu, op, dtype), outcomes in rows.items():
        failed = sum(bool(each.faults) for each in outcomes)
        known = sorted({kind for each in outcomes for kind in each.known})
        launches, seconds = sum(each.launches for each in outcomes), sum(each.seconds for each in outcomes)
        counts = (str(len(outcomes)), str(launches), str(failed or ""), ", ".join(known), f"{seconds:.0f}")
        table.add_row(gpu, op, dtype, *counts, style="red" if failed else "")
    return table, sum(bool(each.faults) for outcomes in rows.values() for each in outcomes)


def planted_of(store: Store) -> dict[str, Planted]:
    done = {str(each): store.done[str(each)] for each in KERNELS}
    return {name: Planted(each["counts"], each["open"]) for name, each in done.items()}


def table_of_faults(store: Store) -> tuple[Table, bool]:
    """Planted faults by kernel; and whether enough of them were seen."""
    table = Table("kernel", "fault", "planted", "seen", "redundant", "open")
    seen = planted = 0
    for each, found in planted_of(store).items():
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
    parser.add_argument("--capability", type=int, nargs="+", help="80, 86, 89, 90: these alone")
    parser.add_argument("--quick", action="store_true", help="what make test runs")
    parser.add_argument(
        "--faults", action=argparse.BooleanOptionalAction, default=None, help="planted faults alone, or not"
    )
    parser.add_argument("--fresh", action="store_true", help="do again what was done")
    parser.add_argument("--write", action="store_true", help="write REDUNDANT.md")
    options = parser.parse_args(arguments)
    console = Console()
    store = Store(options.fresh)
    good = True
    if not options.faults:
        jobs = list(_chosen(quick() if options.quick else everything(), options))
        if not jobs:
            console.print(f"--only, --capability: no trial is called so: {options.only!r}, {options.capability}")
            return 2
        work(store, [(str(trial), number) for number, trial in jobs], _attempt, options.quick, console)
        table, failed = table_of_trials([trial for _, trial in jobs], store)
        console.print(table)
        good = good and not failed
    if options.faults or (options.faults is None and not options.only and not options.quick and not options.capability):
        work(store, [(str(each), number) for number, each in enumerate(KERNELS)], _plant, False, console)
        table, enough = table_of_faults(store)
        console.print(table)
        good = good and enough
        if options.write:
            (Path(__file__).parent / "REDUNDANT.md").write_text(listing(planted_of(store), triton.__version__))
    return 0 if good else 1


def _chosen(trials: list[Trial], options: argparse.Namespace) -> Iterator[tuple[int, Trial]]:
    for number, trial in enumerate(trials):
        if options.only in str(trial) and (
            options.capability is None or 10 * trial.capability[0] + trial.capability[1] in options.capability
        ):
            yield number, trial


if __name__ == "__main__":
    sys.exit(main())
