"""Calls that are too small to gain: in float32 on a CPU they run the module's own code, and say so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import fused
import peers
import pytest
import torch
from conftest import skip_without
from hf_towers import TOWERS, call_of, layers, tower
from timm_blocks import BLOCKS
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.fuse import worth

Call = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], set[str]]


def _layer(name: str) -> Call:
    model = tower(name)
    (layer, *_) = layers(vk.fuse(model)).values()
    vk.unfuse(model)
    return layer, *call_of(layer), TOWERS[name][0]


def _block(name: str) -> Call:
    build, size, keywords, ops = BLOCKS[name]
    return build(), (torch.randn(size, requires_grad=True),), keywords, ops


MAKE: dict[str, Callable[[], Call]] = {
    **{name: lambda name=name: _layer(name) for name in ("segformer", "glpn", "pvt_v2")},  # type: ignore[misc]
    **{f"timm's {name}": lambda name=name: _block(name) for name in BLOCKS if "pvt" in name},  # type: ignore[misc]
}


@pytest.fixture(params=MAKE)
def call(request: pytest.FixtureRequest) -> Call:
    """A stock block and a small call of it, with the ops that would run."""
    skip_without("ext")
    torch.manual_seed(0)
    found = MAKE[request.param]()
    fused.stir(found[0])
    return found


def test_a_small_call_in_float32_is_the_stock_blocks_bit_for_bit(call: Call) -> None:
    block, inputs, keywords, _ = call
    own = fused.output_and_gradients(block, inputs, keywords)
    vk.fuse(block)
    with vk.record() as calls:
        got = fused.output_and_gradients(block, inputs, keywords)
    assert not calls
    assert got.keys() == own.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in own.items())
    explanation = vk.explain(block)
    assert explanation.fallbacks[""] == {worth.TOO_SMALL: 1}
    assert f"1 calls ran its own code: {worth.TOO_SMALL}" in str(explanation)
    assert explanation.summary == "1 of 1 blocks fused"  # under autocast, and in larger calls


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_whole_models_are_the_stock_models_bit_for_bit(library: str) -> None:
    """The convolutions that make the keys' image smaller too, which are products of patches where they are fused."""
    skip_without("ext")
    torch.manual_seed(0)
    if library == "timm":
        model = peers.import_timm().create_model("pvt_v2_b0", depths=(1, 1, 1, 1))
    else:
        model = tower("segformer", sr_ratios=[8])
    fused.stir(model)
    images = (torch.randn(1, 3, 64, 64),)
    own = fused.output_and_gradients(model.eval(), images)
    vk.fuse(model)
    with vk.record() as calls:
        got = fused.output_and_gradients(model, images)
    assert not calls
    assert all(torch.equal(got[name], tensor) for name, tensor in own.items())
    with vk.use("ext"), vk.record() as calls:
        fused.output_and_gradients(model, images)
    assert {"patch_embed", "attention", "linear", "add_layer_norm"} <= {call.op for call in calls}


def test_the_same_block_runs_fused_under_bf16_autocast(call: Call) -> None:
    block, inputs, keywords, ops = call
    fused.served(vk.fuse(block), inputs, keywords, ops=ops, autocast=True)
    assert not vk.explain(block).fallbacks


@pytest.mark.parametrize("backend", ["ext", "reference"])
@pytest.mark.parametrize("by", ["use", "fuse"])
def test_backends_that_are_named_serve_small_calls_too(call: Call, backend: str, by: str) -> None:
    block, inputs, keywords, ops = call
    vk.fuse(block, backend=backend if by == "fuse" else None)
    with vk.use(backend) if by == "use" else contextlib.nullcontext(), vk.record() as calls:
        fused.output_and_gradients(block, inputs, keywords)
    assert {each.op for each in calls} == ops
    assert {each.backend for each in calls} == {backend}
    assert not vk.explain(block).fallbacks


def test_larger_calls_run_fused(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs, keywords, ops = call
    (tokens,) = inputs
    monkeypatch.setattr(worth, "_LEAST", tokens.numel() * tokens.shape[-1] // torch.get_num_threads())
    fused.served(vk.fuse(block), inputs, keywords, ops=ops)
    assert not vk.explain(block).fallbacks


def test_a_compiled_graph_follows_the_backends_and_so_is_fused(call: Call) -> None:
    block, inputs, keywords, ops = call
    compiled = torch.compile(vk.fuse(block), backend="aot_eager", fullgraph=True)
    fused.served(compiled, inputs, keywords, ops=ops)


def test_which_calls_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("ext")
    threads = torch.get_num_threads()
    small, enough = (torch.zeros(1).expand(threads, tokens, 1000) for tokens in (47, 48))
    assert worth.why_not_small(small, -1, None) == worth.TOO_SMALL
    assert worth.why_not_small(enough, -1, None) is None
    assert worth.why_not_small(small, -1, ("ext",)) is None
    for other in (small.bfloat16(), small.double(), small.to("meta")):
        assert worth.why_not_small(other, -1, None) is None
    monkeypatch.setattr(vk.ext, "why_not", lambda: "not built")
    assert worth.why_not_small(small, -1, None) is None


def test_verify_says_that_nothing_ran_and_how_it_would(call: Call) -> None:
    block, inputs, keywords, _ = call
    found = vk.verify(block, *inputs, **keywords)
    assert not found.ok
    assert any(worth.TOO_SMALL in note for note in found.notes)
    with vk.use("ext"):
        assert vk.verify(block, *inputs, **keywords).ok
