"""Classes are known by where they come from: one that wears a usual name computes what its own text says."""

from __future__ import annotations

import copy
from typing import Any

import dino_blocks as dino
import ecosystems
import fused
import pytest
import torch
from ecosystems import ECOSYSTEMS, D, having
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.residual import known

# ------------------------------------------------------------------------------------ the names, with other formulas


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2.5 * x)


class ReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 6)


class SiLU(nn.Module):
    """With a slope that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(0.5 * x)


class GELUActivation(nn.GELU):
    """A subclass of the usual one that changes it."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LayerNorm(nn.LayerNorm):
    """Divides by the mean deviation."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        return centred / (centred.abs().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.2, 0.9, D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.exp()


class DropPath(nn.Module):
    """Leaves the scale alone."""

    def __init__(self, drop_prob: float = 0.3) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)


OWN: dict[str, list[type[nn.Module]]] = {
    "activation": [GELU, ReLU, SiLU, QuickGELU, GELUActivation],
    "norm": [LayerNorm],
    "scale": [LayerScale],
    "drop_path": [DropPath],
}
ROWS = [(part, kind, name) for part, kinds in OWN.items() for kind in kinds for name in having(part).args[1]]


def made(kind: type[nn.Module]) -> nn.Module:
    return kind(D) if kind is LayerNorm else kind()


@pytest.mark.parametrize("first", ["put", "fuse"])
@pytest.mark.parametrize(("part", "kind", "name"), ROWS, ids=lambda each: getattr(each, "__name__", each))
def test_a_class_of_a_usual_name_runs_as_itself(part: str, kind: type[nn.Module], name: str, first: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model, inputs = ecosystem.model(), ecosystem.inputs()
    before = vk.explain(vk.fuse(copy.deepcopy(model))).unfused
    twin = vk.fuse(copy.deepcopy(model)) if first == "fuse" else model
    ecosystem.put(model, part, made(kind))
    expected = ecosystems.numbers(model, inputs)
    if first == "fuse":
        ecosystem.put(twin, part, made(kind))
    else:
        vk.fuse(twin)
    with vk.record() as calls:
        fused.check_same(ecosystems.numbers(twin, inputs), expected)
    assert {"linear", "add_layer_norm"} <= {call.op for call in calls}
    assert not before
    (reason,) = vk.explain(twin).unfused.values()
    assert kind.__name__ in reason


@pytest.mark.parametrize("name", having("activation").args[1])
def test_a_slope_that_is_learned_gets_its_gradient(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model = ecosystem.model()
    ecosystem.put(model, "activation", SiLU())
    found = ecosystems.numbers(vk.fuse(model), ecosystem.inputs())
    assert found[f"{ecosystem.parts['activation']}.beta"].abs() > 0


# ------------------------------------------------------------------------------------------------- LayerScale's shapes


class Scalar(nn.Module):
    """One factor for all features."""

    def __init__(self, shape: tuple[int, ...] = (), name: str = "gamma") -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.full(shape, 0.7)))

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, self.name)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, D), (D,)], ids=str)
@pytest.mark.parametrize("parameter", ["gamma", "weight"])
@having("scale")
def test_a_scale_of_another_shape_or_name(name: str, parameter: str, shape: tuple[int, ...]) -> None:
    ecosystem = ECOSYSTEMS[name]
    model = ecosystem.model()
    ecosystem.put(model, "scale", Scalar(shape, parameter))
    calls = ecosystems.check_as_stock(model, ecosystem.inputs())
    assert "add_layer_norm" in {call.op for call in calls}


@having("scale")
def test_a_parameter_renamed_in_a_known_scale(name: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    model = ecosystem.model()
    scale = model.get_submodule(ecosystem.parts["scale"])
    ((own, _),) = scale.named_parameters()
    kind = type(scale)
    renamed = type(kind.__name__, (kind,), {"forward": _renamed, "__module__": __name__})
    scale.__class__ = renamed
    scale.factor = scale._parameters.pop(own)
    ecosystems.check_as_stock(model, ecosystem.inputs())
    assert len(vk.explain(model).unfused) == 1


def _renamed(self: Any, x: Tensor) -> Tensor:
    return x * self.factor


# ----------------------------------------------------------------------------------------------- classes that are tried


@pytest.fixture(autouse=True)
def _nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_tried_scales", {})
    monkeypatch.setattr(known, "_tried_paths", {})


class Truncated(nn.Module):
    """A LayerScale that does something else in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma if self.training else x * self.gamma.clamp(0, 1)


class Uniform(nn.Module):
    """As transformers draws."""

    def __init__(self, drop_prob: float = 0.3) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype)).floor()


def test_what_is_tried_is_what_it_computes() -> None:
    tried = nn.ModuleList([dino.LayerScale(D), dino.DropPath(0.3), LayerScale(), Truncated(), DropPath(), Uniform()])
    state = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in tried.state_dict().items()}
    known.try_out(tried)
    assert [known.scale_name(each) for each in tried] == ["gamma", *5 * [None]]
    drawn = [known.drop_path_draw(each) for each in tried]
    assert drawn == [None, known.draw_bernoulli, None, None, None, known.draw_uniform]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tried.state_dict().items())


@pytest.mark.parametrize("drop_path", [0.0, 0.05])
def test_a_tried_block_drops_and_scales_fused(drop_path: float) -> None:
    block = dino.Block(D, 3, mlp_ratio=2, init_values=0.5, drop_path=drop_path)
    fused.stir(block)
    ecosystems.check_as_stock(block, (torch.randn(8, 7, D),))
    assert vk.explain(block).summary == "1 of 1 blocks fused"


class Scaled(nn.Module):
    """A LayerScale whose text asks for an attribute."""

    def __init__(self, upper: float) -> None:
        super().__init__()
        self.gamma, self.upper = nn.Parameter(torch.ones(D)), upper

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma if self.upper > 1 else self.gamma.clamp(max=self.upper))


def test_a_tried_block_compiles() -> None:
    """In one graph, and one with other attributes is not taken for what was tried."""
    block = dino.Block(D, 3, mlp_ratio=2, init_values=0.5)
    block.ls1, block.ls2 = Scaled(2.0), Scaled(2.0)
    fused.stir(block)
    x = torch.randn(2, 7, D)
    known.try_out(Scaled(2.0))
    vk.fuse(block)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    assert vk.explain(block).summary == "1 of 1 blocks fused"
    block.ls1.upper = 0.25
    with torch.no_grad():
        block.ls1.gamma.fill_(0.75)
    torch.testing.assert_close(compiled(x), block(x))
    assert "1 of 1 blocks fused" not in vk.explain(block).summary


def test_a_tried_class_whose_forward_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    block = dino.Block(D, 3, mlp_ratio=2, init_values=0.5)
    fused.stir(block)
    vk.fuse(block)
    monkeypatch.setattr(dino.LayerScale, "forward", lambda self, x: x * self.gamma.abs())
    x = torch.randn(2, 7, D)
    got = ecosystems.numbers(block, (x,))
    assert "another forward on" in vk.explain(block).summary
    fused.check_same(got, ecosystems.numbers(vk.unfuse(block), (x,)))


class Times(nn.Module):
    """A LayerScale with a factor beside its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.factor = nn.Parameter(torch.ones(D)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma * self.factor


def test_a_tried_class_whose_attribute_changes_later() -> None:
    block = dino.Block(D, 3, mlp_ratio=2, init_values=0.5)
    block.ls1 = Times()
    fused.stir(block)
    assert vk.explain(vk.fuse(block)).summary == "1 of 1 blocks fused"
    block.ls1.factor = 2.0
    x = torch.randn(2, 7, D)
    got = ecosystems.numbers(block, (x,))
    assert "not LayerScale" in vk.explain(block).summary
    fused.check_same(got, ecosystems.numbers(vk.unfuse(block), (x,)))


@pytest.mark.parametrize(("name", "value"), [("scale", 1.0), ("num_heads", 6)])
def test_a_tried_attention_whose_scale_is_no_longer_the_usual_one(name: str, value: float) -> None:
    block = dino.Block(D, 3, mlp_ratio=2, init_values=0.5)
    fused.stir(block)
    vk.fuse(block)
    setattr(block.attn, name, value)
    x = torch.randn(2, 7, D)
    got = ecosystems.numbers(block, (x,))
    assert "a scale of its own" in str(vk.explain(block))
    fused.check_same(got, ecosystems.numbers(vk.unfuse(block), (x,)))
