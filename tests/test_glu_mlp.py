"""glu_mlp beyond the case list: projections apart, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import glu_mlp, glu_mlp_apart
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vitkernels as vk


def test_projections_apart_are_those_packed(backend: str) -> None:
    case = glu_mlp("apart", (2, 5), (16, 24, 8))
    tensors = case.build(torch.float32)
    apart = {
        name: tuple(half.detach().clone().requires_grad_() for half in tensors[name].chunk(2))
        for name in ("w_gate_up", "b_gate_up")
    }
    with vk.use(backend), vk.record() as calls:
        packed, split = (case.call({**tensors, **given})["out"] for given in ({}, apart))
        packed.square().sum().backward()
        split.square().sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("glu_mlp", backend)] * 4
    assert torch.equal(split, packed)
    for name, halves in apart.items():
        torch.testing.assert_close(torch.cat([half.grad for half in halves]), tensors[name].grad)


@pytest.mark.parametrize("biases", ["packed", "apart"])
def test_weights_and_biases_may_lie_in_different_ways(backend: str, biases: str) -> None:
    """What is the one way for weights and the other way for biases is what both are the one way."""
    given = glu_mlp("mixed").build(torch.float32)
    weight, bias = (given[name].detach().clone() for name in ("w_gate_up", "b_gate_up"))
    mixed = dict(given)
    if biases == "packed":
        mixed["w_gate_up"] = weight.chunk(2)
    else:
        mixed["b_gate_up"] = bias.chunk(2)
    with vk.use(backend):
        assert torch.equal(vk.ops.glu_mlp(**mixed), vk.ops.glu_mlp(**given))
        half = {**mixed, "b_gate_up": (bias[:24], None)}
        zeros = {**given, "b_gate_up": torch.cat([bias[:24], torch.zeros(24)])}
        assert torch.equal(vk.ops.glu_mlp(**half), vk.ops.glu_mlp(**zeros))


def _copied(run: Callable[[], Tensor]) -> list[list[int]]:
    """Shapes of what torch copies or joins while `run` and its backward pass do their work, in C++ as in Python."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen, vk.record() as calls:
        run().sum().backward()
    assert {(call.op, call.backend) for call in calls} >= {("glu_mlp", "ext")}
    events = [event for event in seen.events() if event.name in ("aten::cat", "aten::copy_")]
    return [event.input_shapes[0] for event in events]


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize(
    ("library", "dtype"), [("torch", torch.float32), ("vitkernels", torch.float32), ("vitkernels", torch.bfloat16)]
)
def test_weights_apart_are_not_copied(force_library, library: str, dtype: torch.dtype, rows: int) -> None:
    force_library(library)
    case = glu_mlp_apart("copies", (rows,), (32, 64, 32), biases=())
    tensors = case.build(dtype)
    with vk.use("ext"):
        copied = _copied(lambda: case.call(tensors)["out"])
    assert not [shape for shape in copied if shape in ([64, 32], [128, 32])], copied


def test_a_block_with_weights_apart_copies_none_of_them(force_library) -> None:
    from timm_vit import timm

    force_library("vitkernels")
    block = timm.models.vision_transformer.Block(64, 2, mlp_layer=timm.layers.SwiGLU, mlp_ratio=3.0)
    vk.fuse(block)
    x, weights = torch.randn(2, 40, 64), {tuple(each.shape) for each in block.parameters() if each.dim() == 2}
    assert not [shape for shape in _copied(lambda: block(x)) if tuple(shape) in weights]
    assert "glu_mlp" in str(vk.explain(block))


def test_the_pre_activations_alone_are_kept(backend: str) -> None:
    tensors = glu_mlp("kept").build(torch.float32)
    kept: list[torch.Tensor] = []
    with vk.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda x: x):
        vk.ops.glu_mlp(**tensors)
    arguments = {each.data_ptr() for each in tensors.values()}
    assert [list(each.shape) for each in kept if each.data_ptr() not in arguments] == [[2, 5, 48]]


def test_weights_apart_compile_to_one_graph(backend: str) -> None:
    case = glu_mlp_apart("compiled", (3, 5))
    leaves, compiled = case.build(torch.float32), case.build(torch.float32)
    run = torch.compile(lambda given: case.call(given)["out"], backend="aot_eager", fullgraph=True)
    with vk.use(backend), vk.record() as calls:
        case.call(leaves)["out"].square().sum().backward()
        run(compiled).square().sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("glu_mlp", backend)] * 4
    for name, leaf in leaves.items():
        assert torch.equal(compiled[name].grad, leaf.grad), name
