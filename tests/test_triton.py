"""The Triton kernels on the case list of every other backend: on a GPU where there is one, else interpreted on the CPU.

Interpreted (TRITON_INTERPRET=1, in a process of their own), float32 and float16 only: the interpreter's bf16 products
are silently wrong (the offline compile of `make audit` and a GPU's own run cover bf16). It shows what a kernel's text
means, which dtypes and layouts share: every plain case runs in float32, every fourth one in float16 too, but for those
of many tokens, which take most of a minute; of the layouts every fourth, in float32. `make emulate` runs each of them
compiled.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accuracy import check_case
from case import Case
from cases import CASES, FEWER
from cases_attention import HUGE_SCORES, HUGE_SCORES_QKV
from conftest import skip_without

import vitkernels as vk
from vitkernels import kernels
from vitkernels.kernels.device import Cuda, stand_in

if not torch.cuda.is_available() and not kernels.interpreting():
    # triton reads the variable when it is first imported, so it cannot be set here for this file alone
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set: make test sets it", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU what people train with first, in case the time does not suffice for all
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if DEVICE == "cuda" else (torch.float32, torch.float16)


class OneMultiprocessor(Cuda):
    """This GPU, to those who ask how many programs fill it."""

    def processors(self, device: torch.device) -> int:
        return 1


def _interpreted(number: int, case: Case, dtype: torch.dtype) -> bool:
    """Whether a case runs where kernels are interpreted, by its place in the list."""
    if "strides" in case.name:
        return dtype == torch.float32
    large = case.name.startswith(("many", "long"))
    return dtype == torch.float32 or torch.float32 not in case.dtypes or (number % 4 == 0 and not large)


def _by_turns(trials: list[tuple[Case, torch.dtype]]) -> list[tuple[Case, torch.dtype]]:
    """Of each dtype an op after the other, plain cases before layouts: whenever they end, each kernel had its share."""
    seen: Counter[tuple[str, torch.dtype, bool]] = Counter()
    places = {}
    for case, dtype in trials:
        group = (case.op, dtype, "strides" in case.name)
        places[case, dtype] = (DTYPES.index(dtype), group[2], seen[group])
        seen[group] += 1
    return sorted(trials, key=places.__getitem__)


def _product(cases: list[Case]) -> list[tuple[Case, torch.dtype]]:
    trials = [
        (case, dtype)
        for number, case in enumerate(cases)
        for dtype in DTYPES
        if case.op in kernels.PAGES and dtype in case.dtypes
        if DEVICE == "cuda" or _interpreted(number, case, dtype)
    ]
    return _by_turns(trials) if DEVICE == "cuda" else trials


@pytest.mark.parametrize(("case", "dtype"), _product(CASES if DEVICE == "cuda" else FEWER), ids=str)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    skip_without("triton")
    check_case(case, dtype, "triton", device=DEVICE)
    if DEVICE == "cuda" and case.op in ("attention", "attention_qkv"):  # few heads go to other kernels
        with stand_in(OneMultiprocessor()):
            check_case(case, dtype, "triton", device=DEVICE)


def test_a_block_whose_gradient_comes_through_a_conjugate() -> None:
    """As of Fourier filters behind it: autograd hands such gradients over with a mark, and the negative in memory."""
    skip_without("triton")
    block, x = vk.nn.Block(32, 2, init_values=0.5).to(DEVICE), torch.randn(2, 5, 32, device=DEVICE)
    wanted, found = list(block.parameters()), []
    for _ in range(3):
        for negated in (False, True):
            with vk.use("triton"), vk.record() as calls:
                result = block(x)
                gradient = torch.linspace(-1, 1, result.numel(), device=DEVICE).view_as(result)
                if negated:
                    gradient = torch.complex(torch.zeros_like(gradient), -gradient).conj().imag
                    assert gradient.is_neg()
                found.append(torch.autograd.grad(result, wanted, gradient))
            assert {call.backend for call in calls if call.direction == "backward"} == {"triton"}
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], atol=1e-5, rtol=1e-5)


def _pairs() -> list[tuple[Case, torch.dtype, str]]:
    """Cases of huge scores with another backend; on the CPU there are two, which go by turns."""
    others = ("reference", "ext") if DEVICE == "cpu" else ("reference",)
    found = _product([*HUGE_SCORES, *HUGE_SCORES_QKV])
    return [(case, dtype, others[number % len(others)]) for number, (case, dtype) in enumerate(found)]


@pytest.mark.parametrize(("case", "dtype", "other"), _pairs(), ids=str)
def test_backward_after_another_backends_forward(case: Case, dtype: torch.dtype, other: str) -> None:
    """And another's after this one's: what is kept of a row of scores means the same to all."""
    skip_without("triton")
    skip_without(other)
    check_case(case, dtype, "triton", other, device=DEVICE)
    check_case(case, dtype, other, "triton", device=DEVICE)
