"""What a fused block reads of its parts at each call: modes, factors, weights made at each look, what nobody reads."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from timm_vit import images, vit
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitkernels as vk


def check(change: Callable[[Any], object]) -> tuple[nn.Module, list[vk.Call]]:
    """A model fused and then changed computes, draws and counts as the stock one that is changed so."""
    torch.manual_seed(0)
    stock = vit().train()
    model = vk.fuse(copy.deepcopy(stock))
    results, states = [], []
    with vk.record() as calls:
        for each in (stock, model):
            change(each)
            torch.manual_seed(1)
            results.append(fused.output_and_gradients(each, (images(),)))
            states.append(torch.get_rng_state())
    fused.check_same(results[1], results[0])
    assert torch.equal(*states), "as many draws"
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, stock.get_buffer(name))
    return model, calls


def _first_attention(model: Any) -> Any:
    return model.blocks[0].attn


def _drop_in_its_attentions_mode(model: Any) -> None:
    _first_attention(model).attn_drop.p = 0.5
    _first_attention(model).attn_drop.eval()


def _own_scale(model: Any) -> None:
    _first_attention(model).fused_attn, _first_attention(model).scale = False, 0.9


@pytest.mark.parametrize("change", [_drop_in_its_attentions_mode, _own_scale])
def test_an_attention_that_must_be_called(change: Callable[[Any], None]) -> None:
    _, calls = check(change)
    ran = [call for call in calls if call.op == "attention_qkv" and call.direction == "forward"]
    assert len(ran) == 1, "the second block's alone"


def test_heads_that_do_not_make_up_the_width_raise_as_stock() -> None:
    stock = vit()
    model = vk.fuse(copy.deepcopy(stock))
    for each in (stock, model):
        _first_attention(each).num_heads *= 2
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            each(images())


class Noise(nn.Module):
    """Another weight at each look."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (0.5 + torch.rand_like(weight))


@pytest.mark.parametrize("part", ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1"])
def test_a_weight_that_is_made_at_each_look(part: str) -> None:
    model, _ = check(
        lambda model: parametrize.register_parametrization(model.blocks[0].get_submodule(part), "weight", Noise())
    )
    assert "parametrization" in str(vk.explain(model))


class Tripled(Tensor):
    """A weight that is three times itself in a product."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(*(3 * each.as_subclass(Tensor) if isinstance(each, cls) else each for each in args))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_an_acting_weight_that_is_no_parameter(place: str) -> None:
    def change(model: Any) -> None:
        linear = _first_attention(model).qkv
        weight = linear.weight.detach().as_subclass(Tripled)
        del linear.weight
        if place == "buffer":
            linear.register_buffer("weight", weight)
        else:
            linear.weight = weight

    model, _ = check(change)
    assert "a Tripled weight on qkv" in str(vk.explain(model))


class Cut(nn.Module):
    """Hands on values, and no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("part", ["attn.proj_drop", "mlp", "drop_path1", "drop_path2"])
def test_a_norm_that_nobody_reads_has_no_gradient(part: str) -> None:
    parent, _, name = part.rpartition(".")
    _, calls = check(lambda model: setattr(model.blocks[0].get_submodule(parent), name, Cut()))
    assert any(call.op == "add_layer_norm" for call in calls)


def test_a_plain_call_hands_on_what_the_block_hands_on() -> None:
    seen: list[dict[str, Any]] = []

    def change(model: Any) -> None:
        _first_attention(model).register_forward_pre_hook(lambda *each: seen.append(each[-1]), with_kwargs=True)

    check(change)
    assert seen == [{"attn_mask": None, "is_causal": False}] * 2


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("grad", [True, False])
def test_dropouts_that_stay_in_training_draw_as_in_the_stock_layer(grad: bool, heads: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, heads, 48, 0.4, activation="gelu", batch_first=True, norm_first=True)
    stock = nn.Sequential(layer, copy.deepcopy(layer))
    model = vk.fuse(copy.deepcopy(stock))
    x, results = torch.randn(3, 7, 24), []
    for each in (stock, model):
        each.eval()
        for part in each.modules():
            part.train(isinstance(part, nn.Dropout))
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            results.append(each(x))
    torch.testing.assert_close(*results)
    assert "a dropout in training, in a layer in eval" in str(vk.explain(model))


def test_a_dropout_behind_an_attention_in_eval_draws_as_torch_does() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 48, 0.4, activation="gelu", batch_first=True, norm_first=True)
    stock = nn.Sequential(layer, copy.deepcopy(layer))
    model = vk.fuse(copy.deepcopy(stock))
    results, x = [], torch.randn(3, 7, 24)
    with vk.record() as calls:
        for each in (stock, model):
            for part in each.modules():
                part.train(not isinstance(part, nn.MultiheadAttention))
            torch.manual_seed(1)
            results.append(each(x))
    torch.testing.assert_close(*results)
    assert any(call.op == "attention_qkv" for call in calls)


def test_a_weight_put_in_a_parameters_place_after_the_forward_pass() -> None:
    """The gradients are of what was multiplied, as stock's are."""
    model, x = vit(), images().requires_grad_()

    def gradients(model: nn.Module) -> list[Tensor]:
        loss = model(x).square().sum()
        for linear in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2):  # type: ignore[index,union-attr]
            linear.weight.data = torch.zeros_like(linear.weight)
        return list(torch.autograd.grad(loss, [x, model.blocks[0].norm1.weight]))  # type: ignore[index,union-attr,list-item]

    expected = gradients(copy.deepcopy(model))
    torch.testing.assert_close(gradients(vk.fuse(model)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1"])
def test_a_norm_of_another_dtype_is_refused_as_stock_refuses_it(name: str) -> None:
    model, x = vit(), images()
    model.get_submodule(name).double()
    with pytest.raises(RuntimeError) as expected:
        model(x)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        vk.fuse(model)(x)
