"""Every op, on every case, in every dtype, on every backend: results and gradients against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from accuracy import check, check_case, floor_of, run, run_truth
from case import DTYPES, Case
from cases import CASES, FEWER, GLU_MLP_APART, PLAIN, SMALL
from conftest import BACKENDS, ISAS, skip_without

import vitkernels as vk
from vitkernels import ext
from vitkernels.products import LIBRARIES

PRODUCTS = [case for case in FEWER if case.op in ("linear", "mlp", "glu_mlp", "patch_embed")]


def _name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, (Case, torch.dtype)) else None


def _product(cases: list[Case], dtypes: tuple[torch.dtype, ...]) -> list[tuple[Case, torch.dtype]]:
    return [(case, dtype) for case in cases for dtype in dtypes if dtype in case.dtypes]


def _trials() -> list[tuple[Case, torch.dtype, str]]:
    """Every case on every backend; of the layouts some on the reference, which takes them as torch does."""
    return [
        (case, dtype, backend)
        for backend in BACKENDS
        for case, dtype in _product(FEWER if backend == "reference" else CASES, DTYPES)
    ]


@pytest.mark.parametrize(("case", "dtype", "backend"), _trials(), ids=_name, indirect=["backend"])
def test_accuracy(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_case(case, dtype, backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("case", "dtype"), _product([*PLAIN, *GLU_MLP_APART], (torch.float32, torch.bfloat16)), ids=_name
)
def test_accuracy_on_instruction_set(case: Case, dtype: torch.dtype, isa: str, force_isa, force_library) -> None:
    force_isa(isa)
    force_library("vitkernels")
    check_case(case, dtype, "ext")
    assert ext.isa() == isa


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("case", "dtype"), _product(PRODUCTS, (torch.float32, torch.bfloat16)), ids=_name)
def test_accuracy_by_library(case: Case, dtype: torch.dtype, library: str, force_library) -> None:
    force_library(library)
    check_case(case, dtype, "ext")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_accuracy_with_threads(case: Case) -> None:
    """Three threads on whatever cores there are: no part is left out or done twice where the work is split."""
    skip_without("ext")
    torch.set_num_threads(3)
    check_case(case, case.dtypes[0], "ext")


@pytest.mark.parametrize(("forward", "backward"), list(itertools.permutations(BACKENDS, 2)))
@pytest.mark.parametrize(("case", "dtype"), _product(PLAIN, (torch.float32, torch.bfloat16)), ids=_name)
def test_backward_after_another_backends_forward(case: Case, dtype: torch.dtype, forward: str, backward: str) -> None:
    skip_without(forward)
    skip_without(backward)
    check_case(case, dtype, forward, backward)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_each_gradient_alone(case: Case, backend: str) -> None:
    """With one gradient asked for, it is right and no other one is given."""
    tensors = case.build(torch.float32)
    reference = run(case, tensors, forward="reference")
    gradients = case.build_gradients({name: reference[name] for name in case.results})
    truth = run_truth(case, tensors, gradients)
    for wanted in [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]:
        alone = {
            name: tensor if tensor is None else tensor.detach().requires_grad_(name == wanted)
            for name, tensor in tensors.items()
        }
        got = run(case, alone, gradients, forward=backend)
        names = (*case.results, f"gradient of {wanted}")
        check(got, {name: reference[name] for name in names}, {name: truth[name] for name in names}, floor_of(tensors))


@pytest.mark.parametrize("case", [case for case in SMALL if "total" in case.results], ids=str)
def test_a_sum_of_frozen_terms_is_frozen(case: Case, backend: str) -> None:
    """It needs a gradient where one of its terms does, as an eager sum; the norm of it needs one in any case."""
    tensors = case.build(torch.float32)
    for wanted in [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]:
        alone = {name: tensor if tensor is None else tensor.detach() for name, tensor in tensors.items()}
        alone[wanted].requires_grad_()
        with vk.use(backend):
            outputs = case.call(alone)
        assert outputs["total"].requires_grad == (wanted not in ("weight", "bias")), wanted
        assert outputs["normed"].requires_grad, wanted


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_gradients(case: Case, mode: Callable[[], AbstractContextManager[None]], backend: str) -> None:
    """The results are the same and need nothing."""
    tensors = case.build(torch.float32)
    with_gradients = run(case, tensors, forward=backend)
    with mode(), vk.use(backend), vk.record() as calls:
        outputs = case.call(tensors)
    assert [(call.direction, call.backend) for call in calls] == [("forward", backend)]
    for name, output in outputs.items():
        assert not output.requires_grad
        torch.testing.assert_close(output, with_gradients[name])
