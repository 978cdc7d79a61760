"""The one tolerance rule.

Truth is the reference backend in float64 on the same numbers. In the dtype under test, a backend may err twice as much
as the reference errs in it (the reference computes in float32 or float64 and rounds once), plus a small floor. Errors
are measured twice: the worst one, against truth's largest magnitude, and their root mean square, against truth's own,
which sees what the worst one hides. The rule holds for results and for every gradient alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from case import Case
from torch import Tensor

import vitkernels as vk

FACTOR = 2.0


@dataclass(frozen=True)
class Floor:
    """Errors that are always allowed: `worst` and `rms` relative to truth's, `absolute` beside both.

    Cases draw numbers of about 1, so `absolute` is what is left where terms of about 1 cancel: the gradient of the
    scores of a query that sees one key is 0, and comes out as the rounding of the sums it is the difference of.
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


@dataclass(frozen=True)
class Size:
    """How large the elements of a tensor are."""

    worst: float
    rms: float


def size_of(tensor: Tensor) -> Size:
    if tensor.numel() == 0:
        return Size(0.0, 0.0)
    return Size(tensor.abs().max().item(), tensor.square().mean().sqrt().item())


def floor_of(tensors: Mapping[str, Tensor | None]) -> Floor:
    """The floor of the coarsest dtype that takes part."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor is not None and tensor.is_floating_point()}
    return max((FLOORS[dtype] for dtype in dtypes), key=lambda floor: floor.worst)


def check(
    got: Mapping[str, Tensor], reference: Mapping[str, Tensor], truth: Mapping[str, Tensor], floor: Floor
) -> None:
    """Hold every result and gradient to the rule.

    Args:
        got: what a backend computed, by name.
        reference: what the reference computed from the same arguments.
        truth: what it computed from them in float64.
        floor: what is always allowed, `floor_of` the arguments.

    Raises:
        AssertionError: names each tensor that broke the rule, its error and what was allowed.
    """
    assert got.keys() == truth.keys(), f"got {sorted(got)}; needs {sorted(truth)}"
    broken = []
    for name, exact in truth.items():
        tensor = got[name]
        assert tensor.shape == exact.shape, f"{name} has shape {list(tensor.shape)}; needs {list(exact.shape)}"
        assert tensor.dtype == reference[name].dtype, f"{name} is {tensor.dtype}; needs {reference[name].dtype}"
        size = size_of(exact)
        error, own = size_of(tensor.double() - exact), size_of(reference[name].double() - exact)
        for kind in ("worst", "rms"):
            allowed = FACTOR * getattr(own, kind) + getattr(floor, kind) * getattr(size, kind) + floor.absolute
            if not getattr(error, kind) <= allowed:  # also where the error is NaN
                broken.append(
                    f"{name}: {kind} error {getattr(error, kind):.3g}, allowed {allowed:.3g}, "
                    f"truth's own is {getattr(size, kind):.3g}"
                )
    assert not broken, "\n".join(broken)


# -------------------------------------------------------------------------------------- running a case


def in_float64(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in float64, contiguous; leaves that require a gradient where the originals do."""
    return {
        name: tensor.detach().double().contiguous().requires_grad_(tensor.requires_grad)
        if tensor is not None and tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def run(
    case: Case,
    tensors: Mapping[str, Tensor | None],
    gradients: Mapping[str, Tensor] | None = None,
    *,
    forward: str,
    backward: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Results and gradients of a case by name, having seen that the wanted backend, and no other, ran each way.

    Args:
        case: what to call.
        tensors: its arguments, from `case.build`.
        gradients: what arrives at the results; `case.build_gradients` by default.
        forward, backward: names of backends; backward's is forward's by default.
        overrides: options that replace the case's.
    """
    with vk.record() as calls:
        with vk.use(forward):
            outputs = case.call(tensors, **(overrides or {}))
        if gradients is None:
            gradients = case.build_gradients(outputs)
        leaves = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
        with vk.use(backward or forward):
            roots = [outputs[name] for name in gradients]
            grads = torch.autograd.grad(roots, list(leaves.values()), list(gradients.values()), allow_unused=True)
    ran = [(call.op, call.direction, call.backend) for call in calls]
    assert ran == [(case.op, "forward", forward), (case.op, "backward", backward or forward)], ran
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {
        f"gradient of {name}": grad if grad is not None else torch.zeros_like(leaf)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def run_truth(case: Case, tensors: Mapping[str, Tensor | None], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference in float64 on the same numbers."""
    wide = {name: gradient.double() for name, gradient in gradients.items()}
    overrides = {name: torch.float64 for name in case.options if name == "out_dtype"}
    return run(case, in_float64(tensors), wide, forward="reference", overrides=overrides)


def check_case(
    case: Case, dtype: torch.dtype, forward: str, backward: str | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Run a case on a backend and hold it to the rule; returns what it computed."""
    tensors = case.build(dtype, device)
    reference = run(case, tensors, forward="reference")
    gradients = case.build_gradients({name: reference[name] for name in case.results})
    got = run(case, tensors, gradients, forward=forward, backward=backward)
    check(got, reference, run_truth(case, tensors, gradients), floor_of(tensors))
    return got
