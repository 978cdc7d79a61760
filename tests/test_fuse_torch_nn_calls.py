"""vk.fuse on torch.nn's Transformer layers among hooks, subclasses, odd calls, and torch's own tools."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_layers import CROSS, OPS, Attention, B, D, H, M, N, causal, encoder, layer_of, tokens

import vitkernels as vk
from vitkernels.nn.naive import NaiveVisionTransformer

# ---------------------------------------------------------------------------------------- what others hang on it


@pytest.mark.parametrize(
    ("inner", "part", "words"),
    [
        ("self_attn", "self_attn", "a hook on self_attn"),
        ("linear1", "feed_forward", "a hook on linear1"),
        ("norm2", "feed_forward residual", "a hook on the norm of feed_forward"),
    ],
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_hook_on_an_inner_module(inner: str, part: str, words: str, norm_first: bool) -> None:
    layer = layer_of(norm_first=norm_first)
    fused.stir(layer)
    x, seen = tokens(), []
    expected = layer(x)
    vk.fuse(layer)
    layer.get_submodule(inner).register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1
    assert {row.part: row.why_not for row in vk.explain(layer).rows}[part] == words


def test_changed_output_projection_is_read_as_torch_reads_it() -> None:
    """nn.MultiheadAttention multiplies by out_proj's weight and never calls it."""
    model, x = Attention(), tokens()
    expected = model(x)
    vk.fuse(model)
    model.get_submodule("attn.out_proj").register_forward_hook(lambda *call: pytest.fail("called"))
    torch.testing.assert_close(model(x), expected)
    assert [row.why_not for row in vk.explain(model).rows] == ["a hook on out_proj"]


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *masks: Any, **keywords: Any) -> Tensor:
        return src * 2


class OwnStep(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return x * 2


class OwnName(nn.TransformerEncoderLayer):
    pass


def test_subclasses() -> None:
    options = {"d_model": D, "nhead": H, "dropout": 0.0, "batch_first": True}
    changed = OwnName(**options)
    changed._ff_block = torch.tanh  # type: ignore[method-assign]
    model = nn.Sequential(OwnForward(**options), OwnStep(**options), OwnName(**options), changed)
    fused.stir(model)
    explanation = fused.check_parity(model, (tokens(),), ops=OPS)
    assert list(explanation.unfused) == ["0", "1", "3"]
    assert explanation.unfused["1"] == explanation.unfused["3"] == "it has a _ff_block of its own"
    assert {row.module for row in explanation.rows if row.ops} == {"0.self_attn", "1.self_attn", "2", "3.self_attn"}


# ---------------------------------------------------------------------------------------------- calls left to torch


INTEGERS = "called with a mask of torch.int64, and tokens of torch.float32"


@pytest.mark.parametrize(
    ("inputs", "keywords", "words"),
    [
        (1, {"is_causal": True}, "argument 'is_causal' is True without src_mask; needs the causal mask too"),
        (1, {"src_mask": torch.zeros(1, N)}, "argument 'src_mask' has shape [1, 7]; needs [7, 7] or [12, 7, 7]"),
        (1, {"src_key_padding_mask": torch.zeros(B, N, dtype=torch.int64)}, INTEGERS),
        (2, {"tgt_mask": torch.zeros(N, 1)}, "argument 'tgt_mask' has shape [7, 1]; needs [7, 7] or [12, 7, 7]"),
        (2, {"memory_mask": torch.zeros(1, N)}, "argument 'memory_mask' has shape [1, 7]; needs [7, 7] or [12, 7, 7]"),
    ],
)
def test_call_that_torch_refuses(inputs: int, keywords: dict[str, Any], words: str) -> None:
    layer = layer_of(nn.TransformerEncoderLayer if inputs == 1 else nn.TransformerDecoderLayer)
    given = [tokens()] * inputs
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        layer(*given, **keywords)
    vk.fuse(layer)
    with pytest.raises(expected.type) as got:
        layer(*given, **keywords)
    assert str(got.value) == str(expected.value)
    ((reason, count),) = vk.explain(layer).fallbacks[""].items()
    assert (reason.split(": ")[-1], count) == (words, 1)


def test_one_sequence_without_a_batch() -> None:
    layer, x = layer_of(), torch.randn(N, D)
    expected = layer(x)
    assert torch.equal(vk.fuse(layer)(x), expected)
    assert vk.explain(layer).fallbacks[""] == {"called without a batch": 1}


# ------------------------------------------------------------------------------------------------------- frameworks


def a_transformer() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    model = nn.Transformer(D, H, 1, 1, 96, dropout=0.0, batch_first=True)
    fused.stir(model)
    return model, (tokens(), tokens(length=M)), {"tgt_mask": causal(M), "tgt_is_causal": True}


def test_compile() -> None:
    model, inputs, keywords = a_transformer()
    expected = fused.output_and_gradients(model, inputs, keywords)
    compiled = torch.compile(vk.fuse(model), fullgraph=True, backend="aot_eager")
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, inputs, keywords)
    assert {call.op for call in calls} == CROSS
    for (name, tensor), exact in zip(got.items(), expected.values(), strict=True):
        torch.testing.assert_close(tensor, exact, msg=name)


def test_export() -> None:
    model, inputs, keywords = a_transformer()
    with torch.no_grad():
        expected = model(*inputs, **keywords)
        program = torch.export.export(vk.fuse(model.eval()), inputs, keywords)
        torch.testing.assert_close(program.module()(*inputs, **keywords), expected)
    assert "vitkernels.attention_qkv.default" in str(program.graph)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(again: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs, keywords = a_transformer()
    expected = vk.fuse(model)(*inputs, **keywords)
    twin = again(model)
    assert torch.equal(twin(*inputs, **keywords), expected)
    assert vk.explain(twin).summary == "2 of 2 blocks fused"
    assert type(vk.unfuse(twin).get_submodule("encoder.layers.0")) is nn.TransformerEncoderLayer


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    model = vk.fuse(encoder(norm_first=True))
    x = tokens()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    out = x
    for layer in model.get_submodule("layers"):  # type: ignore[union-attr]
        out = checkpoint(layer, out, use_reentrant=reentrant)
    model.get_submodule("norm")(out).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_script_compiles_torchs_own() -> None:
    layer, x = layer_of().eval(), tokens()
    expected = layer(x)
    torch.testing.assert_close(torch.jit.script(vk.fuse(layer))(x), expected)
    assert isinstance(layer, nn.TransformerEncoderLayer)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("embedding", ["dnn", "cnn"])
def test_the_tutorials_transformer(embedding: str, norm_first: bool) -> None:
    model = NaiveVisionTransformer(
        32, 8, num_classes=10, embed_dim=D, depth=2, num_heads=3, embedding=embedding, norm_first=norm_first
    )
    fused.stir(model)
    explanation = fused.check_parity(model, (torch.randn(2, 3, 32, 32),), ops=OPS)
    assert explanation.summary == "2 of 2 blocks fused"
