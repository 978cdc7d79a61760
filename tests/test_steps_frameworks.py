"""Steps of a residual stream in the hands of frameworks: transforms, compilers, checkpoints, hooks, profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from step_layers import (
    FACTORS,
    KINDS,
    MASKED,
    OPS,
    Layer,
    Results,
    check_equal,
    keep_smaller_norms,
    launches,
    norms,
    weights_like,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vitkernels as vk

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def smallest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    keep_smaller_norms(monkeypatch, request.param)
    return int(request.param)


def layer_of(kind: str) -> Layer:
    return Layer(kind, factors=FACTORS, mask=kind in MASKED)


def close(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def value(results: Results) -> Tensor:
    """A number that depends on both."""
    return sum(((each * weights_like(each)).sum() for each in results), torch.zeros(()))


# -------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"], indirect=True)
@kinds
def test_twice_through_a_graph_that_is_kept(kind: str, smallest: int) -> None:
    layer = layer_of(kind)
    results = layer.together()
    with vk.record() as calls:
        once = layer.gradients(results, retain_graph=True)
        check_equal(layer.gradients(results), once)
    assert norms(calls) == (0 if smallest else 2)
    with pytest.raises(RuntimeError, match="second time"):
        layer.gradients(results)


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"], indirect=True)
@kinds
def test_the_gradient_of_a_gradient_is_refused(kind: str, smallest: int) -> None:
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    with vk.record() as calls:
        first = layer.gradients(layer.together(), create_graph=True)
    assert "add_layer_norm" in launches(calls)[1]
    check_equal({name: each if each is None else each.detach() for name, each in first.items()}, expected)
    for name in ("x", "w1"):
        gradient = first[name]
        assert gradient is not None
        with pytest.raises(RuntimeError, match="does not support double backward"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"], indirect=True)
@kinds
def test_batched_gradients(kind: str, smallest: int) -> None:
    layer = layer_of(kind)
    total, product = layer.together()
    given = [torch.randn(3, *each.shape) for each in (total, product)]
    learn = list(layer.learn.values())

    def grads(outputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad((total, product), learn, outputs, retain_graph=True, **options)

    got = grads(given, is_grads_batched=True)
    for index in range(3):
        expected = grads([each[index] for each in given])
        for name, mine, tensor in zip(layer.learn, got, expected, strict=True):
            torch.testing.assert_close(mine[index], tensor, msg=name)


@kinds
def test_forward_mode_is_refused(kind: str) -> None:
    layer = layer_of(kind)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(layer.tensors["x"].detach(), torch.ones_like(layer.tensors["x"]))
        with pytest.raises(RuntimeError, match=r"does not support forward-mode differentiation"):
            layer.together(x=dual)


# --------------------------------------------------------------------------------------------------------- functorch


@kinds
def test_functional_gradients(kind: str) -> None:
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    plain = {name: each.detach() for name, each in layer.learn.items()}
    with vk.record() as calls:
        got = torch.func.grad(lambda tensors: value(layer.together(**tensors)))(plain)
    assert launches(calls)[0] == ["add_layer_norm", *OPS[kind]]
    close(got, expected)


@kinds
def test_vmap(kind: str) -> None:
    layer = layer_of(kind)
    streams = torch.randn(3, *layer.tensors["x"].shape)
    got = torch.func.vmap(lambda x: layer.together(x=x))(streams)
    for index, x in enumerate(streams):
        for mine, tensor in zip(got, layer.together(x=x), strict=True):
            torch.testing.assert_close(mine[index], tensor)


@kinds
def test_gradients_of_each_sample(kind: str) -> None:
    layer = layer_of(kind)
    samples = torch.randn(3, *layer.tensors["x"].shape)
    weight = layer.tensors["w1"].detach()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return value(layer.together(x=x, w1=weight))

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, samples)
    for mine, x in zip(got, samples, strict=True):
        expected = torch.autograd.grad(loss(layer.tensors["w1"], x), layer.tensors["w1"])[0]
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@kinds
def test_compiled(kind: str, autocast: bool) -> None:
    layer = layer_of(kind)

    def gradients(run: Callable[[], Results]) -> tuple[Results, dict[str, Tensor | None]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = run()
        return results, layer.gradients(results)

    wanted, expected = gradients(layer.apart)
    compiled = torch.compile(layer.together, fullgraph=True, backend="aot_eager")
    with vk.record() as calls:
        results, got = gradients(compiled)
    torch.testing.assert_close(results, wanted)
    close(got, expected)
    assert sorted(launches(calls)[0]) == sorted(["add_layer_norm", *OPS[kind]])


class Module(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Results:
        return self.layer.together(x=x)


@kinds
def test_exported(kind: str) -> None:
    layer = layer_of(kind)
    layer.freeze(*layer.tensors)
    x = layer.tensors["x"]
    program = torch.export.export(Module(layer), (x,))
    names = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("vitkernels")]
    assert names == [f"vitkernels.{op}.default" for op in ("add_layer_norm", *OPS[kind])]
    torch.testing.assert_close(program.module()(x), layer.together())


# ----------------------------------------------------------------------------------------------- other people's code


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"], indirect=True)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@kinds
def test_checkpoints(kind: str, reentrant: bool, smallest: int) -> None:
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    with vk.record() as calls:
        results = checkpoint(lambda x: layer.together(x=x), layer.tensors["x"], use_reentrant=reentrant)
        torch.autograd.backward(results, [weights_like(each) for each in results])
    check_equal({name: each.grad for name, each in layer.learn.items()}, expected)
    assert norms(calls) == 2 + (smallest == 0)


@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"], indirect=True)
@kinds
def test_saved_tensors_that_wait_elsewhere(kind: str, smallest: int) -> None:
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    with torch.autograd.graph.save_on_cpu(), vk.record() as calls:
        results = layer.together()
        check_equal(layer.gradients(results), expected)
    assert norms(calls) == 1 + (smallest == 0)


@pytest.mark.parametrize("smallest", [0], indirect=True)
@pytest.mark.parametrize("whole", [True, False], ids=["both passes", "backward"])
@kinds
def test_profiled(kind: str, whole: bool, smallest: int) -> None:
    """A profiler sends calls through torch's dispatcher, where it sees them."""
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    results = None if whole else layer.together()
    with vk.record() as calls, torch.profiler.profile() as profile:
        got = layer.gradients(layer.together() if results is None else results)
    check_equal(got, expected)
    assert norms(calls) == (2 if whole else 1), "the norm is made again in backward, as ever"
    seen = {event.name for event in profile.events()}
    assert {f"vitkernels::{op}_backward" for op in ("add_layer_norm", *OPS[kind])} <= seen


class Named(Tensor):
    pass


@kinds
def test_tensor_subclasses(kind: str) -> None:
    layer = layer_of(kind)
    expected = layer.gradients(layer.together())
    layer.tensors["x"] = layer.tensors["x"].detach().as_subclass(Named).requires_grad_()
    with vk.record() as calls:
        got = layer.gradients(layer.together())
    check_equal(got, expected)
    assert launches(calls)[0] == ["add_layer_norm", *OPS[kind]]


@kinds
def test_meta_tensors(kind: str) -> None:
    layer = layer_of(kind)
    expected = layer.together()
    if layer.images is not None:
        layer.images = layer.images._replace(cu_seqlens=layer.images.cu_seqlens.to("meta"))
    with vk.record() as calls:
        got = layer.together(**{name: each.to("meta") for name, each in layer.tensors.items()})
    assert not calls
    assert [(each.shape, each.dtype, each.device.type) for each in got] == [
        (each.shape, each.dtype, "meta") for each in expected
    ]
