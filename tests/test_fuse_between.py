"""Weights that change between a forward pass and its backward pass: gradients are those that stock gives."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import fused
import pytest
import torch
from timm_vit import OPS, images, timm, vit
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import vitkernels as vk

autocasts = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def _write(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def _put(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def _nothing(model: nn.Module) -> None:
    pass


def gradients(model: nn.Module, x: Tensor, call: Any, change: Any, autocast: bool, backward: Any = None) -> Any:
    """Of every parameter, after some calls that leave tapes behind; and the kernels that the last call ran."""
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = model(x)
        result.float().square().sum().backward()
    model.zero_grad()
    with vk.record() as calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = call(model, x)
        loss = result.float().square().sum()
        change(model)
        with backward or contextlib.nullcontext():
            loss.backward()
    return {name: each.grad for name, each in model.named_parameters()}, calls


def check(call: Any, change: Any, autocast: bool, backward: Any = None, build: Any = None, ops: Any = OPS) -> None:
    torch.manual_seed(0)
    model, x = (build or (lambda: vit(init_values=0.5)))(), images().requires_grad_()
    twin = vk.fuse(copy.deepcopy(model))
    expected, _ = gradients(model, x, call, change, autocast, backward)
    got, calls = gradients(twin, x, call, change, autocast, backward)
    assert ops <= {each.op for each in calls if each.direction == "backward"}
    if not autocast:
        fused.check_same(got, expected)
        return
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 0.05 * tensor.norm() + 1e-4, name


def _saved_as_copies(model: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        return model(x)  # type: ignore[no-any-return]


def _saved_on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)  # type: ignore[no-any-return]


def _checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]


@autocasts
@pytest.mark.parametrize(
    ("call", "change"),
    [
        (_saved_as_copies, _write),
        (_saved_as_copies, _put),
        (_saved_on_cpu, _put),
        (_checkpointed, _nothing),
        (_checkpointed, _write),
        (_checkpointed, _put),
    ],
)
def test_hooks_of_saved_tensors_give_what_they_kept(call: Any, change: Any, autocast: bool) -> None:
    check(call, change, autocast)


@pytest.mark.parametrize("rows", [0, 10**6], ids=["no copies", "copies"])
@pytest.mark.parametrize("call", [_saved_as_copies, _checkpointed])
def test_autocasts_copies_of_weights_under_hooks(call: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitkernels.ops._step.FEW_ROWS", rows)
    with vk.use("reference"):  # whose products do not round weights as they read them
        check(call, _put, True)


def test_mutation_that_autograd_allows() -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        stack.enter_context(allow_mutation_on_saved_tensors())
        return model(x)  # type: ignore[no-any-return]

    stack = contextlib.ExitStack()  # closed behind the backward pass
    check(call, _write, False, stack)


@autocasts
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", ""])
def test_what_is_put_in_a_parameters_place(scaled: bool, autocast: bool) -> None:
    """A product's gradients are of what was multiplied, a LayerScale's of the bias that was added."""
    check(lambda model, x: model(x), _put, autocast, build=lambda: vit(init_values=0.5 if scaled else None))


def test_what_is_put_in_a_parameters_place_before_a_backward_pass_under_autocast() -> None:
    check(lambda model, x: model(x), _put, True, torch.autocast("cpu", torch.bfloat16))


@autocasts
@pytest.mark.parametrize("call", [lambda model, x: model(x), _saved_as_copies, _saved_on_cpu, _checkpointed])
@pytest.mark.parametrize("part", ["attn", "mlp", "gated"])
def test_a_part_that_is_called_by_itself(part: str, call: Any, autocast: bool) -> None:
    """Its products are ops, one by one."""

    def build() -> nn.Module:
        block = vit(mlp_layer=timm.layers.GluMlp if part == "gated" else timm.layers.Mlp).blocks[0]
        return nn.Sequential(nn.Flatten(2), nn.Linear(1024, 48), block.attn if part == "attn" else block.mlp)

    ops = {"attn": {"linear", "attention_qkv"}, "mlp": {"mlp"}, "gated": {"glu_mlp"}}[part]
    check(call, _put, autocast, build=build, ops=ops)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_kind_of_call_that_came_with_tensors_first(frozen: bool) -> None:
    """A parameter's place is as good as a tensor's, whichever a kind of call came with at first."""
    model, x = vit(init_values=0.5), torch.randn(11, 3, 32, 32, requires_grad=True)
    for each in model.blocks.parameters() if frozen else ():
        each.requires_grad_(False)
    twin = vk.fuse(copy.deepcopy(model))
    tensors = {name: each.detach().clone().requires_grad_(not frozen) for name, each in model.named_parameters()}
    torch.func.functional_call(twin, tensors, x).sum().backward()
    found = []
    for each in (model, twin):
        loss = each(x).square().sum()
        _put(each)
        found.append(torch.autograd.grad(loss, [x, each.patch_embed.proj.weight]))
    torch.testing.assert_close(*reversed(found), atol=1e-4, rtol=1e-4)
