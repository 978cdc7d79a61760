"""rotary_qkv beside the ops it stands for, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refused import FLOATING, Bad, check_bad
from torch import Tensor

import vitkernels as vk


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    table = torch.randn(shape)
    return table.sin(), table.cos()


@pytest.mark.parametrize("half", [False, True])
def test_it_turns_as_rotary(half: bool, backend: str) -> None:
    """The same bits, each way, for q and for k; v is as it was."""
    qkv, (sin, cos) = torch.randn(2, 7, 3, 3, 16, requires_grad=True), angles(6, 16)
    with vk.use(backend), vk.record() as calls:
        out = vk.ops.rotary_qkv(qkv, sin, cos, prefix=1, half=half)
        q, k, v = qkv.unbind(2)
        q, k = (vk.ops.rotary(each.transpose(1, 2), sin, cos, prefix=1, half=half).transpose(1, 2) for each in (q, k))
        apart = torch.stack([q, k, v], 2)
        gradient = torch.randn_like(out)
        grads = [torch.autograd.grad(each, qkv, gradient)[0] for each in (out, apart)]
    assert torch.equal(out, apart)
    assert torch.equal(*grads)
    assert {call.backend for call in calls} == {backend}
    assert sorted(call.op for call in calls) == ["rotary"] * 4 + ["rotary_qkv"] * 2


def test_a_row_of_positions_for_each_token(backend: str) -> None:
    """Two images in one batch, each with its own grid's table."""
    qkv, (sin, cos) = torch.randn(15, 3, 2, 16), angles(15, 16)
    with vk.use(backend), vk.record() as calls:
        together = vk.ops.rotary_qkv(qkv, sin, cos, half=True)
        alone = [
            vk.ops.rotary_qkv(each[None], one_sin, one_cos, half=True)[0]
            for each, one_sin, one_cos in zip(*(each.split((6, 9)) for each in (qkv, sin, cos)), strict=True)
        ]
    assert torch.equal(together, torch.cat(alone))
    assert [(call.op, call.backend) for call in calls] == [("rotary_qkv", backend)] * 3


def test_gradients_of_biases_have_their_dtype(backend: str) -> None:
    qkv, weight = torch.randn(5, 1, 2, 8), torch.ones(8, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    with vk.use(backend), vk.record() as calls:
        out = vk.ops.rotary_qkv(qkv, norm="layer_norm", q_weight=weight, q_bias=bias)
        out.sum().backward()
    assert [call.backend for call in calls] == [backend] * 2
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((8,), 10.0, dtype=torch.bfloat16))


def good() -> dict[str, Any]:
    sin, cos = angles(6, 8)
    return {"qkv": torch.randn(2, 7, 3, 3, 8), "sin": sin, "cos": cos, "prefix": 1, "norm": "layer_norm"} | {
        name: torch.ones(8) for name in ("q_weight", "q_bias", "k_weight", "k_bias")
    }


def bad(changes: dict[str, Any], error: type[Exception], *words: str) -> Bad:
    return Bad("rotary_qkv", changes, error, words)


NO_NORM = {"norm": None, "q_weight": None, "q_bias": None, "k_weight": None, "k_bias": None}
BAD = [
    bad({"qkv": torch.zeros(7, 72)}, ValueError, "'qkv'", "[7, 72]", "5 dimensions, [B, N, P, H, K]"),
    bad({"qkv": torch.zeros(2, 7, 4, 3, 8)}, ValueError, "'qkv'", "[2, 7, 4, 3, 8]", "1 to 3 of q, k and v"),
    bad({"qkv": torch.zeros(2, 7, 3, 3, 8).long()}, TypeError, "'qkv'", "torch.int64", FLOATING),
    bad({"qkv": torch.zeros(2, 7, 3, 3, 9)}, ValueError, "'qkv'", "last axis of 9", "an even number"),
    bad({"sin": torch.zeros(7, 8)}, ValueError, "'sin'", "[7, 8]", "broadcasts", "[2, 3, 6, 8]"),
    bad({"cos": torch.zeros(6, 8, device="meta")}, ValueError, "'cos'", "meta", "'qkv' is on cpu"),
    bad({"cos": None}, ValueError, "'sin'", "'cos' is None", "both or none"),
    bad({"sin": None}, ValueError, "'cos'", "'sin' is None", "both or none"),
    bad({"sin": torch.zeros(6, 8, requires_grad=True)}, ValueError, "'sin'", "requires a gradient", "`rotary`"),
    bad({"prefix": 8}, ValueError, "'prefix'", "is 8", "from 0 to qkv's 7 tokens"),
    bad({"norm": "batch_norm"}, ValueError, "'norm'", "'batch_norm'", "'layer_norm', 'rms_norm'"),
    bad({"norm": None}, ValueError, "'q_weight'", "'norm' is None"),
    bad({"norm": "rms_norm"}, ValueError, "'q_bias'", "'rms_norm', which has none"),
    bad({"q_weight": None}, ValueError, "'q_bias'", "'q_weight' is None"),
    bad({"k_weight": torch.ones(3, 8)}, ValueError, "'k_weight'", "[3, 8]", "needs [8]"),
    bad({"k_bias": torch.ones(8).long()}, TypeError, "'k_bias'", "torch.int64", FLOATING),
    bad({"qkv": torch.zeros(2, 7, 1, 3, 8)}, ValueError, "'k_weight'", "'qkv' has one part"),
]


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_wrong_argument(wrong: Bad) -> None:
    check_bad(wrong, good)


def test_nothing_to_do() -> None:
    with pytest.raises(ValueError, match=r"^rotary_qkv: arguments 'sin' and 'norm' are both None; needs one of them$"):
        vk.ops.rotary_qkv(torch.zeros(2, 7, 3, 3, 8))
