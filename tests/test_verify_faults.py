"""vk.verify finds what is wrong and names it, against a float64 run or, where there is none, the stock model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm_vit import images, vit
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.fuse import memory, rules
from vitkernels.fuse.swap import Fused


class Dense(nn.Linear):
    """A Linear of a library of its own, with a parameter that nothing depends on."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.01


class Planted(Fused):
    """Stands for Dense; `fault` is what is wrong."""

    fault: Callable[[Any, Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return type(self).fault(self, input)

    def parts(self) -> list[Any]:
        return []


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any, Tensor], Tensor]], nn.Module]]:
    """A function from what a fused Dense computes to a model of three of them, the second of which fuse knows."""

    class Other(nn.Linear):
        pass

    rule = rules.Rule(Planted, frozenset({f"{Dense.__module__}.Dense"}), lambda module: None)
    known = rules.all_rules()
    monkeypatch.setattr(rules, "all_rules", lambda: (*known, rule))

    def build(fault: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        monkeypatch.setattr(Planted, "fault", staticmethod(fault), raising=False)
        return nn.Sequential(Other(8, 8), Dense(8, 8), nn.GELU(), Other(8, 4))

    return build


WEIGHTS = {f"gradient of {index}.{name}" for index in (0, 1, 3) for name in ("weight", "bias")}
FAULTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "a weight's gradient, by 1 %": (
        lambda own, x: vk.ops.linear(x, _Scaled.apply(own.weight), own.bias),
        {"gradient of 1.weight"},
    ),
    "an input's gradient, by 1 %": (
        lambda own, x: vk.ops.linear(_Scaled.apply(x), own.weight, own.bias),
        {"gradient of 0.weight", "gradient of 0.bias"},
    ),
    "no gradient": (lambda own, x: vk.ops.linear(x, own.weight, own.bias.detach()), {"gradient of 1.bias"}),
    "the output, by 0.1 %": (
        lambda own, x: vk.ops.linear(x, own.weight, own.bias) * 1.001,
        {"output", *WEIGHTS} - {"gradient of 3.bias"},
    ),
    "NaN": (
        lambda own, x: vk.ops.linear(x, own.weight, own.bias) * torch.nan,
        {"output", *WEIGHTS} - {"gradient of 3.bias"},
    ),
}


@pytest.mark.parametrize("wide", [True, False], ids=["against float64", "against the stock model"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(
    fault: str, wide: bool, plant: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not wide:
        monkeypatch.setattr(memory, "available", lambda: 0)
    wrong, expected = FAULTS[fault]
    model = plant(wrong)
    found = vk.verify(model, torch.randn(5, 8))
    assert found.truth == ("float64" if wide else "the stock model")
    assert not found.ok
    assert {row.name for row in found.broken} == expected
    assert {row.name for row in found.worst[: len(expected)]} == expected
    lines = str(found).splitlines()
    assert all(any(line.startswith(f"{name} ") and line.endswith("FAILED") for line in lines) for name in expected)
    assert lines[-1].startswith(f"FAILED: {len(expected)} of 7 tensors differ")
    assert not any(isinstance(each, Fused) for each in model.modules())


def test_the_same_model_without_a_fault_passes(plant: Callable[..., nn.Module]) -> None:
    found = vk.verify(plant(lambda own, x: vk.ops.linear(x, own.weight, own.bias)), torch.randn(5, 8))
    assert found.ok, found


def test_other_random_numbers_are_said(plant: Callable[..., nn.Module]) -> None:
    model = plant(lambda own, x: vk.ops.linear(x + 0 * torch.rand(1), own.weight, own.bias))
    assert "fused, the model draws other random numbers than stock" in vk.verify(model, torch.randn(5, 8)).notes


def test_another_dtype_is_said(plant: Callable[..., nn.Module]) -> None:
    model = plant(lambda own, x: vk.ops.linear(x, own.weight, own.bias).double())[:2]
    assert (
        "output is torch.float64 [5, 8] fused, and torch.float32 [5, 8] stock"
        in vk.verify(model, torch.randn(5, 8)).notes
    )


def test_what_only_the_fused_model_raises_is_an_answer(plant: Callable[..., nn.Module]) -> None:
    def fail(own: Any, x: Tensor) -> Tensor:
        raise vk.BackendError("no backend")

    model = plant(fail)
    found = vk.verify(model, torch.randn(5, 8))
    assert not found.ok
    assert found.failure == "BackendError: no backend"
    assert str(found).endswith("FAILED: the stock model runs, and the fused one raised BackendError: no backend")
    assert type(model[1]) is Dense


# --------------------------------------------------------------------------------------------- None is no zeros


@pytest.fixture(params=[True, False], ids=["against float64", "against the stock model"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(memory, "available", lambda: 0)
    return request.param


def test_zeros_for_a_gradient_where_stock_has_none(plant: Callable[..., nn.Module], wide: bool) -> None:
    model = plant(lambda own, x: vk.ops.linear(x, own.weight, own.bias) + 0 * own.spare.sum())
    found = vk.verify(model, torch.randn(5, 8))
    assert not found.ok
    assert [row.name for row in found.broken] == ["gradient of 1.spare"]
    assert found.worst[0].name == "gradient of 1.spare"
    assert "stock alone, the gradient is None of 1 parameters and inputs, as 1.spare" in found.notes
    assert str(found).splitlines()[-1].startswith("FAILED: 1 of 8 tensors differ")
    assert found.to_dict()["ok"] is False


def test_no_gradient_where_stock_has_zeros(plant: Callable[..., nn.Module], wide: bool) -> None:
    model = plant(lambda own, x: vk.ops.linear(x, own.weight, own.bias.detach()))
    found = vk.verify(model, torch.randn(5, 8), loss=lambda output: (output * 0).sum())
    assert not found.ok
    assert [row.name for row in found.broken] == ["gradient of 1.bias"]
    assert "fused alone, the gradient is None of 1 parameters and inputs, as 1.bias" in found.notes


def test_none_in_both_is_no_row(plant: Callable[..., nn.Module], wide: bool) -> None:
    found = vk.verify(plant(lambda own, x: vk.ops.linear(x, own.weight, own.bias)), torch.randn(5, 8))
    assert found.ok
    assert "gradient of 1.spare" not in {row.name for row in found.rows}
    assert not [note for note in found.notes if "None" in note]


def test_an_output_of_zeros_that_stock_does_not_have(plant: Callable[..., nn.Module], wide: bool) -> None:
    model = plant(lambda own, x: (vk.ops.linear(x, own.weight, own.bias), torch.zeros(3)))[1]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = model

        def forward(self, x: Tensor) -> Any:
            found = self.dense(x)
            return found if isinstance(found, tuple) else (found,)

    found = vk.verify(Pair(), torch.randn(5, 8))
    assert [row.name for row in found.broken] == ["output[1]"]


# ------------------------------------------------------------------------------------------ what is not a comparison


NOTHING = "FAILED: nothing was verified: no output holds a finite number"


def _sound(own: Any, x: Tensor) -> Tensor:
    return vk.ops.linear(x, own.weight, own.bias)


@pytest.mark.parametrize("value", [math.nan, math.inf, None], ids=["NaN", "infinite", "empty"])
def test_a_batch_that_says_nothing(plant: Callable[..., nn.Module], wide: bool, value: float | None) -> None:
    batch = torch.randn(0, 8) if value is None else torch.full((5, 8), value)
    found = vk.verify(plant(_sound), batch)
    assert found.ran, "fused ops did run"
    assert not found.broken
    assert not found.ok
    assert found.to_dict()["ok"] is False
    assert str(found).splitlines()[-1].startswith(NOTHING)
    assert any(note.endswith("hold no finite number, and were compared as nothing, as output") for note in found.notes)


def test_a_real_model_on_a_batch_that_says_nothing(wide: bool) -> None:
    for batch in (images(2) * torch.nan, images(0)):
        found = vk.verify(vit(), batch)
        assert found.ran
        assert not found.ok
        assert str(found).splitlines()[-1].startswith(NOTHING)


def test_some_numbers_are_enough(plant: Callable[..., nn.Module], wide: bool) -> None:
    """One sample of NaN: the others' outputs are compared; most gradients, sums over the batch, say nothing."""
    batch = torch.randn(5, 8)
    batch[2, 3] = torch.nan
    found = vk.verify(plant(_sound), batch)
    assert found.ok, found
    void = [row.name for row in found.rows if not row.compared]
    assert set(void) == WEIGHTS - {"gradient of 3.bias"}
    assert f"5 outputs and gradients hold no finite number, and were compared as nothing, as {void[0]}" in found.notes
    assert str(found).splitlines()[-1].startswith("ok: 2 outputs and gradients differ from ")


def test_a_fault_beside_numbers_that_say_nothing_is_caught(plant: Callable[..., nn.Module], wide: bool) -> None:
    batch = torch.randn(5, 8)
    batch[2, 3] = torch.nan
    found = vk.verify(plant(lambda own, x: _sound(own, x) * 1.001), batch)
    assert [row.name for row in found.broken][:1] == ["output"]


@pytest.mark.parametrize("fault", [1.0, 1.01], ids=["sound", "by 1 %"])
def test_what_overflows_in_both_does_not_hide_the_rest(plant: Callable[..., nn.Module], fault: float) -> None:
    """In half precision, where float64 does not overflow: an infinite error of stock's would allow any."""
    model = plant(lambda own, x: _sound(own, x) * fault)[1:2].half()
    batch = torch.randn(5, 8).half()
    batch[0] = 6e4 * model[0].weight[0].sign()
    found = vk.verify(model, batch, loss=lambda output: output[1:].float().sum())
    (row,) = (row for row in found.rows if row.name == "output")
    assert 0 < row.compared < 40
    assert found.ok == (fault == 1.0), found
    assert row.ok == (fault == 1.0)


# -------------------------------------------------------------------------------------------------- what is the truth


class Noisy(nn.Module):
    """Draws random numbers in the dtype of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, image: Tensor) -> Tensor:
        return self.vit(image * torch.rand(image.shape[0], 1, 1, 1, dtype=image.dtype))


class Typed(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, image: Tensor) -> Tensor:
        return self.vit(image.float())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Noisy, "it draws random numbers that are others in float64"),
        (Typed, "the float64 run raised RuntimeError: "),
    ],
)
def test_without_float64_the_stock_model_is_the_truth(kind: type[nn.Module], reason: str) -> None:
    found = vk.verify(kind(), images(2))
    assert found.ok, found
    assert found.truth == "the stock model"
    assert all(row.own is None for row in found.rows)
    assert any(note.startswith(f"compared with the stock model alone: {reason}") for note in found.notes)
    assert str(found).endswith("differ from the stock model by no more than rounding")


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    found = vk.verify(vit(), images(2))
    assert found.ok
    assert any("a float64 run needs about 0.0 GiB, and 0.0 GiB are free" in note for note in found.notes)


def test_numbers_kept_for_backward_are_counted_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with memory.counting_saved() as saved:
        y = x.exp()  # keeps y
        y.sin()  # keeps y again
    assert sum(saved.values()) == 1000
