"""The one tolerance rule: how far from the truth a result or a gradient may be.

Truth is float64 on the same numbers. In the dtype under test, a kernel may err twice as much as plain torch errs in it,
plus a small floor. Errors are measured twice: the worst one, against truth's largest magnitude, and their root mean
square, against truth's own, which sees what the worst one hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
KINDS = ("worst", "rms")


@dataclass(frozen=True, slots=True)
class Size:
    """How large the elements of a tensor are."""

    worst: float
    rms: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Errors that are always allowed: `worst` and `rms` relative to truth's, `absolute` beside both.

    Where numbers are of about 1, `absolute` is what is left when terms of about 1 cancel: the gradient of the scores of
    a query that sees one key is 0, and comes out as the rounding of the sums it is the difference of.
    """

    worst: float
    rms: float
    absolute: float


_ULP = torch.finfo(torch.float32).eps
FLOORS = {
    # the reference is the truth here, and its own rounding counts too; a step kept in float32 would show as 1e-8
    torch.float64: Floor(worst=1e-11, rms=1e-11, absolute=1e-11),
    # sums of thousands of terms in another order, and exp or erf by a polynomial that is some ulp off
    torch.float32: Floor(worst=8 * _ULP, rms=8 * _ULP, absolute=16 * _ULP),
    # one intermediate (attention's weights, the activation) rounded to the dtype before it is multiplied: the unit
    # roundoff at the worst, half of it over many elements
    torch.bfloat16: Floor(worst=2**-8, rms=2**-9, absolute=16 * _ULP),
    torch.float16: Floor(worst=2**-11, rms=2**-12, absolute=16 * _ULP),
}


def size_of(tensor: Tensor) -> Size:
    """The largest magnitude of a tensor's elements and their root mean square; 0 where it has none."""
    if tensor.numel() == 0:
        return Size(0.0, 0.0)
    return Size(tensor.abs().max().item(), tensor.square().mean().sqrt().item())


def allowed(own: Size, size: Size, floor: Floor) -> Size:
    """How large an error may be.

    Args:
        own: the error of plain torch in the same dtype.
        size: the truth's own size.
        floor: what is always allowed.
    """
    return Size(
        FACTOR * own.worst + floor.worst * size.worst + floor.absolute,
        FACTOR * own.rms + floor.rms * size.rms + floor.absolute,
    )
