"""Steps of a residual stream: one autograd Function computes what the public ops compute one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import step_layers
import torch
from step_layers import (
    FACTORS,
    KINDS,
    MASKED,
    OPS,
    Layer,
    check_equal,
    keep_smaller_norms,
    launches,
    norms,
    weights_like,
)
from torch import Tensor

import vitkernels as vk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT, AGAIN = 2**16, 0
kinds = pytest.mark.parametrize("kind", KINDS)


def check_as_one_by_one(layer: Layer, use: str = "both", *, autocast: bool = False) -> list[vk.Call]:
    """The same bits in both results and every gradient, by the same launches; returns the step's calls."""
    found = []
    for run in (layer.apart, layer.together):
        with vk.record() as calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = run()
            grads = layer.gradients(results, use)
        found.append((results, grads, calls))
    (expected, gradients, apart), (got, mine, together) = found
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
    check_equal(mine, gradients)
    assert launches(together) == launches(apart)
    assert launches(together)[0] == ["add_rms_norm" if layer.rms else "add_layer_norm", *OPS[layer.kind]]
    assert len({call.backend for call in together}) == 1
    return together


# -------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("factors", [(), ("branch_bias",), FACTORS], ids=["plain", "bias", "factors"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_outputs_and_gradients(
    backend: str, kind: str, dtype: torch.dtype, bias: bool, factors: tuple[str, ...]
) -> None:
    with vk.use(backend):
        check_as_one_by_one(Layer(kind, dtype, bias=bias, factors=factors))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@kinds
def test_rms_norms(backend: str, kind: str, autocast: bool) -> None:
    with vk.use(backend):
        check_as_one_by_one(Layer(kind, bias=False, rms=True, factors=FACTORS), autocast=autocast)
        check_as_one_by_one(Layer(kind, rms=True, branch=False), "product", autocast=autocast)


@pytest.mark.parametrize("again", [KEPT, AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("rms", [False, True], ids=["", "rms"])
@pytest.mark.parametrize("weight", ["none", "by sample"])
@kinds
def test_norms_of_other_weights(
    backend: str, kind: str, weight: str, rms: bool, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight, or weight, bias and scale of each sample."""
    keep_smaller_norms(monkeypatch, again)
    layer = Layer(kind, rms=rms, factors=FACTORS)
    if weight == "none":
        del layer.tensors["weight"], layer.tensors["bias"]
    else:
        for name in ("weight", "bias", "scale"):
            layer.tensors[name] = torch.randn(step_layers.B, step_layers.D).requires_grad_()
    with vk.use(backend):
        (expected, apart), (got, together) = (
            (results, layer.gradients(results)) for results in (layer.apart(), layer.together())
        )
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    check_equal(together, apart)


@pytest.mark.parametrize("use", ["both", "total", "product"])
@kinds
def test_one_result_used_or_both(backend: str, kind: str, use: str) -> None:
    layer = Layer(kind, factors=FACTORS)
    found = []
    with vk.use(backend):
        for run in (layer.apart, layer.together):
            with vk.record() as calls:
                grads = layer.gradients(run(), use)
            found.append((grads, launches(calls)))
    check_equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    if use == "total":
        assert found[1][1][1] == ["add_layer_norm"], "no product's backward runs for a result that nobody used"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_nothing_is_added(backend: str, kind: str, dtype: torch.dtype) -> None:
    layer = Layer(kind, dtype, branch=False)
    with vk.use(backend):
        check_as_one_by_one(layer, "product")
        got, expected = layer.gradients(layer.together()), layer.gradients(layer.apart())
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    for name, tensor in expected.items():  # the stream's gradient is one sum here, rounded once
        assert tensor is not None
        torch.testing.assert_close(got[name], tensor, rtol=2 * rounding, atol=4 * rounding)
    assert layer.together()[0].data_ptr() == layer.tensors["x"].data_ptr(), "the sum is the stream itself"


@pytest.mark.parametrize("branch", [True, False], ids=["", "nothing added"])
@kinds
def test_autocast(backend: str, kind: str, branch: bool) -> None:
    layer = Layer(kind, branch=branch, factors=FACTORS)
    with vk.use(backend):
        check_as_one_by_one(layer, "both" if branch else "product", autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, product = layer.together()
    assert (total.dtype, product.dtype) == (torch.float32, torch.bfloat16)


@kinds
def test_autocast_leaves_float64_alone(kind: str) -> None:
    check_as_one_by_one(Layer(kind, torch.float64, factors=FACTORS), autocast=True)


@kinds
def test_a_weight_in_float16_narrows_no_other_gradient(backend: str, kind: str) -> None:
    """Of small gradients under bfloat16's autocast, float16 would round most to nothing."""
    layer = Layer(kind)
    alike, found = layer.tensors["w1"].detach().bfloat16().half(), []
    for dtype in (torch.float32, torch.float16):
        layer.tensors["w1"] = alike.to(dtype).requires_grad_()
        with vk.use(backend), vk.record() as calls:
            with torch.autocast("cpu", torch.bfloat16):
                product = layer.together()[1]
            grads = torch.autograd.grad(product, list(layer.learn.values()), 1e-7 * weights_like(product))
        assert {call.op for call in calls if call.direction == "backward"} >= set(OPS[kind])
        found.append(dict(zip(layer.learn, grads, strict=True)))
    expected, got = found
    assert got.pop("w1").dtype == torch.float16
    del expected["w1"]
    check_equal(got, expected)


@kinds
def test_the_stream_widens_to_its_branch(backend: str, kind: str) -> None:
    """A float32 branch on bfloat16 tokens: the sum is float32, and so is what follows."""
    layer = Layer(kind)
    layer.tensors["x"] = layer.tensors["x"].detach().bfloat16().requires_grad_()
    with vk.use(backend):
        check_as_one_by_one(layer)
        assert layer.gradients(layer.together())["x"].dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"mask": True}, {"causal": True}], ids=["mask", "causal"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_masks(backend: str, options: dict[str, Any], autocast: bool) -> None:
    layer = Layer("attention", **options)
    with vk.use(backend):
        check_as_one_by_one(layer, autocast=autocast)
        only = layer.tensors.keys() - {"mask"}
        layer.freeze(*only)
        if "mask" in layer.tensors:
            check_as_one_by_one(layer, autocast=autocast)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "relu", "silu"])
def test_activations(backend: str, activation: str) -> None:
    with vk.use(backend):
        check_as_one_by_one(Layer("mlp", activation=activation))


@kinds
def test_strided_tokens(backend: str, kind: str) -> None:
    layer = Layer(kind)
    batch, tokens, *others = layer.tensors["x"].shape
    wide = torch.randn(tokens, batch, *others[:-1], 2 * others[-1])
    for name in ("x", "branch"):
        layer.tensors[name] = wide.transpose(0, 1)[..., ::2].detach().requires_grad_()
    with vk.use(backend):
        check_as_one_by_one(layer)


@kinds
def test_no_samples(backend: str, kind: str) -> None:
    layer = Layer(kind)
    layer.resize(0, *layer.tensors["x"].shape[1:])
    with vk.use(backend):
        check_as_one_by_one(layer)


# ------------------------------------------------------------------------------------------------------ what learns

FROZEN: dict[str, tuple[str, ...]] = {
    "products": ("w1", "b1", "w_up", "b_up", "w2", "b2"),
    "weights alone": ("weight", "w1", "w_up", "w2"),
    "biases alone": ("bias", "b1", "b_up", "b2", "branch_bias"),
    "norm": ("weight", "bias"),
    "stream": ("x", "branch", *FACTORS),
    "stream and norm": ("x", "branch", *FACTORS, "weight", "bias"),
    "all but the norm": ("x", "branch", *FACTORS, "w1", "b1", "w_up", "b_up", "w2", "b2", "mask"),
    "all but the stream": ("branch", *FACTORS, "weight", "bias", "w1", "b1", "w_up", "b_up", "w2", "b2", "mask"),
    "first weight": ("w1", "b1"),
    "last product": ("w2", "b2"),
    "all that is read by the first product": (
        "x",
        "branch",
        *FACTORS,
        "weight",
        "bias",
        "w1",
        "b1",
        "w_up",
        "b_up",
        "mask",
    ),
}


def learning(kind: str) -> Layer:
    return Layer(kind, factors=FACTORS, mask=kind in MASKED)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("smallest", [KEPT, AGAIN], ids=["kept", "made again"])
@pytest.mark.parametrize("frozen", FROZEN)
@kinds
def test_frozen_tensors(
    backend: str, kind: str, frozen: str, smallest: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = learning(kind)
    layer.freeze(*(name for name in FROZEN[frozen] if name in layer.tensors))
    with vk.use(backend):
        if smallest == KEPT:
            check_as_one_by_one(layer, autocast=autocast)
            return
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = layer.gradients(layer.together())
        keep_smaller_norms(monkeypatch, AGAIN)
        with vk.record() as calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = layer.together()
            check_equal(layer.gradients(results), expected)
    reads = any(layer.tensors[name].requires_grad for name in ("w1", "w_up") if name in layer.tensors)
    learns = any(layer.tensors[name].requires_grad for name in ("x", "branch", *FACTORS, "weight", "bias"))
    assert norms(calls) == 1 + (reads and learns), "made again where a weight's gradient reads it; a frozen one is kept"


@kinds
def test_one_tensor_learns_alone(backend: str, kind: str) -> None:
    for name in learning(kind).tensors:
        layer = learning(kind)
        layer.freeze(*(layer.tensors.keys() - {name}))
        with vk.use(backend):
            check_as_one_by_one(layer)


@kinds
def test_one_tensor_is_frozen_alone(backend: str, kind: str) -> None:
    for name in learning(kind).tensors:
        layer = learning(kind)
        layer.freeze(name)
        with vk.use(backend):
            check_as_one_by_one(layer)


@kinds
def test_a_sum_of_frozen_tensors_is_frozen(kind: str) -> None:
    for branch in (True, False):
        layer = Layer(kind, branch=branch)
        layer.freeze(*({"x", "branch"} & layer.tensors.keys()))
        total, product = layer.together()
        assert not total.requires_grad
        assert product.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@kinds
def test_without_gradients(backend: str, kind: str, mode: Callable[[], Any]) -> None:
    layer = learning(kind)
    with vk.use(backend), mode():
        with vk.record() as calls:
            got = layer.together()
        expected = layer.apart()
    assert not any(each.requires_grad for each in got)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert launches(calls) == (["add_layer_norm", *OPS[kind]], [])


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("linear", {"w1": torch.zeros(4, 7)}, "linear: argument 'weight'"),
        ("mlp", {"w2": torch.zeros(4, 7)}, "mlp: argument 'w2'"),
        ("attention", {"w2": torch.zeros(4, 7)}, "linear: argument 'weight'"),
        ("attention", {"w1": torch.zeros(7, step_layers.D), "b1": torch.zeros(7)}, "attention_qkv: argument"),
        ("linear", {"branch": torch.zeros(1, 7)}, "add_layer_norm: argument 'branch'"),
        ("linear", {"bias": torch.zeros(7)}, "add_layer_norm: argument 'bias'"),
    ],
)
def test_bad_input_is_named_before_any_kernel(kind: str, given: dict[str, Tensor], sentence: str) -> None:
    with vk.record() as calls, pytest.raises(ValueError, match=f"^{sentence}"):
        Layer(kind).together(**given)
    assert not calls


@kinds
def test_what_backward_does_not_read_may_be_written_into(backend: str, kind: str) -> None:
    layer = Layer(kind)
    layer.freeze("x", "branch", "weight", "bias")
    with vk.use(backend):
        expected = layer.gradients(layer.together())
        results = layer.together()
        with torch.no_grad():
            for name in {"x", "branch", "weight", "bias", "b1", "b_up", "b2"} & layer.tensors.keys():
                layer.tensors[name].zero_()
        check_equal(layer.gradients(results), expected)
