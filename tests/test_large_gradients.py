"""Gradients of weights so large that the extension writes them past the caches (csrc/cpu/own_product.cpp)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import check_case
from cases import linear
from conftest import ISAS, skip_without
from torch import Tensor

from vitkernels.ops._amp import CODES

EXT = torch.ops.vitkernels_ext


@pytest.fixture(autouse=True)
def _needs_the_extension() -> None:
    skip_without("ext")


# rows of x: of few terms, of some, and of so many that they are summed in several passes; inputs: whole lines of the
# cache that end within a panel, and rows that do not begin at a line
@pytest.mark.parametrize("inputs", [528, 515])
@pytest.mark.parametrize("rows", [7, 98, 1700])
@pytest.mark.parametrize("isa", ISAS)
def test_as_accurate_as_small_ones(
    force_isa: Callable[[str], None], force_library: Callable[[str], None], isa: str, rows: int, inputs: int
) -> None:
    force_isa(isa)
    force_library("vitkernels")
    for dtype in (torch.float32, torch.bfloat16):
        check_case(linear(f"{rows} rows, {inputs} to 600", (rows,), inputs, 600), dtype, "ext")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize("isa", [each for each in ISAS if each != "amx"])  # there small ones are multiplied otherwise
def test_the_bits_of_small_ones(
    force_isa: Callable[[str], None], force_library: Callable[[str], None], isa: str, rows: int, dtype: torch.dtype
) -> None:
    """Of a weight in float32, from rows in either dtype: some of its rows alone are a gradient that stays in cache."""
    force_isa(isa)
    force_library("vitkernels")
    x, dy, weight = torch.randn(rows, 528).to(dtype), torch.randn(rows, 600).to(dtype), torch.randn(600, 528)
    _, whole, _ = EXT.linear_backward(dy, x, weight, [False, True, False])
    _, some, _ = EXT.linear_backward(dy[:, :60].contiguous(), x, weight[:60], [False, True, False])
    assert whole.dtype == torch.float32
    assert torch.equal(whole[:60], some)


@pytest.mark.parametrize(
    ("rows_dtype", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=["of float32 in bfloat16", "of bfloat16 in float16", "of bfloat16 in float32"],
)
@pytest.mark.parametrize("op", ["mlp", "glu_mlp"])
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_are_cast_to_what_is_asked_for(
    force_isa: Callable[[str], None],
    force_library: Callable[[str], None],
    isa: str,
    op: str,
    rows_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """Also that of the last weight, whose right side the activation has written as the product reads it: parameters of
    float16 under bfloat16's autocast have it so."""
    force_isa(isa)
    force_library("vitkernels")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(rows_dtype)

    dy, x, w1, w2 = draw(300, 96), draw(300, 96), draw(128, 96), draw(96, 128)
    if op == "mlp":
        given = dy, x, draw(300, 128), w1, w2, "gelu", [True] * 5
        found, own = (EXT.mlp_backward(*given, code) for code in (CODES[dtype], 0))
    else:
        glu = dy, x, draw(300, 256), w1, draw(128, 96), w2, "silu", [True] * 7
        found, own = (EXT.glu_mlp_backward(*glu, code) for code in (CODES[dtype], 0))
    assert torch.equal(found[0], own[0])
    for got, expected in zip(found[1:], own[1:], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), rtol=1e-2, atol=1e-2)
