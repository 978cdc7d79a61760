"""vk.fuse on torch.nn's Transformer layers and attention: every layout, held to torch's own numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_layers import (
    CROSS,
    LAYOUTS,
    OPS,
    Adds,
    Attention,
    B,
    D,
    H,
    M,
    N,
    causal,
    decoder,
    encoder,
    layer_of,
    padding,
    tokens,
)

import vitkernels as vk

ACTIVATIONS: dict[str, tuple[Any, bool]] = {"relu": ("relu", True), "gelu": (nn.GELU(), True), "tanh": (F.tanh, False)}

# (mask, key padding, is_causal): as a layer takes them
MASKS: dict[str, Callable[[], tuple[Tensor | None, Tensor | None, bool]]] = {
    "none": lambda: (None, None, False),
    "padding": lambda: (None, padding(), False),
    "bool": lambda: (torch.rand(N, N) > 0.8, None, False),
    "float of each head": lambda: (torch.randn(B * H, N, N, requires_grad=True), None, False),
    "float and float padding": lambda: (
        torch.randn(N, N, requires_grad=True),
        torch.randn(B, N, requires_grad=True),
        False,
    ),
    "bool of each head and padding": lambda: (torch.rand(B * H, N, N) > 0.8, padding(), False),
    "float and bool padding": lambda: (torch.randn(N, N, requires_grad=True), padding(), False),
    "causal, said so": lambda: (causal(), None, True),
    "causal with padding": lambda: (causal().isinf(), padding(), True),
}


# -------------------------------------------------------------------------------------------------- encoder layers


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_encoder_in_every_layout(norm_first: bool, batch_first: bool, activation: str, masks: str) -> None:
    act, known = ACTIVATIONS[activation]
    model = encoder(norm_first=norm_first, batch_first=batch_first, activation=act)
    mask, pad, is_causal = MASKS[masks]()
    ops = OPS if known else OPS - {"mlp"}
    explanation = fused.check_parity(model, (tokens(batch_first), mask, pad), {"is_causal": is_causal}, ops=ops)
    if known:
        assert explanation.summary == "2 of 2 blocks fused"
    else:
        assert explanation.unfused == dict.fromkeys(("layers.0", "layers.1"), "the activation is tanh")


@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"bias": False}, {"layer_norm_eps": 0.1}, {"activation": F.silu}], ids=["no bias", "eps", "silu"]
)
def test_options_of_a_lone_layer(norm_first: bool, batch_first: bool, options: dict[str, Any]) -> None:
    layer = layer_of(norm_first=norm_first, batch_first=batch_first, **options)
    fused.stir(layer)
    mask = torch.rand(N, N) > 0.8
    explanation = fused.check_parity(layer, (tokens(batch_first), mask, padding()), ops=OPS)
    assert explanation.summary == "1 of 1 blocks fused"


def test_rows_of_a_layer() -> None:
    rows = vk.explain(vk.fuse(encoder(norm_first=True))).rows
    assert [(row.module, row.part, row.ops, row.why_not) for row in rows if not row.module.startswith("layers.1")] == [
        ("layers.0", "self_attn", "linear, attention, linear", None),
        ("layers.0", "self_attn residual", "add_layer_norm", None),
        ("layers.0", "feed_forward", "mlp", None),
        ("layers.0", "feed_forward residual", "add_layer_norm", None),
    ]


def test_pre_norm_layers_run_one_by_one() -> None:
    """The loop over the layers is torch's: in each a norm alone, a sum with a norm, and a sum alone."""
    model = vk.fuse(encoder(norm_first=True))
    with vk.record() as calls, Adds() as adds:
        model(tokens())
    assert [call.op for call in calls].count("add_layer_norm") == 2 * 2
    assert adds.count == 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first: bool) -> None:
    # ReLU's derivative jumps: under rounding, chance decides which of two models errs more
    model = encoder(norm_first=norm_first, activation="gelu")
    fused.check_parity(model, (tokens(), None, padding()), ops=OPS, autocast=True)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_tokens_between_layers(norm_first: bool) -> None:
    model, x = encoder(norm_first=norm_first, norm=False), tokens()
    expected = model(x)
    vk.fuse(model, residual_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.1)


# -------------------------------------------------------------------------------------------------- decoder layers

CROSS_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"tgt_mask": causal(M), "tgt_is_causal": True},
    "padded": {"tgt_mask": causal(M), "tgt_key_padding_mask": torch.zeros(B, M), "memory_key_padding_mask": padding()},
    "memory": {"memory_mask": torch.randn(M, N).sigmoid()},
}


@pytest.mark.parametrize("masks", CROSS_MASKS)
@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
def test_decoder_in_every_layout(norm_first: bool, batch_first: bool, masks: str) -> None:
    model = decoder(norm_first=norm_first, batch_first=batch_first)
    inputs = (tokens(batch_first, M), tokens(batch_first))
    explanation = fused.check_parity(model, inputs, CROSS_MASKS[masks], ops=CROSS)
    assert explanation.summary == "2 of 2 blocks fused"
    assert [row.part for row in explanation.rows[:6:2]] == ["self_attn", "multihead_attn", "feed_forward"]


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_transformer(autocast: bool) -> None:
    model = nn.Transformer(D, H, 2, 2, 96, dropout=0.0, activation="gelu", batch_first=True)
    fused.stir(model)
    explanation = fused.check_parity(
        model, (tokens(), tokens(length=M)), CROSS_MASKS["causal"], ops=CROSS, autocast=autocast
    )
    assert explanation.summary == "4 of 4 blocks fused"


# ------------------------------------------------------------------------------------------------ attention alone


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "keys and values of other widths": {"kdim": 24, "vdim": 40},
    "a learned key": {"add_bias_kv": True},
    "a key of zeros": {"add_zero_attn": True},
    "both, sequence first, no bias": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False, "bias": False},
}
ONE_LENGTH: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": torch.eye(N, dtype=torch.bool)},
    "padding": {"key_padding_mask": padding()},
    "both": {"attn_mask": torch.eye(N), "key_padding_mask": torch.zeros(B, N).masked_fill(padding(), -5.0)},
    "float and bool": {"attn_mask": torch.eye(N), "key_padding_mask": padding()},
    "causal": {"attn_mask": causal(), "is_causal": True},
}


# query, key and value are one tensor, two or three
CALLS = [
    (name, apart) for name, given in ATTENTIONS.items() for apart in (1, 2, 3) if apart == 3 or "kdim" not in given
]


@pytest.mark.parametrize("masks", ONE_LENGTH)
@pytest.mark.parametrize(("options", "apart"), CALLS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_attention(options: str, apart: int, masks: str) -> None:
    given = ATTENTIONS[options]
    model = Attention(**given)
    fused.stir(model)
    widths = (D, given.get("kdim", D), given.get("vdim", D))[:apart]
    inputs = tuple(tokens(given.get("batch_first", True), width=width) for width in widths)
    packed = apart == 1 and not given.keys() & {"add_bias_kv", "add_zero_attn"}
    # the gradient of the keys' bias is 0, made of rounding alone
    explanation = fused.check_parity(
        model, inputs, ONE_LENGTH[masks], ops={"linear", "attention_qkv" if packed else "attention"}, absolute=1e-6
    )
    assert [(row.module, row.ops) for row in explanation.rows] == [("attn", "linear, attention, linear")]


def test_weights_of_attention_are_torchs_own() -> None:
    attn = nn.MultiheadAttention(D, H, batch_first=True)
    x = tokens()
    expected, weights = attn(x, x, x, average_attn_weights=False)
    vk.fuse(attn)
    out, got = attn(x, x, x, average_attn_weights=False)
    assert torch.equal(out, expected)
    assert torch.equal(got, weights)
    assert vk.explain(attn).fallbacks == {"": {"called with need_weights=True": 1}}


def test_a_query_with_no_key_left_gets_zeros() -> None:
    model = vk.fuse(Attention())
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[2] = True
    bias = model.get_parameter("attn.out_proj.bias")
    assert torch.equal(model(tokens(), attn_mask=mask)[:, 2], bias.expand(B, D))


# ------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("norm_first", [False, True])
def test_inference(norm_first: bool) -> None:
    """Where torch has one kernel for a whole layer, the fused layer still computes what the layer does."""
    model, mask, pad = encoder(norm_first=norm_first, activation="gelu").eval(), causal(), padding()
    x = tokens()
    expected = model(x, mask, torch.zeros(B, N).masked_fill(pad, -torch.inf))
    vk.fuse(model)
    with torch.inference_mode(), vk.record() as calls:
        got = model(x, mask, torch.zeros(B, N).masked_fill(pad, -torch.inf))
    assert {call.op for call in calls} == OPS
    torch.testing.assert_close(got, expected)


def test_padded_batch_as_a_nested_tensor() -> None:
    """The encoder's own path for padded batches in inference, which answers 0 for the padding."""
    layer = layer_of(activation="gelu")
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D)).eval()  # type: ignore[arg-type]
    fused.stir(model)
    x, pad = tokens().detach(), padding()
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=pad)
        vk.fuse(model)
        with vk.record() as calls:
            got = model(x, src_key_padding_mask=pad)
        assert torch.equal(got, expected)
        assert not calls
        assert vk.explain(model).fallbacks == {
            f"layers.{index}": {"called with a nested tensor": 1} for index in (0, 1)
        }
    with vk.record() as calls:  # with gradients to come, the encoder keeps the padding
        model(x.requires_grad_(), src_key_padding_mask=pad)
    assert {call.op for call in calls} == OPS


def test_encoder_made_of_copies_of_a_fused_layer() -> None:
    layer = layer_of()
    fused.stir(layer)
    stock, x = copy.deepcopy(layer), tokens()
    model = nn.TransformerEncoder(vk.fuse(layer), 2)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), stock(stock(x)))
    assert vk.explain(model).summary == "2 of 2 blocks fused"


# --------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
@pytest.mark.parametrize("of_weights", [0.0, 0.3])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_same_seed_drops_the_same(
    kind: type[nn.Module], of_weights: float, norm_first: bool, batch_first: bool
) -> None:
    layer = layer_of(kind, dropout=0.3, norm_first=norm_first, batch_first=batch_first)
    fused.stir(layer)
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = of_weights
    inputs = [tokens(batch_first)] * (1 if kind is nn.TransformerEncoderLayer else 2)
    torch.manual_seed(1)
    expected, after = layer(*inputs), torch.rand(())
    vk.fuse(layer)
    with vk.record() as calls:
        torch.manual_seed(1)
        got = layer(*inputs)
    torch.testing.assert_close(got, expected)
    assert torch.equal(torch.rand(()), after)
    assert {"linear", "add_layer_norm"} <= {call.op for call in calls}
    rows = {row.part: (row.ops, row.why_not) for row in vk.explain(layer).rows}
    why = "a dropout of attention's weights"
    assert rows["self_attn"] == (("linear, linear", why) if of_weights else ("linear, attention, linear", None))
    assert rows["feed_forward"] == ("linear, linear", "a dropout after the activation")
    assert rows["self_attn residual"] == ("add_layer_norm", None)


def test_eval_drops_nothing() -> None:
    model = encoder(dropout=0.3)
    assert "dropout" in vk.explain(vk.fuse(model)).summary
    assert vk.explain(model.eval()).summary == "2 of 2 blocks fused"
    fused.check_parity(vk.unfuse(model), (tokens(),), ops=OPS)
