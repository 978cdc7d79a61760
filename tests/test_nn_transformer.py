"""vk.nn's twins of torch.nn's Transformer layers and attention, beside torch's own."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import accuracy
import fused
import pytest
import torch
import torch.nn.functional as F
from refused import check_refused
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_layers import CROSS, LAYOUTS, OPS, B, D, H, M, N, causal, layer_of, padding, tokens

import vitkernels as vk

KINDS = ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"]
ATTENTION = {"linear", "attention"}
PACKED = {"linear", "attention_qkv"}


def pair(kind: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's module with stirred weights, and its twin with the same."""
    theirs, ours = getattr(nn, kind)(*args, **options), getattr(vk.nn, kind)(*args, **options)
    fused.stir(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def layers(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    return pair(kind, D, H, **{"dim_feedforward": 96, "dropout": 0.0, "batch_first": True, **options})


def check_twin(
    theirs: nn.Module,
    ours: nn.Module,
    inputs: fused.Inputs,
    keywords: dict[str, Any],
    ops: set[str],
    autocast: bool = False,
    absolute: float = fused.FLOOR.absolute,
) -> None:
    own, exact = fused.own_numbers(theirs, inputs, keywords, autocast=autocast)
    got = fused.served(ours, inputs, keywords, ops=ops, autocast=autocast)
    accuracy.check(got, own, exact, dataclasses.replace(fused.FLOOR, absolute=absolute))


# --------------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_keys_and_first_weights_are_torchs(kind: str) -> None:
    theirs, ours = getattr(nn, kind), getattr(vk.nn, kind)
    assert inspect.signature(ours) == inspect.signature(theirs)
    found = []
    for cls in (theirs, ours):
        torch.manual_seed(0)
        found.append(cls(D, H, device="cpu", dtype=torch.float64).state_dict())
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.nn.utils.skip_init(ours, D, H).state_dict().keys() == found[0].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_what_fuse_makes_of_torchs(kind: str) -> None:
    theirs, ours = pair(kind, D, H)
    vk.fuse(theirs)
    for name, module in theirs.named_modules():
        twin = ours.get_submodule(name)
        if not isinstance(module, nn.LayerNorm | nn.Linear | nn.Dropout):
            assert type(twin).__bases__[0] is type(module).__bases__[0], "one text"
            assert isinstance(twin, getattr(vk.nn, type(module).__name__))
    assert str(vk.explain(ours)) == str(vk.explain(theirs))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_they_stay_what_they_are(kind: str, again: Callable[[nn.Module], nn.Module]) -> None:
    _, layer = layers(kind)
    inputs = [tokens()] * (2 if kind == "TransformerDecoderLayer" else 1)
    expected, cls = layer(*inputs), type(layer)
    for twin in (again(layer), vk.unfuse(layer), vk.fuse(layer, residual_dtype=torch.bfloat16), vk.unfuse(layer)):
        assert type(twin) is cls
        assert torch.equal(twin(*inputs), expected)
        assert vk.explain(twin).summary == "1 of 1 blocks fused"
    assert layer._vitkernels.residual_dtype is None, "fuse's options are gone"
    assert vk.verify(layer, *inputs).ok, "against torch's own code"


def test_a_class_made_of_theirs_later() -> None:
    """By parametrizations, as by FSDP2; and a new one by the type, as adapters make it."""
    _, attn = pair("MultiheadAttention", D, H, batch_first=True)
    x = tokens()
    expected = attn(x, x, x, need_weights=False)[0]
    assert vk.explain(type(attn)(D, H)).rows == vk.explain(attn).rows
    parametrize.register_parametrization(attn, "in_proj_weight", nn.Identity())
    assert vk.unfuse(attn) is attn
    torch.testing.assert_close(attn(x, x, x, need_weights=False)[0], expected)
    assert [row.why_not for row in vk.explain(attn).rows] == ["a parametrization"]


def test_subclasses() -> None:
    class Scaled(vk.nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    class Named(vk.nn.TransformerEncoderLayer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.name = "one of mine"

    theirs, _ = layers("TransformerEncoderLayer")
    named, scaled = layer_of(Named), layer_of(Scaled)
    for layer in (named, scaled):
        layer.load_state_dict(theirs.state_dict())
    x = tokens()
    torch.testing.assert_close(named(x), theirs(x))
    assert vk.explain(named).summary == "1 of 1 blocks fused"
    assert vk.explain(scaled).summary == "0 of 1 blocks fused; block 0: it has a _ff_block of its own"
    hidden = theirs.norm1(x + theirs._sa_block(x, None, None))
    torch.testing.assert_close(scaled(x), theirs.norm2(hidden + 2 * theirs._ff_block(hidden)))


# ---------------------------------------------------------------------------------------------------- numbers


LAYER_OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "relu": ({}, {"mlp"}),
    "gelu": ({"activation": "gelu", "layer_norm_eps": 0.1}, {"mlp"}),
    "a module, no bias": ({"activation": nn.SiLU(), "bias": False}, {"mlp"}),
    "a callable": ({"activation": lambda x: F.mish(x)}, set()),
}


# ReLU's derivative jumps: under rounding, chance decides which of two models errs more
@pytest.mark.parametrize(
    ("given", "autocast"), [*((given, False) for given in LAYER_OPTIONS), ("gelu", True), ("a module, no bias", True)]
)
@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_layers(kind: str, norm_first: bool, batch_first: bool, given: str, autocast: bool) -> None:
    options, mlp = LAYER_OPTIONS[given]
    theirs, ours = layers(kind, norm_first=norm_first, batch_first=batch_first, **options)
    ops = (OPS if kind == "TransformerEncoderLayer" else CROSS) - {"mlp"} | mlp
    if kind == "TransformerEncoderLayer":
        inputs, masks = (tokens(batch_first),), {"src_mask": causal(), "src_key_padding_mask": torch.zeros(B, N)}
    else:
        inputs = (tokens(batch_first, M), tokens(batch_first))
        masks = {"tgt_mask": causal(M), "tgt_is_causal": True, "memory_key_padding_mask": padding()}
    check_twin(theirs, ours, inputs, masks, ops, autocast)
    assert vk.explain(ours).fallbacks == {}


ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int, set[str]]] = {
    # options, keywords, how many of query, key and value are apart
    "self": ({}, {}, 1, PACKED),
    "cross, tokens first": ({"batch_first": False}, {"key_padding_mask": padding()}, 2, ATTENTION),
    "causal": ({"bias": False}, {"attn_mask": causal(), "is_causal": True}, 1, PACKED),
    "widths": ({"kdim": 24, "vdim": 40}, {"attn_mask": torch.eye(N, dtype=torch.bool)}, 3, ATTENTION),
    "own keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": torch.eye(N)}, 3, ATTENTION),
    "of each head": ({}, {"attn_mask": torch.randn(B * H, N, N), "key_padding_mask": torch.zeros(B, N)}, 1, PACKED),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", ATTENTIONS)
def test_attention(given: str, autocast: bool) -> None:
    options, keywords, apart, ops = ATTENTIONS[given]
    options = {"batch_first": True, **options}
    theirs, ours = pair("MultiheadAttention", D, H, **options)
    widths = (D, options.get("kdim", D), options.get("vdim", D))[:apart]
    query, *others = (tokens(options["batch_first"], width=width) for width in widths)
    inputs = (query, others[0], others[-1]) if others else (query,) * 3
    keywords = {"need_weights": False, **keywords}
    # the gradient of the keys' bias is 0, made of rounding alone
    check_twin(theirs, ours, inputs, keywords, ops, autocast, absolute=2e-3 if autocast else 1e-6)
    assert vk.explain(ours).fallbacks == {}


STOCK: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "averaged maps": ("MultiheadAttention", ((B, N, D),) * 3, {}, "called with need_weights=True"),
    "maps of each head": (
        "MultiheadAttention",
        ((B, N, D),) * 3,
        {"average_attn_weights": False},
        "called with need_weights=True",
    ),
    "one image": ("MultiheadAttention", ((N, D),) * 3, {"need_weights": False}, "called without a batch"),
    "one sequence": ("TransformerEncoderLayer", ((N, D),), {}, "called without a batch"),
    "one of each": ("TransformerDecoderLayer", ((M, D), (N, D)), {}, "called without a batch"),
}


@pytest.mark.parametrize("given", STOCK)
def test_what_no_kernel_serves_runs_torchs_code(given: str) -> None:
    kind, shapes, keywords, reason = STOCK[given]
    theirs, ours = pair(kind, D, H, dropout=0.0, batch_first=True)
    inputs = [torch.randn(shape) for shape in shapes]
    expected, got = theirs(*inputs, **keywords), ours(*inputs, **keywords)
    assert all(torch.equal(*each) for each in zip(expected, got, strict=True) if isinstance(each[0], Tensor))
    assert vk.explain(ours).fallbacks[""] == {reason: 1}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_same_seed_drops_the_same(kind: str, norm_first: bool) -> None:
    theirs, ours = layers(kind, dropout=0.3, norm_first=norm_first)
    inputs = [tokens()] * (2 if kind == "TransformerDecoderLayer" else 1)
    results = []
    with vk.record() as calls:
        for layer in (theirs, ours):
            torch.manual_seed(1)
            results.append(layer(*inputs))
    torch.testing.assert_close(*results)
    assert {call.op for call in calls} == {"linear", "add_layer_norm"}
    assert "a dropout of attention's weights" in vk.explain(ours).summary


# ------------------------------------------------------------------------------------------- inside torch's stacks


def stacked(**options: Any) -> tuple[nn.Module, nn.Module]:
    """nn.Transformer of torch's layers, and of the twins."""
    models = []
    for library in (nn, vk.nn):
        given = {"dim_feedforward": 96, "dropout": 0.0, "activation": "gelu", "batch_first": True, **options}
        encoder = nn.TransformerEncoder(library.TransformerEncoderLayer(D, H, **given), 2, nn.LayerNorm(D))
        decoder = nn.TransformerDecoder(library.TransformerDecoderLayer(D, H, **given), 2, nn.LayerNorm(D))
        models.append(nn.Transformer(D, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True))
    fused.stir(models[0])
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_transformer(autocast: bool) -> None:
    theirs, ours = stacked()
    masks = {"tgt_mask": causal(M), "tgt_is_causal": True, "src_key_padding_mask": padding()}
    assert vk.explain(ours).summary == "4 of 4 blocks fused"
    check_twin(theirs, ours, (tokens(), tokens(length=M)), masks, CROSS, autocast)
    assert vk.explain(ours).fallbacks == {}


def test_inference_beside_torchs_one_kernel_of_a_layer() -> None:
    theirs, ours = (each.encoder.eval() for each in stacked())
    x = tokens().detach()
    with torch.inference_mode():
        expected = theirs(x)
        with vk.record() as calls:
            got = ours(x)
    assert {call.op for call in calls} == OPS
    torch.testing.assert_close(got, expected)


def test_padded_batch_in_inference() -> None:
    """torch's encoder makes a nested tensor of it, which its own layers take, and answers 0 for the padding."""
    theirs, ours = (each.encoder.eval() for each in stacked())
    x = tokens().detach()
    with torch.inference_mode():
        expected = theirs(x, src_key_padding_mask=padding())
        assert torch.equal(ours(x, src_key_padding_mask=padding()), expected)
    reasons = {"called with a nested tensor": 1}
    assert vk.explain(ours).fallbacks == {"layers.0": reasons, "layers.1": reasons}


def test_compile() -> None:
    theirs, ours = layers("TransformerEncoderLayer", norm_first=True)
    inputs, masks = (tokens(),), {"src_mask": causal(), "is_causal": True}
    expected = fused.output_and_gradients(theirs, inputs, masks)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = fused.served(compiled, inputs, masks, ops=OPS)
    fused.check_same({name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}, expected)


# ------------------------------------------------------------------------------------------------------- bad calls


def attend(*given: Any, **keywords: Any) -> Callable[[nn.Module], Any]:
    return lambda attn: attn(*given, need_weights=False, **keywords)


X = torch.zeros(B, N, D)
INTEGERS = torch.zeros(N, N, dtype=torch.int64)
BAD: list[tuple[str, dict[str, Any], Callable[[nn.Module], Any], type[Exception], tuple[str, ...]]] = [
    (
        "MultiheadAttention",
        {"kdim": 24},
        attend(X, X, X),
        ValueError,
        ("'key' has a last axis of 48", "needs kdim, 24"),
    ),
    ("MultiheadAttention", {"kdim": 24}, attend(X, None, None), TypeError, ("'key' got NoneType", "torch.Tensor")),
    ("MultiheadAttention", {"vdim": 40}, attend(X, X, X), ValueError, ("'value'", "48", "needs vdim, 40")),
    ("MultiheadAttention", {}, attend(X[..., :40], X, X), ValueError, ("'query'", "40", "needs embed_dim, 48")),
    ("MultiheadAttention", {}, attend(X, X[:2], X[:2]), ValueError, ("'key' has a batch of 2", "query's, 3")),
    ("MultiheadAttention", {}, attend(X, X, X[:, :6]), ValueError, ("'value'", "[3, 6, 48]", "needs key's", "[3, 7]")),
    (
        "MultiheadAttention",
        {},
        attend(X, X, X, attn_mask=torch.zeros(1, N)),
        ValueError,
        ("'attn_mask' has shape [1, 7]", "needs [7, 7] or [12, 7, 7]"),
    ),
    (
        "MultiheadAttention",
        {},
        attend(X, X, X, attn_mask=torch.zeros(B, N, N)),
        ValueError,
        ("'attn_mask'", "[3, 7, 7]", "[12, 7, 7]"),
    ),
    ("MultiheadAttention", {}, attend(X, X, X, attn_mask=[[0.0]]), TypeError, ("'attn_mask' got list", "torch.Tensor")),
    (
        "MultiheadAttention",
        {},
        attend(X, X, X, key_padding_mask=torch.zeros(N, B)),
        ValueError,
        ("'key_padding_mask'", "[7, 3]", "needs [3, 7]"),
    ),
    ("MultiheadAttention", {}, attend(X, X, X, is_causal=True), ValueError, ("'is_causal' is True without attn_mask",)),
    (
        "MultiheadAttention",
        {},
        lambda attn: attn(X, X, X, attn_mask=torch.zeros(N, 1)),
        ValueError,
        ("'attn_mask' has shape [7, 1]", "needs [7, 7]"),
    ),
    (
        "TransformerEncoderLayer",
        {},
        lambda layer: layer(X[..., :47]),
        ValueError,
        ("'src' has a last axis of 47", "needs embed_dim, 48"),
    ),
    (
        "TransformerEncoderLayer",
        {},
        lambda layer: layer(X, torch.zeros(N, 1)),
        ValueError,
        ("'src_mask' has shape [7, 1]", "needs [7, 7]"),
    ),
    ("TransformerEncoderLayer", {}, lambda layer: layer(X, is_causal=True), ValueError, ("'is_causal'", "src_mask")),
    (
        "TransformerDecoderLayer",
        {},
        lambda layer: layer(X, X[..., :40]),
        ValueError,
        ("'memory' has a last axis of 40", "needs kdim, 48"),
    ),
    (
        "TransformerDecoderLayer",
        {},
        lambda layer: layer(X, X[:, :M], memory_key_padding_mask=padding()),
        ValueError,
        ("'memory_key_padding_mask' has shape [3, 7]", "needs [3, 5]"),
    ),
    ("TransformerDecoderLayer", {}, lambda layer: layer(X, None), TypeError, ("'memory' got NoneType",)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "options", "call", "error", "words"), BAD)
def test_bad_calls(
    kind: str,
    options: dict[str, Any],
    call: Callable[[nn.Module], Any],
    error: type[Exception],
    words: tuple[str, ...],
    training: bool,
) -> None:
    """In eval torch itself lets some of them through."""
    module = getattr(vk.nn, kind)(D, H, batch_first=True, dropout=0.0, **options).train(training)
    with torch.set_grad_enabled(training):
        check_refused(lambda: call(module), error, (f"{kind}: argument", *words))


def test_masks_of_integers_are_torchs_to_refuse() -> None:
    layer = vk.nn.TransformerEncoderLayer(D, H, batch_first=True)
    with pytest.raises((RuntimeError, AssertionError), match="only bool and floating types"):
        layer(X, INTEGERS)
