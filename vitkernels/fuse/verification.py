"""What `verify` answers: each tensor's error by the one tolerance rule, the worst of them as text."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.accuracy import FACTOR, FLOORS, KINDS, Floor, Size, allowed, size_of
from vitkernels.fuse.runs import GRADIENT, Run
from vitkernels.text import table

SHOWN = 10
# Without float64 the stock model's own error is not known, and this is allowed in its place: a few hundred roundings.
LOOSE = {
    torch.float64: Floor(worst=1e-9, rms=1e-9, absolute=0.0),
    torch.float32: Floor(worst=1e-3, rms=1e-4, absolute=0.0),
    torch.bfloat16: Floor(worst=2**-3, rms=2**-5, absolute=0.0),
    torch.float16: Floor(worst=2**-6, rms=2**-8, absolute=0.0),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One output or gradient.

    Attributes:
        name: "output.logits", "gradient of blocks.0.attn.qkv.weight".
        size: of the truth.
        error: of the fused model; NaN where only one of the two has the tensor, or their shapes differ.
        own: of the stock model; None where it is the truth.
        allowed: how large `error` may be.
        compared: elements that are finite, stock or fused; where there are none, nothing could differ.
    """

    name: str
    size: Size
    error: Size
    own: Size | None
    allowed: Size
    compared: int

    @property
    def ok(self) -> bool:
        """Whether the tensor is within the rule; not where the error is NaN."""
        return all(getattr(self.error, kind) <= getattr(self.allowed, kind) for kind in KINDS)

    @property
    def kind(self) -> str:
        """The measure, "worst" or "rms", in which the error comes nearest to what is allowed."""
        return max(KINDS, key=self._strain)

    @property
    def strain(self) -> float:
        """The error as a share of what is allowed; infinite where it is NaN."""
        return self._strain(self.kind)

    def _strain(self, kind: str) -> float:
        error, limit = getattr(self.error, kind), getattr(self.allowed, kind)
        if error == 0:
            return 0.0
        return error / limit if limit > 0 and not math.isnan(error) else math.inf


@dataclass(frozen=True)
class Verification:
    """What `verify` found; print it, or read it.

    Attributes:
        rows: every output, and the gradient of every parameter and input that requires one.
        truth: what errors are measured against, "float64" or "the stock model".
        summary: the last line of `explain`.
        ran: calls that fused ops had, as "attention_qkv (ext)".
        notes: what else is to be known.
        failure: what the fused model raised where the stock one did not, or None.
    """

    rows: list[Row]
    truth: str
    summary: str
    ran: dict[str, int]
    notes: list[str]
    failure: str | None = None

    @property
    def broken(self) -> list[Row]:
        """The rows outside the rule."""
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Whether the fused model ran, on fused ops, and everything is within the rule."""
        return self.failure is None and self._nothing is None and not self.broken

    @property
    def _nothing(self) -> str | None:
        """Why nothing was verified, or None."""
        if not self.ran:
            return "no fused op ran, and both runs are the stock model's"
        if not any(row.compared for row in self.rows if not row.name.startswith(GRADIENT)):
            return "no output holds a finite number, stock or fused: the batch is empty, or all of it becomes NaN"
        return None

    @property
    def worst(self) -> list[Row]:
        """The ten rows nearest to what is allowed, or furthest past it, first."""
        return sorted(self.rows, key=lambda row: row.strain, reverse=True)[:SHOWN]

    def to_dict(self) -> dict[str, Any]:
        """The same for programs, in plain Python values: the fields, and `ok`."""
        rows = [{**dataclasses.asdict(row), "ok": row.ok} for row in self.rows]
        return {
            "ok": self.ok,
            "truth": self.truth,
            "summary": self.summary,
            "ran": self.ran,
            "notes": self.notes,
            "failure": self.failure,
            "rows": rows,
        }

    def __str__(self) -> str:
        lines = [table([_HEAD, *map(_cells, self.worst)])] if self.rows and (self.ran or self.broken) else []
        lines.append(self.summary)
        if self.ran:
            lines.append("ran: " + ", ".join(f"{count} x {name}" for name, count in self.ran.items()))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self._verdict()])

    __repr__ = __str__

    def _verdict(self) -> str:
        if self.failure is not None:
            return f"FAILED: the stock model runs, and the fused one raised {self.failure}"
        rule = f"{FACTOR:g} times the stock model's own error and a floor" if self.truth == "float64" else "rounding"
        if self.broken:
            return (
                f"FAILED: {len(self.broken)} of {len(self.rows)} tensors differ from {self.truth} by more than {rule}"
            )
        if self._nothing is not None:
            return f"FAILED: nothing was verified: {self._nothing}"
        compared = sum(row.compared > 0 for row in self.rows)
        return f"ok: {compared} outputs and gradients differ from {self.truth} by no more than {rule}"


_HEAD = ("tensor", "measure", "error", "stock's own", "allowed", "truth's size", "")


def _cells(row: Row) -> tuple[str, ...]:
    own = "" if row.own is None else f"{getattr(row.own, row.kind):.2e}"
    numbers = [f"{getattr(size, row.kind):.2e}" for size in (row.error, row.allowed, row.size)]
    return row.name, row.kind, numbers[0], own, numbers[1], numbers[2], "" if row.ok else "FAILED"


# ------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class _Measured:
    """A tensor's sizes before it is judged."""

    name: str
    size: Size
    error: Size
    own: Size | None
    compared: int

    @property
    def group(self) -> str:
        """Tensors whose rounding is of one scale: the gradients of one module's parameters."""
        return self.name.rpartition(".")[0] if self.name.startswith(GRADIENT) else self.name


def judge(got: Run, stock: Run, truth: Run | None, dtypes: Collection[torch.dtype]) -> list[Row]:
    """Every output and gradient by the rule; without a truth, against the stock model.

    To the rule's floor, two things are added. A small tensor's own error may be small by luck: the stock model's
    typical one, the median over all tensors, is allowed on each. And a gradient that is 0 by its nature (of a bias on
    the keys) comes out as the rounding of the sums it is the difference of: that much of its module's largest one.

    Args:
        got, stock: of the fused and of the stock model.
        truth: of the stock model in float64, or None.
        dtypes: in which the two computed; the floor is the coarsest one's.
    """
    table_of = LOOSE if truth is None else FLOORS
    base = max((table_of[each] for each in dtypes), key=lambda floor: floor.worst)
    rounding = max((FLOORS[each] for each in dtypes), key=lambda floor: floor.worst)
    share = max(rounding.worst, rounding.absolute) * (FACTOR if truth is None else 1)  # then both of them round
    measured = _measured(got, stock, truth)
    typical = {kind: statistics.median(_relative(measured, kind) or [0.0]) for kind in KINDS}
    floor = Floor(max(base.worst, typical["worst"]), max(base.rms, typical["rms"]), 0.0)
    largest: dict[str, float] = {}
    for each in measured:
        largest[each.group] = max(largest.get(each.group, 0.0), each.size.rms)
    rows = []
    for each in measured:
        beside = dataclasses.replace(floor, absolute=share * largest[each.group])
        limit = allowed(each.own or Size(0.0, 0.0), each.size, beside)
        rows.append(Row(each.name, each.size, each.error, each.own, limit, each.compared))
    return rows


def _measured(got: Run, stock: Run, truth: Run | None) -> list[_Measured]:
    mine, own, exact = (each.tensors() for each in (got, stock, stock if truth is None else truth))
    found = []
    for name, either in {**mine, **own}.items():
        tensor, other, right = own.get(name), mine.get(name), exact.get(name, either).double()
        size = size_of(right.nan_to_num(0.0, 0.0, 0.0))
        if tensor is None or other is None or not tensor.shape == other.shape == right.shape:
            found.append(_Measured(name, size, Size(math.nan, math.nan), None, right.numel()))
            continue
        tensor, other = tensor.double(), other.double()
        # what overflows in the stock model says nothing of its error, nor of one that overflows alike
        lost = ~tensor.isfinite()
        alike = lost & ((other == tensor) | (other.isnan() & tensor.isnan()))
        own_error = None if truth is None else _error(torch.where(lost, right, tensor), right)
        compared = int((tensor.isfinite() | other.isfinite()).count_nonzero())
        found.append(_Measured(name, size, _error(torch.where(alike, right, other), right), own_error, compared))
    return found


def _error(tensor: Tensor, exact: Tensor) -> Size:
    """How far apart they are; infinities and NaNs that both have are no error."""
    same = (tensor == exact) | (tensor.isnan() & exact.isnan())
    return size_of(torch.where(same, 0.0, tensor - exact))


def _relative(measured: Sequence[_Measured], kind: str) -> list[float]:
    """The stock model's own errors as shares of the truth's sizes, where they are that: not for gradients of 0."""
    shares = [
        getattr(each.own, kind) / getattr(each.size, kind)
        for each in measured
        if each.own is not None and getattr(each.size, kind) > 0
    ]
    return [each for each in shares if each < 1]
