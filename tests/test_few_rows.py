"""Products of few rows, which read a weight where it lies, and weights that a kernel rounds as it reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_case
from case import Case, T
from cases import glu_mlp, linear, mlp
from conftest import ISAS, skip_without
from torch import Tensor

from vitkernels import dispatch, products
from vitkernels.ops._amp import CODES
from vitkernels.ops.mlp import ACTIVATIONS

EXT = torch.ops.vitkernels_ext
HALVES = (torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 16, 17)
# features read and written; of the last, gradients fill vectors and no panel, on one instruction set or another
SIZES = ((1, 1), (5, 3), (33, 65), (64, 64), (70, 131), (192, 48), (48, 33), (24, 7), (12, 70))
WEIGHTS = ("contiguous", "transposed", "columns", "offset", "expanded", "sliced")
GRADIENTS = ("contiguous", "sliced", "transposed", "expanded everywhere")


@pytest.fixture(autouse=True)
def _needs_the_extension() -> None:
    skip_without("ext")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_few_rows_and_odd_sizes(force_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    force_isa(isa)
    for rows, (inner, outer) in itertools.product(ROWS, SIZES):
        check_case(linear(f"{rows} rows, {inner} to {outer}", (rows,), inner, outer), dtype, "ext")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_few_rows_and_activations(force_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    force_isa(isa)
    for rows, activation in itertools.product((1, 5, 16), ACTIVATIONS):
        options, sizes = {"activation": activation}, (33, 71, 20)
        for op, biases in ((mlp, ("b1", "b2")), (glu_mlp, ("b_gate_up", "b_down"))):
            for present in (biases, ()):
                case = op(f"{rows} rows", (rows,), sizes, biases=present, options=options)
                check_case(case, dtype, "ext")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", WEIGHTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_few_rows_and_strides(weight: str, rows: str, dtype: torch.dtype) -> None:
    for grad in GRADIENTS:
        tensors = {"x": T((2, 3, 37), layout=rows), "weight": T((70, 37), gain=0.2, layout=weight), "bias": T((70,))}
        check_case(Case("linear", f"{weight}, {rows}, {grad}", tensors, grad_layout=grad), dtype, "ext")


def _drawn(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w1, b1, w2, b2 and dy: weights in float32, what they are multiplied with in `dtype`."""
    shapes = ((rows, 70), (131, 70), (131,), (70, 131), (70,), (rows, 70))
    return tuple(
        torch.randn(shape).to(dtype if index in (0, 5) else torch.float32) for index, shape in enumerate(shapes)
    )


def _linear(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dy: Tensor, grad_dtype: int = 0
) -> tuple[Tensor, ...]:
    y = EXT.linear(x, w1, b1)
    return y, EXT.linear(x, w1.t().contiguous().t(), None), *EXT.linear_backward(y, x, w1, [True] * 3, grad_dtype)


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dy: Tensor, grad_dtype: int = 0
) -> tuple[Tensor, ...]:
    y, pre = EXT.mlp(x, w1, b1, w2, b2, "gelu", True)
    alone, _ = EXT.mlp(x, w1, b1, w2, b2, "gelu", False)
    return y, pre, alone, *EXT.mlp_backward(dy, x, pre, w1, w2, "gelu", [True] * 5, grad_dtype)


def _glu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dy: Tensor, grad_dtype: int = 0
) -> tuple[Tensor, ...]:
    w1, b1, w2 = w1[:-1].contiguous(), b1[:-1].contiguous(), w2[:, :65].contiguous()
    (w_gate, w_up), (b_gate, b_up) = w1.chunk(2), b1.chunk(2)
    y, pre = EXT.glu_mlp(x, w1, b1, None, None, w2, b2, "silu", True)
    alone, _ = EXT.glu_mlp(x, w_gate, b_gate, w_up, b_up, w2, b2, "silu", False)
    assert torch.equal(alone, y)
    return y, pre, alone, *EXT.glu_mlp_backward(dy, x, pre, w_gate, w_up, w2, "silu", [True] * 7, grad_dtype)


@pytest.mark.parametrize("rows", [3, 16, 40, 300, 3300])  # the last are summed in several passes
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("library", products.LIBRARIES)
@pytest.mark.parametrize("op", [_linear, _mlp, _glu_mlp])
def test_weights_in_float32_are_rounded_as_a_cast_rounds_them(
    force_library: Callable[[str], None], op: Callable[..., Any], library: str, dtype: torch.dtype, rows: int
) -> None:
    """And their gradients come in float32, with the values that a gradient in the narrow dtype has."""
    assert dispatch.OPS[op.__name__[1:]].implementations["ext"].rounds_weights
    force_library(library)
    x, *weights, dy = _drawn(rows, dtype)
    got = op(x, *weights, dy)
    copies = [weight.to(dtype) for weight in weights]
    cast, wide = op(x, *copies, dy), op(x, *copies, dy, grad_dtype=CODES[torch.float32])
    narrow = 2 if op is _linear else 3  # results before the gradients; the gradient of x is one too
    assert [each.dtype for each in got] == [*[dtype] * (narrow + 1), *[torch.float32] * (len(got) - narrow - 1)]
    for mine, theirs, widened in zip(got, cast, wide, strict=True):
        assert theirs.dtype == dtype
        assert torch.equal(mine.to(torch.float32), theirs.to(torch.float32))
        assert widened.dtype == mine.dtype
        assert torch.equal(widened, mine)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_rounds_weights_so(force_isa, force_library, isa: str) -> None:
    force_isa(isa)
    force_library("vitkernels")
    for rows in (5, 40):
        x, *weights, dy = _drawn(rows, torch.bfloat16)
        for mine, theirs in zip(
            _mlp(x, *weights, dy), _mlp(x, *(weight.bfloat16() for weight in weights), dy), strict=True
        ):
            assert torch.equal(mine.float(), theirs.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, w1, w2 = (torch.randn(shape).to(dtype) for shape in ((7, 192), (1000, 192), (192, 1000)))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, pre = EXT.mlp(x, w1, None, w2, None, "gelu", True)
        results.append((y, pre, *EXT.mlp_backward(x, x, pre, w1, w2, "gelu", [True] * 5)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_the_same_among_others(force_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    """Few rows are multiplied by the same kernel whatever library multiplies many, a row alone as one of several."""
    force_isa(isa)
    x, weight = torch.randn(7, 70).to(dtype), torch.randn(131, 70).to(dtype)
    all_rows = EXT.linear(x, weight, None)
    for rows in (1, 2, 3, 5):
        assert torch.equal(EXT.linear(x[:rows], weight, None), all_rows[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_are_the_extensions_own_whatever_the_library(force_library, dtype: torch.dtype) -> None:
    x, *weights, dy = _drawn(4, dtype)
    weights = [weight.to(dtype) for weight in weights]
    results = []
    for library in products.LIBRARIES:
        force_library(library)
        results.append(_mlp(x, *weights, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
