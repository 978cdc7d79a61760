"""Calls of a kind that came before go the way of before: same bits, same errors, same record (vitkernels/kinds.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels as vk
from vitkernels.kinds import remembered

CALLS = 5  # the third is noted, later ones go its way


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return vk.ops.attention(q, k, v, is_causal=True)


OPS: dict[str, tuple[Callable[..., Any], Sequence[tuple[int, ...]]]] = {
    "linear": (vk.ops.linear, ((5, 12), (8, 12), (8,))),
    "mlp": (lambda *given: vk.ops.mlp(*given, activation="silu"), ((5, 12), (16, 12), (16,), (12, 16), (12,))),
    "glu_mlp": (
        lambda x, *given: vk.ops.glu_mlp(x, *given, activation="silu"),
        ((5, 12), (16, 12), (16,), (12, 8), (12,)),
    ),
    "add_layer_norm": (vk.ops.add_layer_norm, ((2, 5, 12), (2, 5, 12), (12,), (12,))),
    "add_rms_norm": (vk.ops.add_rms_norm, ((2, 5, 12), (2, 5, 12), (12,))),
    "attention": (_attention, ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8))),
    "attention_qkv": (lambda qkv: vk.ops.attention_qkv(qkv, num_heads=2), ((2, 5, 48),)),
}


def _results(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_later_calls_give_what_the_first_gave(name: str, autocast: torch.dtype | None) -> None:
    function, shapes = OPS[name]
    leaves = _leaves(*shapes)

    def step() -> list[Tensor]:
        with (
            vk.use("ext", "reference"),
            vk.record() as calls,
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            results = _results(function(*leaves))
        grads = torch.autograd.grad(sum(each.float().sum() for each in results), leaves)
        assert [call.op for call in calls] == [name]
        return [*(each.detach() for each in results), *grads]

    first, *later = [step() for _ in range(CALLS)]
    for each in later:
        assert all(torch.equal(a, b) for a, b in zip(first, each, strict=True))
        assert [a.dtype for a in first] == [b.dtype for b in each]


def _counted(op: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """An op that is remembered, and what of its calls ran whole."""
    whole: list[Any] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        whole.append(args)
        return op(*args, **kwargs)

    return remembered(function), whole


def test_a_fourth_call_of_a_kind_goes_the_way_of_the_third() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    linear, whole = _counted(vk.ops.linear.__wrapped__)  # type: ignore[attr-defined]
    results = [linear(x, weight, None) for _ in range(CALLS)]
    assert len(whole) == 3
    assert all(torch.equal(results[0], each) for each in results)
    assert torch.equal(linear(x + 1, weight, None), vk.ops.linear(x + 1, weight, None)), (
        "it reads the call's own tensors"
    )
    assert len(whole) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda given: [given[0][:2], given[1]],
        lambda given: [given[0].double(), given[1].double()],
        lambda given: [given[0].t().contiguous().t(), given[1]],
        lambda given: [given[0].requires_grad_(), given[1]],
    ],
    ids=["shape", "dtype", "strides", "requires_grad"],
)
def test_another_kind_is_asked_anew(change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    given = [torch.randn(3, 8), torch.randn(4, 8)]
    linear, whole = _counted(vk.ops.linear.__wrapped__)  # type: ignore[attr-defined]
    for _ in range(CALLS):
        linear(*given)
    other = change(given)
    found = linear(*other)
    assert len(whole) == 4
    torch.testing.assert_close(found, torch.nn.functional.linear(*other))
    assert found.requires_grad == other[0].requires_grad


def test_state_around_a_call_is_part_of_its_kind() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    linear, whole = _counted(vk.ops.linear.__wrapped__)  # type: ignore[attr-defined]
    for _ in range(CALLS):
        linear(x, weight)
    with torch.no_grad():
        assert not linear(x, weight).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with vk.use("reference"), vk.record() as calls:
        linear(x, weight)
    assert [call.backend for call in calls] == ["reference"]
    assert len(whole) == 6
    with torch.autograd.profiler.profile() as profile:
        linear(x, weight)
    assert any("vitkernels::linear" in event.name for event in profile.function_events)


def test_two_tensors_are_not_taken_for_one() -> None:
    one, other, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(8)
    for _ in range(CALLS):
        total, _ = vk.ops.add_layer_norm(one, one, weight)
    assert torch.equal(total, 2 * one)
    total, _ = vk.ops.add_layer_norm(one, other, weight)
    assert torch.equal(total, one + other)


def test_equal_constants_of_another_type_are_checked_anew() -> None:
    qkv = torch.randn(2, 5, 24)
    for _ in range(CALLS):
        vk.ops.attention_qkv(qkv, 1)
    with pytest.raises(ValueError, match="num_heads"):
        vk.ops.attention_qkv(qkv, True)


@pytest.mark.parametrize("learns", [False, True])
def test_a_scale_that_is_a_tensor_is_read_at_each_call(learns: bool) -> None:
    qkv, scale = torch.randn(2, 5, 24, requires_grad=learns), torch.tensor(0.5)
    for value in (0.5, 0.5, 0.5, 0.5, 2.0):
        scale.fill_(value)
        found = vk.ops.attention_qkv(qkv, 2, scale=scale)  # type: ignore[arg-type]
        assert torch.equal(found, vk.ops.attention_qkv(qkv, 2, scale=value))


def test_an_object_that_gives_a_number_is_asked_at_each_call() -> None:
    class Scale:
        value = 0.5

        def __float__(self) -> float:
            return self.value

    qkv, scale = torch.randn(2, 5, 24), Scale()
    for _ in range(CALLS):
        vk.ops.attention_qkv(qkv, 2, scale=scale)  # type: ignore[arg-type]
    Scale.value = 2.0
    found = vk.ops.attention_qkv(qkv, 2, scale=scale)  # type: ignore[arg-type]
    assert torch.equal(found, vk.ops.attention_qkv(qkv, 2, scale=2.0))


def test_weights_in_a_tuple_are_not_held() -> None:
    x, gate, up, down = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    held = weakref.ref(gate)
    for _ in range(CALLS):
        vk.ops.glu_mlp(x, (gate, up), None, down, None)
    del gate
    gc.collect()
    assert held() is None


def test_what_is_made_of_a_tensor_is_made_of_each_calls_own() -> None:
    """A function that does more to its tensors than casts is never taken by a shorter way."""
    weight = torch.randn(4, 8)
    doubled, whole = _counted(lambda x, weight: vk.ops.linear.__wrapped__(x * 2, weight))  # type: ignore[attr-defined]
    for _ in range(CALLS):
        x = torch.randn(3, 8)
        torch.testing.assert_close(doubled(x, weight), 2 * x @ weight.t())
    assert len(whole) == CALLS


def test_a_backward_pass_asks_whom_its_forward_pass_asked() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    for _ in range(CALLS):
        with vk.record() as calls:
            with vk.dispatch.scope(("reference",)):
                y = vk.ops.linear(x, weight)
            y.sum().backward()
        assert [call.backend for call in calls] == ["reference"] * 2


def test_an_error_in_a_call_leaves_later_ones_alone() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    for _ in range(CALLS):
        with pytest.raises(ValueError, match="weight"):
            vk.ops.linear(x, weight.t())
        assert vk.ops.linear(x, weight).shape == (3, 4)
