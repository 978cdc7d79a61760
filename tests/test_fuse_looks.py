"""What a module holds may change where no change of the module tells of it: weights, rates and masks that act."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fused
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm_vit import images, timm, vit
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import vitkernels as vk

BOTH = pytest.mark.parametrize("grad", [True, False])


def run(model: nn.Module, x: Tensor, grad: bool) -> dict[str, Tensor]:
    """Outputs, gradients where there are any, and what is left of the random numbers."""
    torch.manual_seed(3)
    if grad:
        found = fused.output_and_gradients(model, (x,))
    else:
        with torch.no_grad():
            found = {"output": model(x)}
    return found | {"random": torch.rand(3)}


def check_change(build: Callable[[], nn.Module], change: Callable[[Any, int], object], grad: bool = True) -> Any:
    """Stock and fused, called before and after each of two changes, give the same; returns the fused model."""
    torch.manual_seed(0)
    model, x = build(), images()
    twin = vk.fuse(copy.deepcopy(model))
    for time in (0, 1, 2):
        found = []
        for each in (model, twin):
            change(each, time)
            with vk.record() as calls:
                found.append([run(each, x, grad) for _ in range(2)])
        for got, expected in zip(*reversed(found), strict=True):
            fused.check_same(got, expected)
        assert {"mlp", "add_layer_norm"} <= {call.op for call in calls}, "the other block is fused"
    return twin


class Doubled(nn.Parameter):
    """A weight that counts twice where a Linear multiplies by it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                args = [2 * each if isinstance(each, Doubled) else each for each in args]
            return function(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_a_weight_that_becomes_one_of_another_class_where_it_lies(part: str, grad: bool) -> None:
    def change(model: Any, time: int) -> None:
        model.blocks[0].get_submodule(part).weight.__class__ = Doubled if time == 1 else nn.Parameter

    twin = check_change(lambda: vit(depth=2), change, grad)
    twin.blocks[0].get_submodule(part).weight.__class__ = Doubled
    assert "a Doubled weight" in str(vk.explain(twin))


class Raised(nn.LayerNorm):
    """A norm whose weight is what it holds, plus one."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found + 1 if name == "weight" else found


class Scheduled(nn.LayerNorm):
    now = 1e-5

    @property
    def eps(self) -> float:
        return Scheduled.now

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class OfClass(nn.LayerNorm):
    """With one eps for all norms of the class."""

    eps = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.__dict__["eps"]


def _written(model: Any, time: int) -> None:
    with torch.no_grad():
        model.blocks[0].norm2._parameters["weight"].add_(0.5 * time)


def _scheduled(model: Any, time: int) -> None:
    Scheduled.now = OfClass.eps = 0.5 * time + 1e-5


@BOTH
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (Raised, _written, "attributes made at each look"),
        (Scheduled, _scheduled, "eps made at each look"),
        (OfClass, _scheduled, "eps of its class"),
    ],
)
def test_a_norm_that_is_read_at_each_look(kind: Any, change: Callable[..., None], reason: str, grad: bool) -> None:
    def build() -> nn.Module:
        model = vit(depth=2)
        model.blocks[0].norm2 = kind(48)
        nn.init.ones_(model.blocks[0].norm2._parameters["weight"])
        return model

    assert reason in str(vk.explain(check_change(build, change, grad)))


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
def test_an_eps_that_is_a_tensor_and_changes_where_it_lies(smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are made again in backward, of their own eps."""
    monkeypatch.setattr("vitkernels.ops._step._SMALL", smallest)

    def build() -> nn.Module:
        model = vit(depth=2)
        model.blocks[0].norm2.eps = torch.tensor(0.1)
        return model

    def change(model: Any, time: int) -> None:
        model.blocks[0].norm2.eps.fill_(0.1 + time)

    assert "a tensor for eps" in str(vk.explain(check_change(build, change)))


class Plain(nn.LayerNorm):
    """A norm, until somebody puts a property on its class."""


@BOTH
@pytest.mark.parametrize(
    ("name", "look"), [("eps", lambda norm: 0.5), ("weight", lambda norm: 2 * norm._parameters["weight"])]
)
def test_a_property_that_is_put_on_a_class_later(name: str, look: Any, grad: bool) -> None:
    def build() -> nn.Module:
        model = vit(depth=2)
        model.blocks[0].norm2 = Plain(48)
        return model

    def change(model: Any, time: int) -> None:
        if time == 1 and name not in vars(Plain):
            setattr(Plain, name, property(look))
        elif time != 1 and name in vars(Plain):
            delattr(Plain, name)

    twin = check_change(build, change, grad)
    assert vk.explain(twin).summary == "2 of 2 blocks fused"
    setattr(Plain, name, property(look))
    assert f"{name} made at each look" in str(vk.explain(twin))
    delattr(Plain, name)


class Rates:
    """A schedule that many modules look at."""

    now = 0.0


class ScheduledPath(timm.layers.DropPath):  # type: ignore[name-defined,misc]
    drop_prob = property(lambda self: Rates.now, lambda self, value: None)


class ScheduledDropout(nn.Dropout):
    p = property(lambda self: Rates.now, lambda self, value: None)  # type: ignore[assignment]


class PathOfClass(timm.layers.DropPath):  # type: ignore[name-defined,misc]
    drop_prob = 0.0

    def __init__(self) -> None:
        super().__init__()
        del self.__dict__["drop_prob"]


def _path_of_array() -> nn.Module:
    path = timm.layers.DropPath(0.0)
    path.drop_prob = np.array(0.0)
    return path


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("drop_path1", ScheduledPath),
        ("drop_path2", PathOfClass),
        ("drop_path1", _path_of_array),
        ("attn.attn_drop", ScheduledDropout),
        ("attn.proj_drop", ScheduledDropout),
        ("mlp.drop1", ScheduledDropout),
    ],
)
def test_a_rate_that_is_read_at_each_look(place: str, kind: Any) -> None:
    def build() -> nn.Module:
        model = vit(depth=2)
        model.blocks[0].set_submodule(place, kind())
        return model

    def change(model: Any, time: int) -> None:
        Rates.now = PathOfClass.drop_prob = (0.0, 0.5, 0.2)[time]
        rate = getattr(model.blocks[0].get_submodule(place), "drop_prob", None)
        if isinstance(rate, np.ndarray):
            rate[...] = Rates.now

    check_change(build, change)


@BOTH
@pytest.mark.parametrize("shape", [(1,), (), (1, 48), (1, 1, 1)])
@pytest.mark.parametrize("name", ["attn.proj.bias", "mlp.fc2.bias", "ls1.gamma"])
def test_a_vector_that_becomes_one_that_broadcasts(name: str, shape: tuple[int, ...], grad: bool) -> None:
    """Known before anything is drawn: a refusal between the draws would have the stock block draw again."""

    def change(model: Any, time: int) -> None:
        if time == 1:
            model.blocks[1].get_parameter(name).data = torch.full(shape, 0.5)

    twin = check_change(lambda: vit(depth=3, init_values=0.5, drop_path_rate=0.5), change, grad)
    assert not twin.blocks._vitkernels.fallbacks, "no call was refused on its way"
    assert "2 of 3 blocks fused; block 1: " in str(vk.explain(twin))


# ------------------------------------------------------------------------------------------------ masks that act


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn"])
def test_a_causal_bias_in_a_masks_place(part: str, bias: Callable[[int, int], CausalBias]) -> None:
    """It holds a shape, and memory that nobody wrote."""
    model, x, mask = vit().eval(), torch.randn(2, 7, 48), bias(7, 7)
    mask.as_subclass(Tensor).fill_(0.25)  # type: ignore[arg-type]
    own = model.get_submodule(part)
    expected = own(x, is_causal=True)
    torch.testing.assert_close(own(x, attn_mask=mask), expected)
    got = vk.fuse(copy.deepcopy(model)).get_submodule(part)
    torch.testing.assert_close(got(x, attn_mask=mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got(x, is_causal=True), expected, atol=1e-5, rtol=1e-5)
    assert "called with a CausalBias for a mask" in got._vitkernels.fallbacks.__str__()


@pytest.mark.parametrize("first", [True, False], ids=["first", "after a mask of numbers"])
def test_a_causal_bias_is_refused_by_the_ops(first: bool) -> None:
    q, qkv, mask = torch.randn(2, 3, 7, 16), torch.randn(2, 7, 144), causal_upper_left(7, 7)
    for _ in range(0 if first else 4):
        vk.ops.attention(q, q, q, attn_mask=torch.zeros(7, 7))
        vk.ops.attention_qkv(qkv, 3, attn_mask=torch.zeros(7, 7))
    with pytest.raises(TypeError, match="attention: argument 'attn_mask' is a CausalBias, which holds no numbers"):
        vk.ops.attention(q, q, q, attn_mask=mask)
    with pytest.raises(TypeError, match="attention_qkv: argument 'attn_mask' is a CausalBias"):
        vk.ops.attention_qkv(qkv, 3, attn_mask=mask)


@pytest.mark.parametrize("call", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn"])
def test_masks_of_fewer_images_than_there_are_belong_to_the_stock_code(part: str, call: int) -> None:
    """The ops would take them in turn, as they do for windows."""
    module = vk.fuse(vit()).get_submodule(part)
    x = torch.randn(4, 7, 48)
    with vk.record() as calls:
        for _ in range(call):
            module(x, attn_mask=torch.randn(4, 1, 7, 7))
    assert {each.op for each in calls} >= ({"attention_qkv"} if call else set())
    with pytest.raises(RuntimeError, match=r"must match the size|expanded size"):  # torch's own
        module(x, attn_mask=torch.randn(2, 1, 7, 7))
    assert "called with masks of 2 sequences, and tokens of 4" in module._vitkernels.fallbacks


BIASED = {"beit.Block": "shared_rel_pos_bias", "vision_transformer_relpos.RelPosBlock": "shared_rel_pos"}


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("bias", [torch.zeros(2, 1, 7, 7), torch.zeros(1, 1, 7, 7).bfloat16()], ids=["count", "dtype"])
def test_a_bias_of_positions_that_torchs_attention_refuses(name: str, bias: Tensor) -> None:
    file, kind = name.split(".")
    block = vk.fuse(getattr(getattr(timm.models, file), kind)(48, 3))
    with vk.record() as calls:
        block(torch.randn(4, 7, 48), **{BIASED[name]: torch.zeros(1, 1, 7, 7)})
    assert "attention_qkv" in {each.op for each in calls}
    with pytest.raises(RuntimeError, match=r"must match the size|expanded size|attn_mask dtype"):  # torch's own
        block(torch.randn(4, 7, 48), **{BIASED[name]: bias})
