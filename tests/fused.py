"""What every fused model is held to, whichever library it comes from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import accuracy
import peers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitkernels as vk
from vitkernels import dispatch

Inputs = tuple[Any, ...]
FLOOR = accuracy.FLOORS[torch.float32]


def output_and_gradients(
    model: nn.Module, inputs: Inputs, keywords: Mapping[str, Any] | None = None, *, autocast: bool = False
) -> dict[str, Tensor]:
    """Every floating-point tensor that the model returns, and the gradients of a loss that weighs all their numbers."""
    floating = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        returned = model(*inputs, **(keywords or {}))
    if isinstance(returned, Mapping):  # transformers' outputs
        returned = dict(returned)
    outputs = [each for each in tree_leaves(returned) if isinstance(each, Tensor) and each.is_floating_point()]
    loss = sum(
        (each.double() * torch.linspace(-1, 1, each.numel(), dtype=torch.float64).view_as(each)).sum()
        for each in outputs
    )
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    wanted = [*named.values(), *floating]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    names = [*named, *(f"input {index}" for index in range(len(floating)))]
    found = {f"output {index}": each.detach() for index, each in enumerate(outputs)}
    return found | {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def check_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors under the same names, rounding in float32 aside."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-5, name


def wide(inputs: Inputs) -> Inputs:
    """The same inputs in float64."""
    return tuple(
        each.detach().double().requires_grad_(each.requires_grad)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in inputs
    )


def own_numbers(
    model: nn.Module, inputs: Inputs, keywords: Mapping[str, Any] | None = None, *, autocast: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a stock model gives, and what it gives in float64."""
    exact = output_and_gradients(copy.deepcopy(model).double(), wide(inputs), keywords)
    return output_and_gradients(model, inputs, keywords, autocast=autocast), exact


def served(
    model: nn.Module,
    inputs: Inputs,
    keywords: Mapping[str, Any] | None = None,
    *,
    ops: set[str],
    autocast: bool = False,
) -> dict[str, Tensor]:
    """`output_and_gradients` of a fused model; these ops must have run, forward and backward, and no others."""
    with vk.record() as calls:
        got = output_and_gradients(model, inputs, keywords, autocast=autocast)
    for direction in ("forward", "backward"):
        ran = {call.op for call in calls if call.direction == direction}
        assert ran == ops, f"{direction} ran {sorted(ran)}; needs {sorted(ops)}"
    return got


def check_parity(
    model: nn.Module,
    inputs: Inputs,
    keywords: Mapping[str, Any] | None = None,
    *,
    ops: set[str],
    autocast: bool = False,
    absolute: float | None = None,
    prepare: Callable[[nn.Module], nn.Module] = vk.fuse,
) -> vk.Explanation:
    """Fuse a model and hold it to its own numbers, by the one tolerance rule; then unfuse it and find it as it was.

    Args:
        model: stock; `peers.stir` has moved its weights off their starting values.
        inputs, keywords: of its `forward`.
        ops: the ops that must have run, forward and backward, and no others.
        autocast: under bfloat16 autocast; the model itself is float32.
        absolute: error allowed beside the rule, where gradients of 0 are made of rounding alone.
        prepare: how the model is fused.

    Returns:
        What `vk.explain` says of it.
    """
    keys, classes = list(model.state_dict()), {name: type(each) for name, each in model.named_modules()}
    identities = [id(each) for each in model.parameters()]
    own, exact = own_numbers(model, inputs, keywords, autocast=autocast)
    assert prepare(model) is model
    assert list(model.state_dict()) == keys
    assert [id(each) for each in model.parameters()] == identities
    assert all(isinstance(each, classes[name]) for name, each in model.named_modules())
    explanation = vk.explain(model)
    with vk.use(*dispatch.order("cpu")):  # named, the backends serve calls too that are too small to gain
        got = served(model, inputs, keywords, ops=ops, autocast=autocast)
    floor = accuracy.FLOORS[torch.bfloat16] if autocast else FLOOR  # what stock rounds at other places
    if absolute is not None:
        floor = dataclasses.replace(floor, absolute=absolute)
    accuracy.check(got, own, exact, floor)
    assert vk.unfuse(model) is model
    assert {name: type(each) for name, each in model.named_modules()} == classes
    assert not any("_vitkernels" in vars(each) for each in model.modules())
    again = output_and_gradients(model, inputs, keywords, autocast=autocast)
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())
    return explanation


stir = peers.stir


def nodes(output: Tensor) -> list[str]:
    """Of the graph behind it, without those that sum gradients of parameters."""
    found, left = [], [output.grad_fn]
    seen = set()
    while left:
        node = left.pop()
        if node is None or node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        found.append(type(node).__name__)
        left += [following for following, _ in node.next_functions]
    return found
