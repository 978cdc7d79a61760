"""A bad call of a fused module raises what the stock module raises, and a call that it refuses is refused.

Each ecosystem's model, first block and first attention are called with what they do not take; what stock does (its
answer, or the type and words of its error) is what fused must do. Nothing runs on the way that a kernel could spoil.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystems import ECOSYSTEMS, D
from timm_vit import images, vit
from torch import Tensor, nn

import vitkernels as vk

everywhere = pytest.mark.parametrize("name", ECOSYSTEMS)
TOKENS: dict[str, Callable[[], Any]] = {
    "float64": lambda: torch.randn(2, 5, D, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(2, 5, D, dtype=torch.bfloat16),
    "integers": lambda: torch.ones(2, 5, D, dtype=torch.int64),
    "another width": lambda: torch.randn(2, 5, D + 1),
    "one axis": lambda: torch.randn(D),
    "four axes": lambda: torch.randn(2, 1, 5, D),
    "another device": lambda: torch.randn(2, 5, D, device="meta"),
    "a list of numbers": lambda: [1.0, 2.0],
    "nothing": lambda: None,
}


def outcome(call: Callable[[], Any]) -> Any:
    """What a call answers, or what it raises, with addresses of objects left out."""
    try:
        answer = call()
    except Exception as error:
        return type(error), re.sub(r"0x[0-9a-f]+", "0x", str(error))
    return answer[0] if isinstance(answer, tuple) else answer


def check_same(module: nn.Module, call: Callable[[nn.Module], Any]) -> vk.Explanation:
    """The stock module and the fused one answer a call alike; returns what `explain` says of the fused one."""
    expected = outcome(lambda: call(module))
    fused = vk.fuse(copy.deepcopy(module))
    got = outcome(lambda: call(fused))
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor), got
        assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
        if not expected.is_meta:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    else:
        assert got == expected
    return vk.explain(fused)


@pytest.mark.parametrize("given", TOKENS)
@everywhere
def test_tokens_that_a_block_does_not_take(name: str, given: str) -> None:
    model = ECOSYSTEMS[name].model().eval()
    block = next(iter(vk.explain(model).blocks))
    if name == "vit-pytorch":
        block = ""  # a pair of its layers is no module that can be called
    tokens = TOKENS[given]()
    check_same(model.get_submodule(block), lambda module: module(tokens))


@pytest.mark.parametrize("given", TOKENS)
@everywhere
def test_tokens_that_an_attention_does_not_take(name: str, given: str) -> None:
    ecosystem = ECOSYSTEMS[name]
    attention = ecosystem.model().eval().get_submodule(ecosystem.parts["attention"])
    tokens = TOKENS[given]()

    def call(module: nn.Module) -> Any:
        if isinstance(module, nn.MultiheadAttention):
            return module(tokens, tokens, tokens, need_weights=False)
        return module(tokens)

    check_same(attention, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8], ids=str)
def test_images_of_another_dtype(dtype: torch.dtype) -> None:
    image = torch.ones(2, 3, 32, 32, dtype=dtype)
    explanation = check_same(vit().eval(), lambda model: model(image))
    (reason,) = explanation.fallbacks["patch_embed.proj"]
    assert str(dtype) in reason


def test_images_of_another_dtype_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check_same(vit().eval(), lambda model: model(images().double()))
    model = vk.fuse(vit().eval())
    with torch.autocast("cpu", torch.bfloat16), vk.record() as calls:
        model(images().bfloat16())
    assert "patch_embed" in {call.op for call in calls}, "what autocast casts is served"


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["timm", "torch.nn", "open_clip", "transformers"])
def test_tokens_of_32_bits_beside_weights_of_16_under_autocast(
    name: str, weights: torch.dtype, autocast: torch.dtype
) -> None:
    """On a CPU autocast leaves norms alone, and torch's takes no such weights."""
    model = ECOSYSTEMS[name].model().eval().to(weights)
    block = model.get_submodule(next(iter(vk.explain(model).blocks)))
    tokens = torch.randn(2, 5, D)
    with torch.autocast("cpu", autocast), vk.record() as calls:
        explanation = check_same(block, lambda module: module(tokens))
    assert not calls
    assert str(weights) in str(explanation.fallbacks)


MASKS: dict[str, Callable[[], Any]] = {
    "float64": lambda: torch.zeros(5, 5, dtype=torch.float64),
    "bfloat16": lambda: torch.zeros(5, 5, dtype=torch.bfloat16),
    "integers": lambda: torch.zeros(5, 5, dtype=torch.int64),
    "another length": lambda: torch.zeros(5, 4),
    "five axes": lambda: torch.zeros(1, 1, 1, 5, 5),
    "one axis": lambda: torch.zeros(5),
    "no axis": lambda: torch.tensor(0.0),
    "a list of lists": lambda: [[0.0] * 5] * 5,
    "another batch": lambda: torch.zeros(3, 1, 5, 5),
}


@pytest.mark.parametrize("given", MASKS)
@pytest.mark.parametrize("name", ["timm", "torch.nn", "open_clip", "transformers"])
def test_masks_that_a_block_does_not_take(name: str, given: str) -> None:
    model = ECOSYSTEMS[name].model().eval()
    block = model.get_submodule(next(iter(vk.explain(model).blocks)))
    argument = {"torch.nn": "src_mask", "transformers": "attention_mask"}.get(name, "attn_mask")
    tokens, mask = torch.randn(2, 5, D), MASKS[given]()
    check_same(block, lambda module: module(tokens, **{argument: mask}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((2, 5, D), (5, D)),
        ((2, 5, D), (2, 4, D)),
        ((2, 5, D), (3, 5, D)),
        ((2, 5, D + 1), (2, 5, D)),
        ((5, D), (2, 5, D)),
    ],
)
def test_keys_and_values_that_do_not_fit(key: tuple[int, ...], value: tuple[int, ...]) -> None:
    attention = nn.MultiheadAttention(D, 3, batch_first=True).eval()
    query, k, v = torch.randn(2, 5, D), torch.randn(key), torch.randn(value)
    check_same(attention, lambda module: module(query, k, v, need_weights=False))


@pytest.mark.parametrize("positions", [(5, 16), (3, 32), (4, 7)])
def test_positions_that_do_not_fit(positions: tuple[int, ...]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    block = timm.models.eva.EvaBlock(D, 3, num_prefix_tokens=1).eval()
    tokens, rope = torch.randn(2, 5, D), torch.randn(positions)
    check_same(block, lambda module: module(tokens, rope=rope))


@pytest.mark.parametrize("flag", [1, 0, None, 1.0, "yes", torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", ["timm", "torch.nn"])
def test_a_flag_that_is_no_bool(name: str, masked: bool, flag: Any) -> None:
    """Behind calls with True or False, which compare equal to numbers."""
    model = ECOSYSTEMS[name].model()
    block = model.get_submodule(next(iter(vk.explain(model).blocks)))
    tokens, mask = torch.randn(2, 5, D), torch.zeros(5, 5) if masked else None
    argument = "src_mask" if name == "torch.nn" else "attn_mask"

    def call(module: nn.Module) -> Any:
        for known in 3 * (False, bool(flag)):
            outcome(functools.partial(module, tokens, is_causal=known, **{argument: mask}))
        return module(tokens, is_causal=flag, **{argument: mask})

    assert check_same(block, call).fallbacks
