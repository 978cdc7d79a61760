"""Compile every kernel without a GPU, Triton's at every config row and CUDA C++, and fail on what must not be.

    python -m bench.audit [--capability 80 90 100] [--only NAME] [--short] [--page MODULE]

Fails on a spill above what the row states, a matrix kernel without HGMMA on sm_90, registers of an HGMMA written before
its wait, copies that an HGMMA reads unfenced, a register that is read before anything can have written it, more shared
memory than the chip gives a program, and a row that does not compile. The roofline columns are estimates for an H100.
CUDA C++ (csrc/cuda) is compiled for sm_75, 80, 86, 89 and 90 with warnings as errors; its shared memory is the most
that a launch gives it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import triton
from rich.console import Console
from rich.table import Table

from bench import cuda
from bench.sass import Reading, read
from vitkernels import kernels
from vitkernels.kernels.variants import Variant

WORKERS = 2
# of an H100, a second: bytes of a copy and operations of a bf16 product of 8192 x 8192 matrices, both measured; and
# operations in float32 outside the tensor cores, from the data sheet
COPY, MATRIX, CORES = 3.0e12, 798e12, 67e12


@dataclass(frozen=True)
class Chip:
    """Limits of one streaming multiprocessor, as in the CUDA programming guide's table of compute capabilities."""

    shared: int  # bytes
    warps: int
    programs: int
    reserved: int = 1024  # bytes of shared memory that the driver keeps of each program, from 8.0 on

    @property
    def shared_of_program(self) -> int:
        return self.shared - self.reserved

    def programs_at_once(self, reading: Reading) -> int:
        """How many programs of a kernel fit, by threads, registers and shared memory; 0 if not even one."""
        warps = reading.threads // 32
        registers = -(-reading.registers * 32 // 256) * 256  # of a warp; handed out 256 at a time
        by_registers = 4 * (16384 // registers) // warps  # four partitions, each with its own
        by_shared = self.shared // max(1, reading.shared + self.reserved)
        return min(self.programs, self.warps // warps, by_registers, by_shared)


KIB = 1024
CHIPS = {
    75: Chip(64 * KIB, 32, 16, reserved=0),
    80: Chip(164 * KIB, 64, 32),
    86: Chip(100 * KIB, 48, 16),
    89: Chip(100 * KIB, 48, 24),
    90: Chip(228 * KIB, 64, 32),
    100: Chip(228 * KIB, 64, 32),
}


@dataclass(frozen=True)
class Row:
    """One variant for one chip: what was read, or why it did not compile."""

    variant: Variant
    capability: int
    reading: Reading | None
    error: str

    @property
    def faults(self) -> list[str]:
        """Sentences on what must not be."""
        if self.reading is None:
            return [f"does not compile: {self.error}"]
        reading, limit = self.reading, CHIPS[self.capability].shared_of_program
        faults = []
        if reading.spilled > self.variant.spills:
            faults.append(f"spills {reading.spilled} bytes; its row admits {self.variant.spills}")
        if self.variant.matrix and self.capability == 90 and "HGMMA" not in reading.matrix:
            faults.append("multiplies matrices without HGMMA")
        if self.variant.matrix and not reading.matrix and self.capability != 90:
            faults.append("multiplies matrices without a matrix instruction")
        if reading.overwritten:
            faults.append(
                f"writes registers that a product in flight reads, {len(reading.overwritten)} times; first: "
                f"{reading.overwritten[0]}"
            )
        if reading.unfenced:
            faults.append(
                f"multiplies what cp.async wrote without a proxy fence, {len(reading.unfenced)} times; first: "
                f"{reading.unfenced[0]}"
            )
        if reading.undefined:
            faults.append(
                f"reads registers that nothing wrote, {len(reading.undefined)} times; first: {reading.undefined[0]}"
            )
        if reading.layouts:
            faults.append(
                f"multiplies out of one address in two layouts, which ptxas 12.8 mixes up: {reading.layouts[0]}"
            )
        if reading.scratch:
            faults.append(f"wants {reading.scratch} bytes of scratch memory, which nobody allocates")
        if reading.shared > limit:
            faults.append(f"takes {reading.shared} bytes of shared memory; sm_{self.capability} gives {limit}")
        return faults


def _compile(work: tuple[str, int, int]) -> tuple[Reading | None, str]:
    """A variant by page, capability and index: kernels themselves do not travel between processes."""
    page, capability, index = work
    return attempt(lambda: read(_variants(page, capability)[index], capability))


def attempt(reading: Callable[[], Reading]) -> tuple[Reading | None, str]:
    """What the compiler made of a kernel, or a sentence on why it made nothing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # triton prints the whole of what ptxas refused
            return reading(), ""
    except Exception as error:  # whatever triton or ptxas raise is the row's fault, and the audit goes on
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = next((line for line in lines if line.startswith("ptxas")), lines[-1])
        return None, f"{type(error).__name__}: {reason}"


def _variants(page: str, capability: int) -> list[Variant]:
    variants: list[Variant] = importlib.import_module(page).variants(divmod(capability, 10))
    return variants


def _select(pages: Sequence[str], capabilities: Sequence[int], only: str, short: bool) -> list[tuple[str, int, int]]:
    work, seen = [], set()
    for page in pages:
        for capability in capabilities:
            for index, variant in enumerate(_variants(page, capability)):
                kernel = (page, variant.kernel.__name__)
                if only not in variant.name or (short and kernel in seen):
                    continue
                seen.add(kernel)
                work.append((page, capability, index))
    return work


# ------------------------------------------------------------------------------------------------------- the table


def floor_time(variant: Variant) -> float:
    """Microseconds that a variant takes at the least, the waste of its tiles included."""
    return 1e6 * max(variant.moved / COPY, variant.flops / (MATRIX if variant.matrix else CORES))


def _roofline(variant: Variant) -> tuple[str, str, str, str]:
    """Bytes, operations, estimated time, and the share of it that the floor (no waste) is."""
    if not variant.moved and not variant.flops:
        return "", "", "", ""
    time = floor_time(variant)
    floor = 1e6 * max(variant.moved / COPY, variant.useful / (MATRIX if variant.matrix else CORES))
    return (
        f"{variant.moved / 1e6:.0f} MB",
        f"{variant.flops / 1e9:.0f} G" if variant.flops else "",
        f"{time:.0f} us",
        f"{floor / time:.0%}",
    )


def _cells(row: Row) -> list[str]:
    name, faults = row.variant.name, row.faults
    name = f"[red]{name}[/red]" if faults else name
    if row.reading is None:
        return [name, str(row.capability), "", "", "", "", "does not compile"]
    reading = row.reading
    load = {0: "", -1: "TMA"}.get(reading.widest, str(reading.widest))
    return [
        name,
        str(row.capability),
        str(reading.registers),
        str(reading.spilled),
        f"{reading.shared / KIB:.1f}",
        str(CHIPS[row.capability].programs_at_once(reading)),
        " ".join(f"{kind} {count}" for kind, count in reading.matrix.items()),
        load,
        "" if reading.waits is None else "{} + {}".format(*reading.waits),
        *(_roofline(row.variant) if row.capability == 90 else ()),
    ]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=f"Kernels as triton {triton.__version__} and nvcc compile them", box=None)
    table.add_column("kernel", overflow="fold")
    for heading in ("sm", "regs", "spill", "KiB", "per SM"):
        table.add_column(heading, justify="right")
    table.add_column("matrix")
    for heading in ("load", "waits", "moved", "FLOP", "at least", "useful"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    table.caption = (
        "spill: bytes a thread; load: bits of the widest; waits: for products + for copies, an iteration of the main "
        f"loop; at least: at {COPY / 1e12} TB/s and {MATRIX / 1e12:.0f} TFLOP/s ({CORES / 1e12:.0f} without tensor "
        "cores); useful: the floor's share of that"
    )
    return table


def _cuda_rows(asked: Sequence[int], only: str, short: bool) -> list[Row]:
    """CUDA C++ for the architectures that it is written for, of those asked for if any are; short, as tests run it."""
    reason = cuda.why_not()
    architectures = [each for each in cuda.ARCHITECTURES if each in asked or not asked]
    if reason is not None or not architectures:
        print(f"CUDA C++ is not compiled: {reason or 'it is written for other architectures'}")
        return []
    found = cuda.read_of_tests(only, WORKERS) if short else cuda.read_all(architectures, only, WORKERS)
    return [Row(Variant(name, None, {}, {}), architecture, *outcome) for name, architecture, *outcome in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=CHIPS, help="targets; default: 80 90 100")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name contains this")
    parser.add_argument("--short", action="store_true", help="one row a kernel: Triton's for sm_90, CUDA C++ for sm_80")
    parser.add_argument("--page", nargs="+", metavar="MODULE", help="modules with variants(); default: every op's page")
    options = parser.parse_args(argv)
    if kernels.interpreting():
        parser.error("TRITON_INTERPRET is set; needs to be unset: interpreted kernels do not compile")
    registered = [f"vitkernels.kernels.{page}" for page in dict.fromkeys(page for page, _ in kernels.PAGES.values())]
    pages = options.page or registered
    capabilities = [90] if options.short else options.capability or [80, 90, 100]
    work = _select(pages, [each for each in capabilities if each >= 80], options.only, options.short)
    cpp = [] if options.page else _cuda_rows(options.capability or (), options.only, options.short)
    if not work and not cpp:
        parser.error(f"nothing to compile in {', '.join(pages) or 'no page'} with {options.only!r} in its name")

    # spawned, not forked: triton's compiler starts threads
    with ProcessPoolExecutor(min(WORKERS, max(1, len(work))), mp_context=get_context("spawn")) as pool:
        readings = list(pool.map(_compile, work))
    rows = [
        Row(_variants(page, capability)[index], capability, *outcome)
        for (page, capability, index), outcome in zip(work, readings, strict=True)
    ] + cpp
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "200")))
    console.print(_table(rows))
    faults = [f"{row.variant.name} (sm_{row.capability}) {fault}" for row in rows for fault in row.faults]
    for fault in faults:
        console.print(fault, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(rows)} rows, {len(faults)} faults" if faults else f"{len(rows)} rows, all as they should be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
