"""Findings that are understood and stand for now. Whoever mends one takes its line away."""

from __future__ import annotations

import re
from dataclasses import dataclass

import triton

from ptx.findings import REGISTERS, Finding


@dataclass(frozen=True)
class Known:
    """Findings that fail no test.

    Attributes:
        kind: of the finding.
        kernels: names of the kernels in which it is known.
        mended: the first triton version that is without it, ("9.9") where none is known.
        note: a pattern of its note.
        reason: why it stands.
    """

    kind: str
    kernels: tuple[str, ...]
    mended: tuple[int, int, int]
    note: str
    reason: str


KNOWN = (
    Known(
        REGISTERS,
        ("forward_kernel", "backward_kernel", "dkdv_kernel", "dq_kernel"),
        (9, 9, 9),
        r"^writes \S+ operand of a product in flight",
        "LLVM gives the registers of a product's A operand to the next value at once: undefined by PTX; ptxas gives "
        "them other registers where it sees it, and what it made of it is read in SASS",
    ),
)


def version() -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", triton.__version__)[:3])


def is_known(finding: Finding) -> bool:
    return any(
        finding.kind == each.kind
        and finding.kernel in each.kernels
        and version() < each.mended
        and re.search(each.note, finding.note) is not None
        for each in KNOWN
    )
