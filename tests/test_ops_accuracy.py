"""The tolerance rule must catch what is wrong and let pass what is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import FLOORS, Floor, check, check_case, floor_of, run, run_truth
from case import Case
from cases import ADD_LAYER_NORM, ATTENTION, LINEAR, MLP, PATCH_EMBED
from torch import Tensor

from vitkernels import dispatch

PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "1 % too large": lambda value: value * 1.01,
    "1 % too small": lambda value: value * 0.99,
    "wrong sign": torch.neg,
    "all zero": torch.zeros_like,
    "a constant added": lambda value: value + 0.02 * value.abs().max(),
    "last row not written": lambda value: torch.cat([value[:-1], torch.full_like(value[-1:], math.nan)]),
    "last row zero": lambda value: torch.cat([value[:-1], torch.zeros_like(value[-1:])]),
    "one infinite element": lambda value: value.index_fill(-1, torch.tensor([0]), math.inf),
    "elements in another order": lambda value: value.flatten().roll(1).view_as(value),
}

_BASE = {
    "linear": LINEAR[1],
    "patch_embed": next(case for case in PATCH_EMBED if case.name == "prefix, positions of all"),
    "attention": next(case for case in ATTENTION if case.name == "relative position bias"),
    "add_layer_norm": next(case for case in ADD_LAYER_NORM if case.name == "many rows"),
    "mlp": MLP[1],
}


def _computed(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = case.build(dtype)
    reference = run(case, tensors, forward="reference")
    gradients = case.build_gradients({name: reference[name] for name in case.results})
    return reference, run_truth(case, tensors, gradients)


def _complaint(got: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor], floor: Floor) -> str:
    try:
        check(got, reference, truth, floor)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("dtype", FLOORS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", _BASE)
def test_planted_error_is_caught(op: str, dtype: torch.dtype) -> None:
    reference, truth = _computed(_BASE[op], dtype)
    floor = FLOORS[dtype]
    assert not _complaint(reference, reference, truth, floor)
    missed = [
        f"{name}: {plant}"
        for name in truth
        for plant, spoil in PLANTED.items()
        if not _complaint(reference | {name: spoil(reference[name])}, reference, truth, floor).startswith(f"{name}: ")
    ]
    assert not missed


def test_less_precise_arithmetic_is_caught() -> None:
    """float32 inside a float64 op; bfloat16 inside a float32 one."""
    for dtype, inside in ((torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
        reference, truth = _computed(_BASE["mlp"], dtype)
        rounded = {name: value.to(inside).to(dtype) for name, value in reference.items()}
        with pytest.raises(AssertionError, match="out: worst error"):
            check(rounded, reference, truth, FLOORS[dtype])


@pytest.mark.parametrize("op", ["linear", "mlp", "patch_embed"])
def test_forgotten_bias_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with a backend that forgets an argument, as `check_case` sees it."""
    case = _BASE[op]
    registered = dispatch.OPS[op]
    good = registered.implementations["reference"]
    position = {"linear": 2, "mlp": 2, "patch_embed": 2}[op]

    def forgetful(*args):
        return good.forward(*args[:position], None, *args[position + 1 :])

    bad = dispatch.Implementation(forgetful, good.backward, lambda direction, args: None)
    monkeypatch.setitem(registered.implementations, "triton", bad)
    monkeypatch.setattr(dispatch, "why_not", lambda backend: None)
    with pytest.raises(AssertionError, match="out: worst error"):
        check_case(case, torch.float32, "triton")


def test_wrong_shape_dtype_or_name_is_caught() -> None:
    reference, truth = _computed(_BASE["linear"], torch.float32)
    floor = FLOORS[torch.float32]
    with pytest.raises(AssertionError, match="out has shape"):
        check(reference | {"out": reference["out"][:1]}, reference, truth, floor)
    with pytest.raises(AssertionError, match=r"out is torch\.float64; needs torch\.float32"):
        check(reference | {"out": reference["out"].double()}, reference, truth, floor)
    with pytest.raises(AssertionError, match="needs"):
        check({"out": reference["out"]}, reference, truth, floor)


def test_another_order_of_summation_passes() -> None:
    case = LINEAR[-1]
    tensors = case.build(torch.float32)
    reference, truth = _computed(case, torch.float32)
    x, weight = (tensors[name].detach() for name in ("x", "weight"))
    halves = (x[..., 1::2] @ weight[:, 1::2].t()) + (x[..., ::2] @ weight[:, ::2].t()) + tensors["bias"].detach()
    check(reference | {"out": halves}, reference, truth, floor_of(tensors))


def test_one_more_rounding_in_bfloat16_passes() -> None:
    case = MLP[0]
    tensors = case.build(torch.bfloat16)
    reference, truth = _computed(case, torch.bfloat16)
    x, w1, b1, w2, b2 = (tensor.detach().float() for tensor in tensors.values())
    activated = torch.nn.functional.gelu(x @ w1.t() + b1).bfloat16().float()
    check(reference | {"out": (activated @ w2.t() + b2).bfloat16()}, reference, truth, floor_of(tensors))


def test_floor_is_that_of_the_coarsest_dtype() -> None:
    mixed = {"x": torch.zeros(1), "branch": torch.zeros(1, dtype=torch.bfloat16), "bias": None}
    assert floor_of(mixed) is FLOORS[torch.bfloat16]
    assert floor_of({"image": torch.zeros(1, dtype=torch.uint8), "weight": torch.zeros(1)}) is FLOORS[torch.float32]
