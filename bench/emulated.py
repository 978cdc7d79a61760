"""What the machine in tests/ptx executed of the compiled kernels: a sentence, from the rows of `make emulate`."""

from __future__ import annotations

from ptx import rows
from ptx.rows import FILE, Row, Rows

__all__ = ["FILE", "sentence"]

NONE = "none is recorded"
BACKENDS = {"triton": "Triton's kernels", "cuda": "CUDA C++"}


def sentence(emulated: Rows) -> str:
    """How many trials of how many were executed, as which compiler compiles them, and whether of today's kernels."""
    parts = []
    for backend, title in BACKENDS.items():
        compilers = [each for each in sorted(emulated.trials) if rows.backend_of(each) == backend]
        told = [_of(each, list(emulated.of(each).values()), emulated.trials[each]) for each in compilers]
        parts.append(f"of {title} {', '.join(told) or NONE}")
    trial = "a trial is a case in a layout and dtype on a GPU"
    return f"Executed on a CPU by `make emulate` ({trial}): {'; '.join(parts)}.\n"


def _of(compiler: str, found: list[Row], total: int) -> str:
    now = rows.kernels(rows.backend_of(compiler))
    trials, old = sum(row.trials for row in found), sum(row.trials for row in found if row.kernels != now)
    failed, launches = sum(row.failed for row in found), sum(row.launches for row in found)
    finding = f"**{failed:,} with a finding**" if failed else "no finding"
    age = "of the kernels as they are"
    if old:
        age = f"{'all' if old == trials else f'{old:,}'} of them before the last change of kernels or machine"
    name = compiler.replace("-", " ")
    return f"{trials:,} of {total:,} trials as {name} compiles them ({launches:,} launches, {finding}, {age})"
