"""A part is read around only while calling it would do nothing else: patched classes, acting weights, modes, hooks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import ecosystems
import fused
import pytest
import torch
import torch.nn.functional as F
from ecosystems import ECOSYSTEMS, D
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import vitkernels as vk
from vitkernels.residual import genuine

everywhere = pytest.mark.parametrize("name", ECOSYSTEMS)


def whole(model: nn.Module) -> bool:
    return not vk.explain(model).unfused


# ---------------------------------------------------------------------------------------------- a forward replaced


def doubled(forward: Callable[..., Any], wraps: bool) -> Callable[..., Any]:
    def replacement(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        out = forward(self, *args, **keywords)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    return functools.wraps(forward)(replacement) if wraps else replacement


@pytest.mark.parametrize("wraps", [True, False], ids=["functools.wraps", "bare"])
@pytest.mark.parametrize("first", ["fuse", "patch"])
@pytest.mark.parametrize("part", ["linear", "norm", "activation", "attention", "block"])
@everywhere
def test_a_forward_replaced_on_a_class(
    name: str, part: str, first: str, wraps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    blocks = vk.explain(vk.fuse(copy.deepcopy(model))).blocks
    kind = type(model.get_submodule(next(iter(blocks)) if part == "block" else ecosystem.parts[part]))
    if kind is nn.ModuleList:  # vit-pytorch's: the model around it runs its pair of modules
        kind = type(model)
    twin = copy.deepcopy(model)
    before = ecosystems.numbers(model, inputs)
    if first == "fuse":
        fused.check_same(ecosystems.numbers(vk.fuse(twin), inputs), before)  # what it read, it keeps for later calls
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", doubled(kind.forward, wraps))
        expected = ecosystems.numbers(model, inputs)
        assert not torch.allclose(expected["output 0"], before["output 0"], rtol=1e-3)
        if first == "patch":
            fuse_what_is_left(twin)
        fused.check_same(ecosystems.numbers(twin, inputs), expected)
        assert not whole(twin)
    if first == "fuse":  # the class is as it was, and so is the model
        with vk.record() as calls:
            fused.check_same(ecosystems.numbers(twin, inputs), before)
        assert {"linear", "add_layer_norm", "mlp"} <= {call.op for call in calls}
        assert whole(twin)


def fuse_what_is_left(model: nn.Module) -> None:
    try:
        vk.fuse(model)
    except ValueError as error:
        assert "nothing to fuse" in str(error)  # noqa: PT017


@everywhere
def test_a_forward_put_on_one_module(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    twin = vk.fuse(copy.deepcopy(model))
    for each in (model, twin):
        linear = each.get_submodule(ecosystem.parts["linear"])
        linear.forward = lambda x, linear=linear: 0.5 * F.linear(x, linear.weight, linear.bias)  # type: ignore[method-assign]
    expected = ecosystems.numbers(model, inputs)
    fused.check_same(ecosystems.numbers(twin, inputs), expected)
    (reason,) = vk.explain(twin).unfused.values()
    assert reason.startswith("another forward on")


class Called(nn.Linear):
    """Does more when it is called than its forward does."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return 1.5 * super().__call__(*args, **keywords)


@everywhere
def test_a_call_of_its_own(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model = ecosystem.model()
    model.get_submodule(ecosystem.parts["linear"]).__class__ = Called
    assert ecosystems.check_as_stock(model, ecosystem.inputs())
    (reason,) = vk.explain(model).unfused.values()
    assert "a __call__ of its own on" in reason


# ------------------------------------------------------------------------------------------ torch functions replaced


@pytest.mark.parametrize("wraps", [True, False], ids=["functools.wraps", "bare"])
@pytest.mark.parametrize("function", ["linear", "gelu", "scaled_dot_product_attention", "layer_norm"])
@everywhere
def test_a_torch_function_replaced(name: str, function: str, wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model().eval(), ecosystem.inputs()
    twin = vk.fuse(copy.deepcopy(model))
    with torch.no_grad():
        before = model(*inputs)
    own, seen = getattr(F, function), []

    def replacement(*args: Any, **keywords: Any) -> Tensor:
        seen.append(function)
        return 1.25 * own(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(F, function, functools.wraps(own)(replacement) if wraps else replacement)
        expected, counted = ecosystems.numbers(model, inputs), len(seen)
        with vk.record() as calls:
            fused.check_same(ecosystems.numbers(twin, inputs), expected)
        assert not calls
    assert len(seen) == 2 * counted, "as often as in the stock model"
    with torch.no_grad(), vk.record() as calls:
        out, wanted = twin(*inputs), before
    fused.check_same(_outputs(out), _outputs(wanted))
    assert "mlp" in {call.op for call in calls}


def _outputs(returned: Any) -> dict[str, Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(returned) if isinstance(returned, dict) else returned)
    return {str(index): each for index, each in enumerate(leaves) if isinstance(each, Tensor)}


# ---------------------------------------------------------------------------------------------------- weights that act


class Scaled(Tensor):
    """A weight that is doubled where it is multiplied."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                x, weight, *rest = (each.as_subclass(Tensor) if isinstance(each, Tensor) else each for each in args)
                return F.linear(x, 2 * weight, *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


class Tagged(Tensor):
    """A subclass that does nothing of its own."""


@pytest.mark.parametrize("kind", [Scaled, Tagged])
@everywhere
def test_a_weight_with_a_torch_function(name: str, kind: type[Tensor]) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    twin = vk.fuse(copy.deepcopy(model))
    plain = ecosystems.numbers(model, inputs)
    for each in (model, twin):
        linear = each.get_submodule(ecosystem.parts["linear"])
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(kind))  # type: ignore[union-attr,arg-type]
    expected = ecosystems.numbers(model, inputs)
    assert torch.allclose(expected["output 0"], plain["output 0"], rtol=1e-3) == (kind is Tagged)
    fused.check_same(ecosystems.numbers(twin, inputs), expected)
    with vk.record() as calls:
        twin(*inputs)
    assert {"linear", "add_layer_norm", "mlp"} <= {call.op for call in calls}, "the other block's, at the least"
    reasons = [reason.partition(" on ")[0] for reason in vk.explain(twin).unfused.values()]
    assert reasons == ["a Scaled weight"] * (kind is Scaled)


def own_block() -> nn.Module:
    model = vk.nn.Block(D, 3, mlp_ratio=2)
    fused.stir(model)
    return model


@pytest.mark.parametrize("own", [True, False], ids=["vitkernels", "timm"])
def test_gradients_of_each_sample(own: bool) -> None:
    """ExpandedWeights: every weight is a tensor that keeps the samples apart."""
    x = torch.randn(3, 7, D)
    if own:
        block = stock = own_block()
    else:
        import timm_vit

        stock = timm_vit.vit().blocks[0]
        block = vk.fuse(copy.deepcopy(stock))
    expected = [
        torch.autograd.grad(stock(x[index : index + 1]).square().sum(), list(stock.parameters())) for index in range(3)
    ]
    with vk.record() as calls:
        call_for_per_sample_grads(block, loss_reduction="sum")(x).square().sum().backward()
    assert {call.op for call in calls} == {"attention_qkv"}, "modules are called as they are"
    for index, parameter in enumerate(block.parameters()):
        wanted = torch.stack([each[index] for each in expected])
        torch.testing.assert_close(parameter.grad_sample, wanted, atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ modes and hooks


class Halved(TorchFunctionMode):
    """Halves what each Linear gives."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out / 2 if function is F.linear else out


@everywhere
def test_an_active_mode_sees_every_function(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    twin = vk.fuse(copy.deepcopy(model))
    with Halved():
        expected = ecosystems.numbers(model, inputs)
        with vk.record() as calls:
            fused.check_same(ecosystems.numbers(twin, inputs), expected)
    assert not calls
    fallbacks = vk.explain(twin).fallbacks
    assert any("an active Halved" in reason for counts in fallbacks.values() for reason in counts)


@everywhere
def test_a_default_device_is_no_mode_that_acts(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    with torch.device("cpu"):
        calls = ecosystems.check_as_stock(model, inputs)
    assert {"linear", "add_layer_norm", "mlp"} <= {call.op for call in calls}
    assert not vk.explain(model).fallbacks


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """The classes of all modules that are called, by a global hook."""
    names: list[str] = []
    handle = torch_module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    yield names
    handle.remove()


@everywhere
def test_a_global_hook_sees_every_module(name: str, seen: list[str]) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    twin = vk.fuse(copy.deepcopy(model))
    seen.clear()
    expected = ecosystems.numbers(model, inputs)
    wanted = seen.copy()
    seen.clear()
    with vk.record() as calls:
        fused.check_same(ecosystems.numbers(twin, inputs), expected)
    assert seen == wanted
    assert not calls


# ------------------------------------------------------------------------------------------------------- vitkernels.nn


def own_vit() -> nn.Module:
    model = vk.nn.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=3, num_classes=5, init_values=0.5
    )
    fused.stir(model)
    return model


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nn.Linear": lambda patch: patch.setattr(nn.Linear, "forward", doubled(nn.Linear.forward, True)),
    "nn.LayerNorm": lambda patch: patch.setattr(nn.LayerNorm, "forward", doubled(nn.LayerNorm.forward, False)),
    "Attention": lambda patch: patch.setattr(vk.nn.Attention, "forward", doubled(vk.nn.Attention.forward, False)),
    "Mlp": lambda patch: patch.setattr(vk.nn.Mlp, "forward", doubled(vk.nn.Mlp.forward, True)),
    "Block": lambda patch: patch.setattr(vk.nn.Block, "forward", doubled(vk.nn.Block.forward, True)),
    "LayerScale": lambda patch: patch.setattr(vk.nn.LayerScale, "forward", doubled(vk.nn.LayerScale.forward, False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_own_modules_keep_a_replaced_forward(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model of the same classes would compute whose modules all have a hook, and are called one by one."""
    model, image = own_vit(), (torch.randn(2, 3, 32, 32),)
    plain = ecosystems.numbers(model, image)
    called = copy.deepcopy(model)
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)
    fused.check_same(ecosystems.numbers(called, image), plain)
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        expected = ecosystems.numbers(called, image)
        fused.check_same(ecosystems.numbers(model, image), expected)
        assert not torch.allclose(expected["output 0"], plain["output 0"], rtol=1e-3)
    with vk.record() as calls:
        fused.check_same(ecosystems.numbers(model, image), plain)
    assert [call.op for call in calls if call.direction == "forward"].count("add_layer_norm") == 1 + 4


def test_own_modules_under_a_global_hook(seen: list[str]) -> None:
    block, x = own_block(), torch.randn(2, 7, D)
    seen.clear()
    block(x)
    counts = {name: seen.count(name) for name in ("LayerNorm", "Linear", "Attention", "Mlp", "Block")}
    assert counts == {"LayerNorm": 2, "Linear": 4, "Attention": 1, "Mlp": 1, "Block": 1}


def test_own_modules_under_a_mode() -> None:
    block, x = own_block(), torch.randn(2, 7, D)
    before = block(x)
    with torch.device("cpu"), vk.record() as calls:
        assert torch.equal(block(x), before)
    assert [call.op for call in calls].count("add_layer_norm") == 2
    wanted = copy.deepcopy(block)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if "norm" not in name:
                parameter.div_(2)  # of a Linear
    with Halved():
        halved = block(x)
    torch.testing.assert_close(halved, wanted(x), atol=1e-5, rtol=1e-5)


def test_own_modules_with_an_acting_weight() -> None:
    block, x = own_block(), torch.randn(2, 7, D)
    wanted = copy.deepcopy(block)
    with torch.no_grad():
        wanted.attn.qkv.weight.mul_(2)
    block.attn.qkv.weight = nn.Parameter(block.attn.qkv.weight.detach().as_subclass(Scaled))
    torch.testing.assert_close(block(x).as_subclass(Tensor), wanted(x), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- what the package asks


def test_own_text_and_replacements() -> None:
    assert not genuine.replaced(nn.Linear)
    assert not genuine.replaced(vk.nn.Block)

    class Local(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert not genuine.replaced(Local), "its own text"
    Local.forward = doubled(nn.Linear.forward, True)  # type: ignore[method-assign]
    assert genuine.replaced(Local)
    Local.forward = nn.Linear.forward  # type: ignore[method-assign]
    assert genuine.replaced(Local), "somebody else's text"
