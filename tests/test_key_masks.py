"""Masks that do nothing but hide keys are read as key padding, whatever they are written as."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch

KEYS = torch.tensor([[True] * 5 + [False] * 2, [True, False] * 3 + [True]])[:, None, None]
LOWEST = torch.finfo(torch.float32).min


def additive(value: float) -> Tensor:
    return torch.zeros(KEYS.shape).masked_fill(~KEYS, value)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the reference's forward gets as a mask, at each call."""
    seen: list[Tensor] = []
    for name, index in (("attention", 3), ("attention_qkv", 2)):
        given = dispatch.OPS[name].implementations["reference"]

        def forward(*args: Any, given: Any = given, index: int = index) -> Any:
            seen.append(args[index])
            return given.forward(*args)

        monkeypatch.setitem(
            dispatch.OPS[name].implementations,
            "reference",
            dispatch.Implementation(forward, given.backward, given.why_not),
        )
    return seen


def attend(mask: Tensor | None) -> Tensor:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 16).unbind(0)
    with vk.use("reference"):
        return vk.ops.attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("value", [-math.inf, LOWEST])
@pytest.mark.parametrize("rows", [1, 7])
def test_additive_key_padding_is_read_as_bool(value: float, rows: int, masks: list[Tensor]) -> None:
    out = attend(additive(value).expand(2, 1, rows, 7))
    assert masks[0].dtype == torch.bool
    assert torch.equal(masks[0], KEYS)
    torch.testing.assert_close(out, attend(KEYS.expand(2, 1, 7, 7).contiguous()))


def test_packed_projections_too(masks: list[Tensor]) -> None:
    with vk.use("reference"):
        vk.ops.attention_qkv(torch.randn(2, 7, 48), 2, attn_mask=additive(-math.inf))
    assert torch.equal(masks[0], KEYS)


def test_bool_rows_that_are_one_are_read_once(masks: list[Tensor]) -> None:
    attend(KEYS.expand(2, 1, 7, 7))
    assert masks[0].shape == (2, 1, 1, 7)


@pytest.mark.parametrize(
    "mask",
    [
        additive(-1e9),  # leaves something of a score in float64
        additive(1.0),
        additive(math.nan),
        torch.full((2, 1, 1, 7), LOWEST),  # such a row averages all values
        torch.full((2, 1, 1, 7), -math.inf),
        additive(-math.inf).repeat(1, 1, 7, 1),  # rows of their own: nobody reads N x N numbers to compare them
        additive(-math.inf).requires_grad_(),
    ],
    ids=["-1e9", "1", "NaN", "lowest alone", "-inf alone", "rows", "learned"],
)
def test_others_are_added(mask: Tensor, masks: list[Tensor]) -> None:
    attend(mask)
    assert masks[0].dtype == torch.float32
    assert masks[0].shape == mask.shape
