"""Which kernels get planted faults, one of each kind, and what comes of them.

`python -m ptx.emulate --faults --write` lists the statements that no fault shows, with the reason, beside this file: in
REDUNDANT.md, those of CUDA C++ in REDUNDANT-cuda.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ptx.faults import KINDS, KINDS_OF_CPP, Site, calls, redundant, seen, sites
from ptx.trials import name_of


@dataclass(frozen=True)
class Kernel:
    """The kernels of a case on a GPU."""

    op: str
    name: str
    capability: tuple[int, int] = (9, 0)
    backend: str = "triton"

    def __str__(self) -> str:
        return f"faults: {name_of(self.capability, self.backend)} {self.op}: {self.name}"

    def sites(self) -> Iterator[Site]:
        for call in calls(self.op, self.name, torch.bfloat16, self.capability, self.backend):
            yield from sites(call, KINDS if self.backend == "triton" else KINDS_OF_CPP)


KERNELS = (
    Kernel("add_layer_norm", "197 tokens"),
    Kernel("rotary", "head width 64, halves"),
    Kernel("linear", "blocked gemm"),
    Kernel("mlp", "gelu, blocked gemm"),
    Kernel("attention_qkv", "197 tokens"),
    Kernel("attention", "many keys, the first ones masked"),
    Kernel("patch_embed", "blocked gemm"),
    Kernel("attention_qkv", "197 tokens", (8, 0)),
    Kernel("mlp", "gelu, blocked gemm", (8, 0)),
    Kernel("add_layer_norm", "197 tokens", (8, 0), "cuda"),
    Kernel("rotary", "head width 64, halves", (8, 0), "cuda"),
    Kernel("mlp", "gelu, blocked gemm", (8, 0), "cuda"),
    Kernel("rotary_qkv", "LayerNorm, halves", (8, 0), "cuda"),
    Kernel("glu_mlp", "silu, blocked gemm", (8, 0), "cuda"),
    Kernel("attention_qkv", "head width 72", (8, 0), "cuda"),
    Kernel("attention", "key padding, cross", (8, 0), "cuda"),
    Kernel("attention_varlen", "grouped keys, causal, cross", (8, 0), "cuda"),
    Kernel("attention_rel_pos", "a smaller image of keys", (8, 0), "cuda"),
    Kernel("patch_embed", "uint8, mean and std", (8, 0), "cuda"),
)


@dataclass
class Planted:
    """What came of a kernel's faults: how many by (kernel, fault, how), as a list of [kernel, fault, how, times]."""

    counts: list[list[str | int]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)  # not seen, and not shown to be redundant

    def rows(self) -> Iterator[tuple[str, str, int, int, int]]:
        """(kernel, fault, planted, seen, redundant)"""
        found: dict[tuple[str, str], list[int]] = {}
        for kernel, fault, how, times in self.counts:
            row = found.setdefault((str(kernel), str(fault)), [0, 0, 0])
            row[0] += int(times)
            row[1] += int(times) if how == "seen" else 0
            row[2] += int(times) if how not in ("seen", "open") else 0
        for (kernel, fault), (total, shown, spare) in found.items():
            yield kernel, fault, total, shown, spare


def plant(kernel: Kernel) -> Planted:
    """Plant every fault of a case's kernels."""
    counts: Counter[tuple[str, str, str]] = Counter()
    planted = Planted()
    for site in kernel.sites():
        how = "seen" if seen(site) else redundant(site) or "open"
        counts[site.call.kernel, site.kind, how] += 1
        if how == "open":
            planted.open.append(str(site))
    planted.counts = [[*key, times] for key, times in counts.items()]
    return planted


def listing(outcomes: dict[str, Planted], compiler: str) -> str:
    """The faults that nothing shows, and why, as a page beside this file."""
    rows = [row for each in outcomes.values() for row in each.rows()]
    seen, needed = sum(shown for *_, shown, _ in rows), sum(total - spare for _, _, total, _, spare in rows)
    lines = [
        "# Faults that nothing shows",
        "",
        f"Planted one at a time in the PTX of {compiler}, bfloat16 (`plant.py` says in which kernels): {seen} of",
        f"{needed} are seen by the machine. The others change nothing, each by a rule that `faults.redundant` holds it",
        "to; what is neither seen nor shown to be redundant is listed as open.",
        "",
        "| kernel | fault | times | why it changes nothing |",
        "| --- | --- | ---: | --- |",
    ]
    for name, outcome in outcomes.items():
        for kernel, fault, how, times in outcome.counts:
            if how != "seen":
                where = name.removeprefix("faults: ")
                lines.append(f"| {where}, `{kernel}` | {fault} | {times} | {how} |")
    lines += [f"\nOpen: {site}" for each in outcomes.values() for site in each.open]
    return "\n".join(lines) + "\n"
