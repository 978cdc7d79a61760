"""attention_varlen beside the sequences one by one, in both of its forms, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import skip_without
from refused import FLOATING, Bad, check_bad
from torch import Tensor

import vitkernels as vk

COUNTS = (49, 1, 0, 130, 16)
BOTH = [("attention_varlen", "forward"), ("attention_varlen", "backward")]


def ends(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def launched(calls: list[Any], backend: str) -> list[tuple[str, str]]:
    assert {call.backend for call in calls} == {backend}
    return [(call.op, call.direction) for call in calls]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_one_by_one_give_the_same_bits(dtype: torch.dtype, is_causal: bool, backend: str) -> None:
    """And so do their gradients: a sequence is computed as if it were alone."""
    qkv = torch.randn(sum(COUNTS), 3, 4, 32, dtype=dtype, requires_grad=True)
    gradient = torch.randn(sum(COUNTS), 4, 32, dtype=dtype)
    with vk.use(backend), vk.record() as calls:
        out = vk.ops.attention_varlen(qkv, ends(*COUNTS), max(COUNTS), is_causal=is_causal)
        (together,) = torch.autograd.grad(out, qkv, gradient)
    assert launched(calls, backend) == BOTH
    with vk.use(backend):
        for part, arriving, one, grad in zip(
            *(each.split(COUNTS) for each in (qkv, gradient, out, together)), strict=True
        ):
            leaf = part.detach().requires_grad_()
            alone = vk.ops.attention_qkv(leaf.flatten(1)[None], 4, is_causal=is_causal)[0].unflatten(1, (4, 32))
            assert torch.equal(alone, one)
            assert torch.equal(torch.autograd.grad(alone, leaf, arriving)[0], grad)


def test_both_forms_are_one(backend: str) -> None:
    qkv, cu = torch.randn(sum(COUNTS), 3, 4, 16, requires_grad=True), ends(*COUNTS)
    with vk.use(backend), vk.record() as calls:
        packed = vk.ops.attention_varlen(qkv, cu, max_seqlen=max(COUNTS))
        apart = vk.ops.attention_varlen(*qkv.unbind(1), cu, cu, max(COUNTS), max(COUNTS))
        grads = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (packed, apart)]
    assert sorted(launched(calls, backend)) == sorted(BOTH * 2)
    assert torch.equal(packed, apart)
    assert torch.equal(*grads)


def test_grouped_heads_are_as_repeated(backend: str) -> None:
    """The gradient of a head of k and v is the sum of its copies' gradients."""
    cu = ends(*COUNTS)
    q = torch.randn(sum(COUNTS), 6, 16, dtype=torch.float64)
    k, v = (torch.randn(sum(COUNTS), 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with vk.use(backend), vk.record() as calls:
        grouped = vk.ops.attention_varlen(q, k, v, cu, cu, max(COUNTS), max(COUNTS))
        repeated = vk.ops.attention_varlen(
            q, *(each.repeat_interleave(3, 1) for each in (k, v)), cu, cu, max(COUNTS), max(COUNTS)
        )
        grads = [torch.autograd.grad(out.square().sum(), (k, v)) for out in (grouped, repeated)]
    assert sorted(launched(calls, backend)) == sorted(BOTH * 2)
    torch.testing.assert_close(grouped, repeated)
    torch.testing.assert_close(*grads)


def test_autocast(backend: str) -> None:
    qkv = torch.randn(sum(COUNTS), 3, 4, 16)
    with vk.use(backend), torch.autocast("cpu", torch.bfloat16), vk.record() as calls:
        out = vk.ops.attention_varlen(qkv, ends(*COUNTS), max(COUNTS))
    assert launched(calls, backend) == BOTH[:1]
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_each_sequence_is_computed_once_by_some_thread(threads: int) -> None:
    """Threads get about as many scores each: one long sequence among many short ones, or none at all."""
    skip_without("ext")
    for counts in ((300, *[3] * 40), (*[3] * 40, 300), (0, 0, 5), (7,)):
        qkv = torch.randn(sum(counts), 3, 1, 16)
        runs = []
        for number in (1, threads):
            torch.set_num_threads(number)
            with vk.use("ext"):
                runs.append(vk.ops.attention_varlen(qkv, ends(*counts), max(counts)))
        assert torch.equal(*runs)


# -------------------------------------------------------------------------------------------------------- bad input


def packed() -> dict[str, Any]:
    return {"qkv": torch.randn(9, 3, 2, 8), "cu_seqlens": ends(4, 0, 5), "max_seqlen": 5}


def apart() -> dict[str, Any]:
    tensors = {"q": torch.randn(9, 4, 8), "k": torch.randn(7, 2, 8), "v": torch.randn(7, 2, 8)}
    lengths = {"cu_seqlens_q": ends(4, 5), "cu_seqlens_k": ends(1, 6), "max_seqlen_q": 5, "max_seqlen_k": 6}
    return tensors | lengths


@dataclasses.dataclass(frozen=True)
class Form:
    """What is bad about one of the two."""

    good: Callable[[], dict[str, Any]]
    name: str
    value: Any
    error: type[Exception]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {' '.join(self.words)}"


INT32 = torch.int32
BAD = [
    Form(packed, "qkv", [[1.0]], TypeError, ("'qkv'", "list", "torch.Tensor")),
    Form(packed, "qkv", torch.zeros(9, 48), ValueError, ("'qkv'", "[9, 48]", "4 dimensions, [T, 3, H, K]")),
    Form(packed, "qkv", torch.zeros(9, 2, 2, 8), ValueError, ("'qkv'", "[9, 2, 2, 8]", "needs [9, 3, 2, 8]")),
    Form(packed, "qkv", torch.zeros(9, 3, 2, 0), ValueError, ("'qkv'", "head width of 1 or more")),
    Form(packed, "qkv", torch.zeros(9, 3, 2, 8, dtype=INT32), TypeError, ("'qkv'", "torch.int32", FLOATING)),
    Form(packed, "cu_seqlens", [0, 9], TypeError, ("'cu_seqlens'", "list", "torch.Tensor")),
    Form(packed, "cu_seqlens", ends(9).long(), TypeError, ("'cu_seqlens'", "torch.int64", "needs int32")),
    Form(packed, "cu_seqlens", ends(9)[None], ValueError, ("'cu_seqlens'", "[1, 2]", "1 dimension, [S + 1]")),
    Form(packed, "cu_seqlens", torch.zeros(0, dtype=INT32), ValueError, ("'cu_seqlens'", "is empty", "needs 0")),
    Form(packed, "cu_seqlens", ends(9).to("meta"), ValueError, ("'cu_seqlens'", "meta", "'qkv' is on cpu")),
    Form(packed, "cu_seqlens", ends(9) + 1, ValueError, ("'cu_seqlens'", "begins with 1", "needs 0")),
    Form(packed, "cu_seqlens", ends(4, 4), ValueError, ("'cu_seqlens'", "ends with 8", "needs 9")),
    Form(packed, "cu_seqlens", ends(5, 5), ValueError, ("'cu_seqlens'", "ends with 10", "needs 9")),
    Form(packed, "cu_seqlens", ends(5, -2, 5), ValueError, ("'cu_seqlens'", "falls from 5 to 3", "ascending")),
    Form(packed, "max_seqlen", 4, ValueError, ("'max_seqlen'", "is 4", "needs 5 or more", "sequence 2")),
    Form(packed, "max_seqlen", -1, ValueError, ("'max_seqlen'", "is -1", "0 or more")),
    Form(packed, "max_seqlen", 5.0, ValueError, ("'max_seqlen'", "is 5.0", "an int")),
    Form(apart, "q", torch.zeros(9, 3, 4, 8), ValueError, ("'q'", "[9, 3, 4, 8]", "3 dimensions, [Tq, H, K]")),
    Form(apart, "k", torch.zeros(7, 3, 8), ValueError, ("'k'", "3 heads", "a divisor of q's 4")),
    Form(apart, "k", torch.zeros(7, 2, 4), ValueError, ("'k'", "[7, 2, 4]", "needs [7, 2, 8]", "q's width")),
    Form(apart, "v", torch.zeros(6, 2, 8), ValueError, ("'v'", "[6, 2, 8]", "needs [7, 2, 8]", "k's shape")),
    Form(apart, "v", torch.zeros(7, 2, 8).double(), TypeError, ("'v'", "torch.float64", "'q'", "torch.float32")),
    Form(apart, "cu_seqlens_k", ends(7), ValueError, ("'cu_seqlens_k'", "[2]", "needs [3]", "as many sequences")),
    Form(apart, "cu_seqlens_k", ends(1, 5), ValueError, ("'cu_seqlens_k'", "ends with 6", "needs 7")),
    Form(apart, "max_seqlen_k", 5, ValueError, ("'max_seqlen_k'", "is 5", "needs 6 or more", "sequence 1")),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_wrong_argument(bad: Form) -> None:
    check_bad(Bad("attention_varlen", {bad.name: bad.value}, bad.error, bad.words), bad.good)


def test_arguments_that_are_not_there_are_told_by_the_ops_name() -> None:
    with pytest.raises(TypeError, match=r"^attention_varlen\(\) missing 1 required positional argument: 'max_seqlen'"):
        vk.ops.attention_varlen(torch.zeros(9, 3, 2, 8), ends(9))
    with pytest.raises(TypeError, match=r"^attention_varlen\(\) got an unexpected keyword argument 'attn_mask'"):
        vk.ops.attention_varlen(**packed(), attn_mask=None)


@pytest.mark.parametrize("wrong", [ends(4, -2, 7), ends(4, 0, 4), ends(4, 0, 6), ends(4, 0, 5) + 1], ids=str)
def test_compiled_code_looks_at_the_ends_when_it_runs(wrong: Tensor, backend: str) -> None:
    """What is out of range would be read and written."""
    compiled = torch.compile(vk.ops.attention_varlen, fullgraph=True, backend="aot_eager")
    good = packed()
    with vk.use(backend):
        torch.testing.assert_close(compiled(**good), vk.ops.attention_varlen(**good))
        with pytest.raises((ValueError, RuntimeError), match="attention_varlen: argument 'cu_seqlens"):
            compiled(**good | {"cu_seqlens": wrong})


def test_the_longest_may_be_a_tensor_of_one(backend: str) -> None:
    """As transformers computes it."""
    arguments = packed()
    with vk.use(backend), vk.record() as calls:
        out = vk.ops.attention_varlen(**arguments | {"max_seqlen": arguments["cu_seqlens"].diff().max()})
        assert torch.equal(out, vk.ops.attention_varlen(**arguments))
    assert launched(calls, backend) == BOTH[:1] * 2
