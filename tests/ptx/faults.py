"""Faults planted in compiled kernels, one at a time: what the machine has to see.

A launch of a real case is kept and made again with one statement of its PTX taken away or loosened. The fault is seen
where the machine finds something or the results differ. What cannot be seen because nothing changes is a redundant
statement; `redundant` says by which rule, and no other statement counts as one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accuracy import check_case
from cases import CASES

from ptx.call import Call, emulated
from ptx.findings import Fault
from ptx.launch import Loaded
from ptx.operands import Unsupported
from ptx.trace import Trace
from ptx.trials import in_package, launching

KINDS = {  # name: (what is looked for, what stands there instead)
    "barrier removed": (r"^\s*bar\.sync\s+0;", ""),
    "copy wait loosened": (r"(cp\.async\.wait_group)\s+(\d+);", lambda m: f"{m[1]} {int(m[2]) + 1};"),
    "product wait loosened": (r"(wgmma\.wait_group\.sync\.aligned)\s+(\d+);", lambda m: f"{m[1]} {int(m[2]) + 1};"),
    "proxy fence removed": (r"fence\.proxy\.async[\w.:]*;", ""),
    "bytes not expected": (r"@\S+\s+mbarrier\.arrive\.expect_tx[^;]*;", ""),
    "phase not waited for": (r"mbarrier\.try_wait[^;]*\s(\w+),[^;]*;", r"mov.pred \1, -1;"),
    "load mask dropped": (r"@!?%p\d+\s+(ld\.global)", r"\1"),
    "store mask dropped": (r"@!?%p\d+\s+(st\.global)", r"\1"),
}
KINDS_OF_CPP = {  # nvcc masks by branches around what threads leave out, and waits for all copies at once
    "barrier removed": KINDS["barrier removed"],
    "copy wait removed": (r"cp\.async\.wait_all;", ""),
    "load mask dropped": KINDS["load mask dropped"],
    "store mask dropped": KINDS["store mask dropped"],
    "masking branch dropped": (r"@!?%p\d+\s+bra\s+[^;]*;", ""),
}


@dataclass(frozen=True)
class Site:
    """One statement that a fault is planted in."""

    call: Call
    kind: str
    line: int  # of the PTX, from 1
    ptx: str  # with the fault

    def __str__(self) -> str:
        return f"{self.call.kernel}, line {self.line}, {self.kind}: {self.call.ptx.splitlines()[self.line - 1].strip()}"


def calls(op: str, name: str, dtype: torch.dtype, capability: tuple[int, int], backend: str = "triton") -> list[Call]:
    """The launches of a case, each kernel's first one."""
    (case,) = (each for each in CASES if (each.op, each.name) == (op, name))
    with launching(backend, capability, 1, emulated) as record:
        record.keeps = True
        check_case(case, dtype, in_package(backend))
    return list({(call.ptx, call.kernel): call for call in reversed(record.calls)}.values())[::-1]


def sites(call: Call, kinds: dict[str, Any] = KINDS) -> Iterator[Site]:
    """Where faults can be planted. Masks count where they are off for some threads in this launch."""
    launch, _ = _sound(call)
    lines = call.ptx.split("\n")
    for kind, (pattern, instead) in kinds.items():
        for number, line in enumerate(lines, 1):
            if "mask" in kind and number not in launch.partial:
                continue
            changed = re.sub(pattern, instead, line)  # type: ignore[arg-type]
            if changed != line:
                yield Site(call, kind, number, "\n".join([*lines[: number - 1], changed, *lines[number:]]))


def seen(site: Site) -> str:
    """How the fault shows: kinds of findings, "numbers", or "" where it does not."""
    before, expected = _sound(site.call)
    found = {(each.kind, each.instruction.line) for each in before.findings}
    try:
        launch, got = site.call.run(site.ptx)
    except (Fault, Unsupported) as error:
        return str(error).split("\n")[0]
    new = sorted({each.kind for each in launch.findings if (each.kind, each.instruction.line) not in found})
    return ", ".join(new) or ("numbers" if _differ(got, expected) else "")


def redundant(site: Site) -> str:
    """Why a fault that is not seen changes nothing, or "" where that is not shown.

    A mask decides what one thread does, so two runs with equal results show it for this launch. What orders threads is
    shown by the accesses of both runs (`trace`): none of them may come together that were apart before.
    """
    if "mask" in site.kind:
        (before, expected), (after, got) = _sound(site.call), site.call.run(site.ptx)
        if not all(_same_bits(a, b) for a, b in zip(got, expected, strict=True)) or _written(after) != _written(before):
            return ""
        if "branch" in site.kind:
            return "what threads branch past neither faults nor changes anything that is stored"
        if "store" in site.kind:
            return "threads that the mask switches off hold the value that others store there"
        return "what the mask keeps from being read lies inside of the tensor, and nothing stored depends on it"
    old, new = _traces(site.call), _traces(site.call, site.ptx)
    for a, b in zip(old, new, strict=True):
        if b.meetings() - a.meetings() or b.disturbed() - a.disturbed() or b.unfenced - a.unfenced:
            return ""
    if site.kind == "product wait loosened":
        same = [[flight[:2] for flight in each.flights] for each in old]
        waited = same != [[flight[:2] for flight in each.flights] for each in new]
        return "" if waited else "no product is in flight that it would wait for"
    return {
        "barrier removed": "no two warps touch the same bytes, one of them writing, between the barriers around it",
        "copy wait loosened": "nobody touches what the copies in flight write before a later wait",
        "copy wait removed": "nobody touches what the copies in flight write before a later wait",
        "proxy fence removed": "another fence stands between what threads wrote and what reads it asynchronously",
    }.get(site.kind, "")


@functools.lru_cache(maxsize=1)
def _sound(call: Call) -> tuple[Loaded, list[Any]]:
    """The launch without a fault."""
    return call.run()


@functools.lru_cache(maxsize=2)
def _traces(call: Call, ptx: str = "") -> list[Trace]:
    Trace.kept.clear()
    call.run(ptx, order=Trace)
    return list(Trace.kept)


def _written(launch: Loaded) -> list[Any]:
    regions = launch.memory.regions.values()
    return [None if each.writers is None else (each.writers != 0).tobytes() for each in regions]


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not a.numel():
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _differ(got: list[Any], expected: list[Any]) -> bool:
    """Whether a tensor differs by more than roundings could."""
    for a, b in zip(got, expected, strict=True):
        if isinstance(a, torch.Tensor) and a.numel() and not torch.equal(a, b):
            x, y = a.double(), b.double()
            if not torch.equal(x.isnan(), y.isnan()):
                return True
            x, y = x.nan_to_num(), y.nan_to_num()
            if (x - y).abs().max() > 0.01 * y.abs().max():
                return True
    return False
