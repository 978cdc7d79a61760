"""Time what could stand in the rows of configs on this GPU, and print the rows to paste, the fastest first.

    python -m bench.tune [--page attention ...] [--shapes NAME] [--seconds 420] [--json PATH] [--dry-run]

A candidate is compiled from the arguments of its call, and dropped where it fails the audit; run, and dropped where
its results are not the reference's; then timed in turn with the others, on inputs larger than the cache. With
--dry-run, on any machine, it stops after the compiler and prints its readings.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import audit, machine, warm
from bench.sass import Reading
from bench.slots import Slot, slots, source
from vitkernels import dispatch, kernels
from vitkernels.kernels import configs
from vitkernels.kernels.variants import Variant

SECONDS = 420.0
TURNS = 7
PROCESSORS = 132  # of an H100, for a dry run
WRONG = 0.02  # of the reference's norm; bf16 operands come within 0.01


@dataclass
class Candidate:
    """A tile in a slot, and what became of it."""

    tile: Any
    row: audit.Row
    dropped: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def microseconds(self) -> float:
        return statistics.median(self.samples) * 1e6


def variant(slot: Slot, tile: Any, capability: int) -> Variant:
    """The compilation of the slot's row with the tile in it."""
    page = importlib.import_module(f"vitkernels.kernels.{slot.page}")
    with slot.put(tile):
        found: list[Variant] = page.variants(divmod(capability, 10))
    return next(each for each in found if each.name == slot.row)


def _read(work: tuple[str, Any, int, int]) -> tuple[Reading | None, str]:
    """A tile in the slot of that row: slots themselves do not travel between processes."""
    row, tile, capability, processors = work
    slot = next(each for each in slots(divmod(capability, 10)) if each.row == row)
    kernel = variant(slot, tile, capability).kernel.__name__

    def call() -> None:
        with slot.put(tile):
            _launcher(slot)(*slot.arguments(None))

    return audit.attempt(lambda: warm.read(call, kernel, capability, processors))


def candidates(slot: Slot, capability: int, processors: int, pool: ProcessPoolExecutor) -> list[Candidate]:
    """Every tile of a slot as the compiler sees it; dropped are those that fail the audit.

    What compiles it is the very call that is timed later, so that one finds it in Triton's cache.
    """
    works = [(slot.row, tile, capability, processors) for tile in slot.tiles]
    found = []
    for tile, (reading, error) in zip(slot.tiles, pool.map(_read, works), strict=True):
        row = audit.Row(variant(slot, tile, capability), capability, reading, error)
        found.append(Candidate(tile, row, "; ".join(row.faults)))
    return found


# --------------------------------------------------------------------------------------------------------- on the GPU


def _tensors(outputs: Any) -> list[Tensor]:
    return [each for each in (outputs if isinstance(outputs, tuple) else (outputs,)) if each.numel()]


def _error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error of a result, relative to its norm; NaN where there is one."""
    errors = [
        ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
        for a, b in zip(got, wanted, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def _launcher(slot: Slot) -> Any:
    return getattr(dispatch.OPS[slot.op].implementations["triton"], slot.direction)


def _sets(slot: Slot) -> list[tuple[Any, ...]]:
    """Sets of arguments that together are larger than the cache, two at least."""
    first = slot.arguments(0)
    size = sum(each.nbytes for each in first if isinstance(each, Tensor))
    count = max(2, -(-2 * machine.cache_bytes(torch.device("cuda")) // size))
    return [first, *(slot.arguments(seed) for seed in range(1, count))]


def measure(slot: Slot, found: list[Candidate], deadline: float) -> None:
    """Check and time the candidates that are left, in turn, until the deadline."""
    launch, sets = _launcher(slot), _sets(slot)
    wanted = _tensors(getattr(dispatch.OPS[slot.op].implementations["reference"], slot.direction)(*sets[0]))
    left: list[Candidate] = []
    for candidate in (each for each in found if not each.dropped):
        if time.monotonic() > deadline and left:
            candidate.dropped = "not tried: no time left"
            continue
        try:
            with slot.put(candidate.tile):
                error = _error(_tensors(launch(*sets[0])), wanted)
        except Exception as failure:  # one candidate's failure is its own
            candidate.dropped = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
            continue
        if not error <= WRONG:
            candidate.dropped = f"wrong: off by {error:.3g} of the reference"
            continue
        left.append(candidate)
    del wanted
    for turn in range(TURNS):
        if turn > 1 and time.monotonic() > deadline:
            break
        for candidate in left if turn % 2 == 0 else reversed(left):
            with slot.put(candidate.tile):
                candidate.samples.append(machine.device_seconds(lambda each: launch(*each), sets, repeats=1))


# --------------------------------------------------------------------------------------------------------- what it says


def report(slot: Slot, found: list[Candidate], every: bool) -> list[str]:
    """Lines for a slot: the timed rows, the fastest first; with `every`, what the compiler said of each."""
    lines = [f"# {slot.row}: {slot.op} {slot.direction}"]
    timed = sorted((each for each in found if each.samples), key=lambda each: each.microseconds)
    now = found[0].microseconds if found[0].samples else float("nan")
    for each in timed[:5]:
        mark = "  (as it is)" if each is found[0] else ""
        lines.append(f"{source(each.tile)},  # {each.microseconds:.1f} us, {now / each.microseconds:.2f} x{mark}")
    for each in found:
        if every and not each.dropped and each.row.reading is not None:
            reading = each.row.reading
            programs = audit.CHIPS[each.row.capability].programs_at_once(reading)
            least = audit.floor_time(each.row.variant)
            lines.append(
                f"{source(each.tile)},  # {reading.registers} registers, {reading.spilled} spilled, "
                f"{reading.shared / 1024:.0f} KiB, {programs} per SM, at least {least:.0f} us"
            )
    dropped = [each for each in found if each.dropped]
    if every:
        lines += [f"#   {source(each.tile)}: {each.dropped}" for each in dropped]
    elif dropped:
        lines.append(f"#   {len(dropped)} of {len(found)} dropped; first: {dropped[0].dropped}")
    return lines


def record(slot: Slot, found: list[Candidate]) -> dict[str, Any]:
    """The same for a file."""
    rows = [
        {"tile": source(each.tile), "dropped": each.dropped}
        | ({"microseconds": round(each.microseconds, 2), "turns": len(each.samples)} if each.samples else {})
        for each in found
    ]
    return {"row": slot.row, "op": slot.op, "direction": slot.direction, "candidates": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; 0 when done, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", nargs="+", help="pages of vitkernels.kernels; default: all")
    parser.add_argument("--shapes", default="", metavar="NAME", help="rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="what was found so far, after each row")
    parser.add_argument("--dry-run", action="store_true", help="compile and print; needs no GPU")
    parser.add_argument("--capability", type=int, choices=audit.CHIPS, default=90, help="target of a dry run")
    options = parser.parse_args(argv)
    if kernels.interpreting():
        parser.error("TRITON_INTERPRET is set; needs to be unset: interpreted kernels do not compile")
    if not options.dry_run and not torch.cuda.is_available():
        print("make tune: torch sees no CUDA device; needs an NVIDIA GPU, or --dry-run", file=sys.stderr)
        return 2
    capability, processors = options.capability, PROCESSORS
    if not options.dry_run:
        capability = configs.chip(torch.cuda.get_device_capability())
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = [
        each
        for each in slots(divmod(capability, 10))
        if options.shapes in each.row and (not options.page or each.page in options.page)
    ]
    if not chosen:
        parser.error(f"nothing to tune with {options.shapes!r} in its name in {options.page or 'any page'}")
    end = time.monotonic() + options.seconds
    records = []
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        for index, slot in enumerate(chosen):
            if time.monotonic() > end:
                print(f"# no time left for {len(chosen) - index} more rows, {slot.row} the first of them", flush=True)
                break
            found = candidates(slot, capability, processors, pool)
            if not options.dry_run:
                share = (end - time.monotonic()) / (len(chosen) - index)
                measure(slot, found, time.monotonic() + share)
                torch.cuda.empty_cache()
            print("\n".join(report(slot, found, options.dry_run)), flush=True)
            records.append(record(slot, found))
            if options.json is not None:
                options.json.write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
