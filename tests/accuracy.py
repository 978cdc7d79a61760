"""Holds what a backend computes to the one tolerance rule, `vitkernels.accuracy`.

Truth is the reference backend in float64 on the same numbers; plain torch is the reference in the dtype under test
(it computes in float32 or float64 and rounds once). The rule holds for results and for every gradient alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from case import Case
from torch import Tensor

import vitkernels as vk
from vitkernels.accuracy import FLOORS, KINDS, Floor, Size, allowed, size_of

__all__ = ["FLOORS", "Floor", "Size", "check", "check_case", "floor_of", "in_float64", "run", "run_truth", "size_of"]


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
    broken: list[str] = []
    for name, exact in truth.items():
        tensor = got[name]
        assert tensor.shape == exact.shape, f"{name} has shape {list(tensor.shape)}; needs {list(exact.shape)}"
        assert tensor.dtype == reference[name].dtype, f"{name} is {tensor.dtype}; needs {reference[name].dtype}"
        size = size_of(exact)
        error, own = size_of(tensor.double() - exact), size_of(reference[name].double() - exact)
        limit = allowed(own, size, floor)
        broken += [
            f"{name}: {kind} error {getattr(error, kind):.3g}, allowed {getattr(limit, kind):.3g}, "
            f"truth's own is {getattr(size, kind):.3g}"
            for kind in KINDS
            if not getattr(error, kind) <= getattr(limit, kind)  # also where the error is NaN
        ]
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
            asked = [name for name in gradients if outputs[name].requires_grad]
            roots, arrived = [outputs[name] for name in asked], [gradients[name] for name in asked]
            grads = torch.autograd.grad(roots, list(leaves.values()), arrived, allow_unused=True)
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
