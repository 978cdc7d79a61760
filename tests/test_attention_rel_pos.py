"""attention_rel_pos beside attention with the bias as a mask, in both of its forms, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refused import FLOATING, Bad, check_bad
from torch import Tensor

import vitkernels as vk
from vitkernels.ops import _rel_pos

BOTH = [("attention_rel_pos", "forward"), ("attention_rel_pos", "backward")]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_it_is_attention_with_the_bias_as_a_mask(backend: str) -> None:
    tensors = leaves(*((2, 2, 40, 16),) * 3, (2, 2, 40, 5), (2, 2, 40, 8))
    q, k, v, rel_h, rel_w = tensors
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    with vk.use(backend):
        masked = vk.ops.attention(q, k, v, attn_mask=bias)
        with vk.record() as calls:
            out = vk.ops.attention_rel_pos(q, k, v, rel_h, rel_w)
            gradients = torch.autograd.grad(out.sin().sum(), tensors)
        assert [(call.op, call.direction) for call in calls] == BOTH
        torch.testing.assert_close(out, masked)
        for got, want in zip(gradients, torch.autograd.grad(masked.sin().sum(), tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_packed_projection_gives_the_same_bits(backend: str) -> None:
    qkv, rel_h, rel_w = leaves((2, 40, 3, 2, 16), (2, 2, 40, 5), (2, 2, 40, 8))
    with vk.use(backend):
        packed = vk.ops.attention_rel_pos(qkv, rel_h, rel_w)
        apart = vk.ops.attention_rel_pos(*qkv.permute(2, 0, 3, 1, 4).unbind(0), rel_h, rel_w).transpose(1, 2)
        assert packed.is_contiguous()
        assert torch.equal(packed, apart)
        for one, other in zip(
            *(torch.autograd.grad(out.square().sum(), (qkv, rel_h, rel_w)) for out in (packed, apart)), strict=True
        ):
            assert torch.equal(one, other)


def test_gradients_have_the_same_bits_with_any_number_of_threads() -> None:
    tensors = leaves((3, 600, 3, 2, 16), (3, 2, 600, 20), (3, 2, 600, 30))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with vk.record() as calls:
            out = vk.ops.attention_rel_pos(*tensors)
            found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert {call.backend for call in calls} == {"ext"}
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_rows_wider_than_a_block_of_keys() -> None:
    tensors = leaves((1, 1, 9, 16), (1, 1, 1202, 16), (1, 1, 1202, 16), (1, 1, 9, 2), (1, 1, 9, 601))
    found = []
    for backend in ("ext", "reference"):
        with vk.use(backend):
            out = vk.ops.attention_rel_pos(*tensors)
            found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ positions that are products of the queries


def by_hand(packed: Tensor, in_y: Tensor, in_x: Tensor) -> Tensor:
    """Two heads, each key by itself."""
    height, width = packed.shape[1:3]
    q, k, v = packed.flatten(1, 2).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    y, x = (each.flatten() for each in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    for embeddings, at, side in ((in_y, y, height), (in_x, x, width)):
        scores = scores + torch.einsum("bnqc,qkc->bnqk", q, embeddings[side - 1 - at[:, None] + at])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, (height, width))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_by_distance(compiled: bool, strided: bool) -> None:
    packed, in_y, in_x = leaves((2, 3, 5, 3 * 2 * 8), (5, 8), (9, 8), dtype=torch.float64)
    tokens = packed.transpose(1, 2).contiguous().transpose(1, 2) if strided else packed
    function = _rel_pos.attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with vk.record() as calls:
        out = function(tokens, 2, in_y, in_x)
        gradients = torch.autograd.grad(out.sin().sum(), (packed, in_y, in_x))
    assert [(call.op, call.direction) for call in calls] == BOTH
    want = by_hand(packed, in_y, in_x)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradients, torch.autograd.grad(want.sin().sum(), (packed, in_y, in_x)))


def test_positions_by_distance_in_steps_that_transforms_take() -> None:
    packed, in_y, in_x = leaves((2, 3, 5, 3 * 2 * 8), (5, 8), (9, 8), dtype=torch.float64)
    grad = torch.func.grad(lambda *tensors: _rel_pos.attention(tensors[0], 2, *tensors[1:]).sin().sum(), (0, 1, 2))
    want = torch.autograd.grad(by_hand(packed, in_y, in_x).sin().sum(), (packed, in_y, in_x))
    torch.testing.assert_close(grad(packed, in_y, in_x), want)


def test_gradients_of_positions_by_distance_with_a_graph_and_in_a_batch() -> None:
    """Nothing is written in place there; a second backward pass is refused."""
    tensors = leaves((2, 3, 4, 3 * 2 * 8), (5, 8), (7, 8))
    with vk.record() as calls:
        out = _rel_pos.attention(tensors[0], 2, *tensors[1:])
        plain = torch.autograd.grad(out.sin().sum(), tensors, retain_graph=True)
    assert [(call.op, call.direction) for call in calls] == BOTH
    graph = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    batch = torch.autograd.grad(out, tensors, torch.stack([out.cos(), out]).detach(), is_grads_batched=True)
    for each, with_graph, in_batch in zip(plain, graph, batch, strict=True):
        torch.testing.assert_close(with_graph, each)
        torch.testing.assert_close(in_batch[0], each)
    for each in graph:
        with pytest.raises(RuntimeError, match="does not support double backward"):
            torch.autograd.grad(each.sum(), tensors, retain_graph=True)


def test_the_embeddings_of_a_side_by_distance() -> None:
    table = torch.randn(9, 4)  # distances from -4 to 4
    of_each = table[torch.arange(5)[:, None] - torch.arange(5) + 4]
    assert torch.equal(_rel_pos.distances(of_each), table.flip(0))


# -------------------------------------------------------------------------------------------------------- bad input


def packed() -> dict[str, Any]:
    return {"qkv": torch.randn(1, 6, 3, 2, 8), "rel_h": torch.randn(1, 2, 6, 2), "rel_w": torch.randn(1, 2, 6, 3)}


def apart() -> dict[str, Any]:
    tensors = {"q": torch.randn(1, 2, 4, 8), "k": torch.randn(1, 2, 6, 8), "v": torch.randn(1, 2, 6, 8)}
    return tensors | {"rel_h": torch.randn(1, 2, 4, 2), "rel_w": torch.randn(1, 2, 4, 3)}


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
    Form(packed, "qkv", torch.zeros(1, 6, 48), ValueError, ("'qkv'", "[1, 6, 48]", "5 dimensions, [B, N, 3, H, K]")),
    Form(packed, "qkv", torch.zeros(1, 6, 2, 2, 8), ValueError, ("'qkv'", "needs [1, 6, 3, 2, 8]")),
    Form(packed, "qkv", torch.zeros(1, 6, 3, 2, 0), ValueError, ("'qkv'", "head width of 1 or more")),
    Form(packed, "qkv", torch.zeros(1, 6, 3, 2, 8, dtype=INT32), TypeError, ("'qkv'", "torch.int32", FLOATING)),
    Form(packed, "rel_h", None, TypeError, ("'rel_h'", "NoneType", "torch.Tensor")),
    Form(packed, "rel_h", torch.zeros(2, 6, 2), ValueError, ("'rel_h'", "[2, 6, 2]", "4 dimensions, [B, H, Nq, Kh]")),
    Form(packed, "rel_h", torch.zeros(1, 2, 5, 2), ValueError, ("'rel_h'", "[1, 2, 5, 2]", "needs [1, 2, 6, 2]")),
    Form(packed, "rel_h", torch.zeros(1, 2, 6, 3), ValueError, ("'rel_h'", "3 rows and 3 columns", "a product of 6")),
    Form(packed, "rel_w", torch.zeros(1, 2, 6, 3, dtype=INT32), TypeError, ("'rel_w'", "torch.int32", FLOATING)),
    Form(packed, "rel_w", torch.zeros(1, 2, 6, 3, device="meta"), ValueError, ("'rel_w'", "meta", "'qkv' is on cpu")),
    Form(apart, "q", torch.zeros(2, 4, 8), ValueError, ("'q'", "[2, 4, 8]", "4 dimensions, [B, H, Nq, K]")),
    Form(apart, "k", torch.zeros(1, 1, 6, 8), ValueError, ("'k'", "[1, 1, 6, 8]", "needs [1, 2, 6, 8]", "heads")),
    Form(apart, "v", torch.zeros(1, 2, 5, 8), ValueError, ("'v'", "[1, 2, 5, 8]", "needs [1, 2, 6, 8]", "k's shape")),
    Form(apart, "v", torch.zeros(1, 2, 6, 8).double(), TypeError, ("'v'", "torch.float64", "'q'", "torch.float32")),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_wrong_argument(bad: Form) -> None:
    check_bad(Bad("attention_rel_pos", {bad.name: bad.value}, bad.error, bad.words), bad.good)


def test_a_call_of_neither_form() -> None:
    with pytest.raises(TypeError, match=r"^attention_rel_pos\(\) missing 1 required positional argument: 'rel_w'"):
        vk.ops.attention_rel_pos(torch.zeros(1, 6, 3, 2, 8), torch.zeros(1, 2, 6, 2))
    with pytest.raises(TypeError, match=r"^attention_rel_pos\(\) got an unexpected keyword argument 'attn_mask'"):
        vk.ops.attention_rel_pos(**packed(), attn_mask=None)
