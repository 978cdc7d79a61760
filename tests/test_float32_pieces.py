"""Products of float32 on a CPU's matrix unit, each element the sum of three bfloat16 (csrc/cpu/product_words.h).

The cases of test_ops run on it as on every instruction set; here is what they are too small for.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitkernels as vk
from vitkernels import ext
from vitkernels.accuracy import size_of

LONG = 1700  # terms: more than are multiplied at a time (kDepthInPieces), and the last tile is not full


@pytest.fixture(autouse=True)
def _matrix_unit(force_isa, force_library) -> None:
    force_isa("amx")
    if ext.isa() != "amx":
        pytest.skip("this processor has no matrix unit for bfloat16")
    force_library("vitkernels")


def _linear(rows: int, inputs: int, outputs: int) -> list[Tensor]:
    return [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, outputs)]


def _run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    with vk.use("ext"), vk.record() as calls:
        y = vk.ops.linear(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy)
    assert [call.backend for call in calls] == ["ext", "ext"]
    return [y.detach(), *gradients]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(140, LONG, 230), (LONG, 390, 400), (270, 230, LONG), (300, 769, 270), (33, 31, 17)],
    ids=str,
)
@pytest.mark.parametrize(("spread", "factor"), [(0, 1.1), (20, 2)], ids=["alike", "2^-20 to 2^20"])
def test_as_accurate_as_float32(rows: int, inputs: int, outputs: int, spread: int, factor: float, force_isa) -> None:
    """The error is that of torch's own product; where few terms decide, it is theirs and a matter of luck."""
    tensors = _linear(rows, inputs, outputs)
    tensors = [each * torch.exp2(spread * (2 * torch.rand_like(each) - 1)) for each in tensors]
    x, weight, bias, dy = tensors
    wide = [each.double() for each in tensors]
    truth = [wide[0] @ wide[1].t() + wide[2], wide[3] @ wide[1], wide[3].t() @ wide[0]]
    own = [torch.addmm(bias, x, weight.t()), dy @ weight, dy.t() @ x]
    split = _run(*tensors)
    force_isa("avx512_bf16")
    assert not any(map(torch.equal, split[:3], _run(*tensors)[:3])), "float32's own products have other last bits"
    for name, got, exact, plain in zip(("y", "dx", "dweight"), split, truth, own, strict=False):
        error, allowed = size_of(got.double() - exact), size_of(plain.double() - exact)
        assert error.rms <= factor * allowed.rms, (name, error, allowed)


def test_small_pieces_are_not_lost() -> None:
    """Products of the last pieces show where the first ones cancel."""
    x = torch.cat([torch.ones(40, 32), -torch.ones(40, 32)], dim=1)
    weight = 1 + torch.randn(48, 64) * 2**-12
    y, *_ = _run(x, weight, torch.zeros(48), torch.zeros(40, 48))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=0, atol=64 * 2**-24)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max])
def test_what_has_no_pieces(value: float, force_isa) -> None:
    """Infinities, NaN and what bfloat16 would round to infinity count as they do in float32, element for element."""
    x, weight, bias, dy = _linear(70, 96, 80)
    weight = weight.bfloat16().float()  # its other pieces are zeros, and zero times infinity is none
    x[3, 5] = dy[7, 11] = value
    split = _run(x, weight, bias, dy)
    force_isa("avx512_bf16")
    for got, plain in zip(split, _run(x, weight, bias, dy), strict=True):
        assert torch.equal(got.isnan(), plain.isnan())
        assert torch.equal(got.isinf(), plain.isinf())
        torch.testing.assert_close(got, plain, equal_nan=True)


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "glu_mlp"])
def test_activations_written_as_pieces(gated: bool) -> None:
    """Backward writes what is activated in the order in which the weight's gradient reads it: over many tokens, too."""
    x, dy = torch.randn(LONG, 148), torch.randn(LONG, 390)
    w1, b1 = torch.randn(400 * (2 if gated else 1), 148) / 12, torch.randn(400 * (2 if gated else 1))
    weights = [w1, b1, torch.randn(390, 400) / 20, torch.randn(390)]
    op = vk.ops.glu_mlp if gated else vk.ops.mlp

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.detach().to(dtype, copy=True).requires_grad_() for each in (x, *weights)]
        with vk.use(backend), vk.record() as calls:
            found = torch.autograd.grad(op(*leaves, activation="gelu"), leaves, dy.to(dtype))
        assert [call.backend for call in calls] == [backend, backend]
        return [each for each in found if each.dim() == 2]  # biases' are sums of columns

    truth = gradients("reference", torch.float64)
    plain = gradients("reference", torch.float32)
    for got, own, exact in zip(gradients("ext", torch.float32), plain, truth, strict=True):
        assert size_of(got.double() - exact).rms <= 1.2 * size_of(own.double() - exact).rms


def test_the_same_for_any_number_of_threads() -> None:
    tensors = _linear(700, 800, 330)
    alone = _run(*tensors)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(alone, _run(*tensors), strict=True))


def test_what_is_copied_often_is_torchs(force_library) -> None:
    """Where an element that is copied in pieces has few multiplications, torch multiplies: the bits are its own."""
    tensors = _linear(1600, 192, 192)
    found = _run(*tensors)
    force_library("torch")
    plain = _run(*tensors)
    assert not torch.equal(found[0], plain[0])  # of 1,600 rows the forward product pays
    assert torch.equal(found[2], plain[2])  # of 192 columns the weight's gradient does not


def test_a_row_depends_on_itself_alone() -> None:
    x, weight, bias, dy = _linear(400, 500, 130)
    assert torch.equal(_run(x, weight, bias, dy)[0][:333], _run(x[:333], weight, bias, dy[:333])[0])
