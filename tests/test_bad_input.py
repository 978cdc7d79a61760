"""Wrong arguments: one sentence that names the argument, what came and what is needed, before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refused import FLOATING, Bad, check_bad, check_refused
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch, ext


def _tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "linear": lambda: _tensors(x=(2, 5, 16), weight=(24, 16), bias=(24,)),
    "patch_embed": lambda: _tensors(image=(2, 3, 8, 12), weight=(24, 3, 4, 4), bias=(24,)),
    "attention": lambda: _tensors(q=(2, 3, 7, 8), k=(2, 3, 9, 8), v=(2, 3, 9, 8)),
    "attention_qkv": lambda: _tensors(qkv=(2, 7, 48)) | {"num_heads": 2},
    "add_layer_norm": lambda: _tensors(x=(2, 5, 16), branch=(2, 5, 16), weight=(16,), bias=(16,)),
    "add_rms_norm": lambda: _tensors(x=(2, 5, 16), branch=(2, 5, 16), weight=(16,)),
    "glu_mlp": lambda: _tensors(x=(2, 5, 16), w_gate_up=(48, 16), b_gate_up=(48,), w_down=(16, 24), b_down=(16,)),
    "mlp": lambda: _tensors(x=(2, 5, 16), w1=(24, 16), b1=(24,), w2=(16, 24), b2=(16,)),
    "rotary": lambda: _tensors(x=(2, 3, 7, 8), sin=(6, 8), cos=(6, 8)) | {"prefix": 1},
}


def _zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _integers(*shape: int) -> Tensor:
    return _zeros(*shape, dtype=torch.int64)


def _double(*shape: int) -> Tensor:
    return _zeros(*shape, dtype=torch.float64)


def _meta(*shape: int) -> Tensor:
    return _zeros(*shape, device="meta")


def _nan_row(rows: int, width: int, row: int) -> Tensor:
    table = torch.zeros(rows, width)
    table[row, 1] = math.nan
    return table


LINEAR = [
    Bad("linear", {"x": _zeros()}, ValueError, ("'x'", "[]", "at least 1 dimension")),
    Bad("linear", {"x": [[1.0]]}, TypeError, ("'x'", "list", "torch.Tensor")),
    Bad("linear", {"x": _integers(2, 16)}, TypeError, ("'x'", "torch.int64", FLOATING)),
    Bad("linear", {"x": _zeros(2, 16, dtype=torch.complex64)}, TypeError, ("'x'", "torch.complex64", FLOATING)),
    Bad("linear", {"weight": _zeros(16)}, ValueError, ("'weight'", "[16]", "2 dimensions, [O, I]")),
    Bad("linear", {"weight": _zeros(24, 15)}, ValueError, ("'weight'", "[24, 15]", "needs [24, 16]", "x's last axis")),
    Bad("linear", {"weight": _integers(24, 16)}, TypeError, ("'weight'", "torch.int64", FLOATING)),
    Bad("linear", {"weight": _meta(24, 16)}, ValueError, ("'weight'", "meta", "'x' is on cpu", "one device")),
    Bad("linear", {"weight": _double(24, 16)}, TypeError, ("'weight'", "torch.float64", "'x'", "torch.float32")),
    Bad("linear", {"bias": _zeros(16)}, ValueError, ("'bias'", "[16]", "needs [24]")),
]

PATCH_EMBED = [
    Bad(
        "patch_embed", {"image": _zeros(3, 8, 12)}, ValueError, ("'image'", "[3, 8, 12]", "4 dimensions, [B, C, H, W]")
    ),
    Bad(
        "patch_embed", {"image": _zeros(2, 4, 8, 12)}, ValueError, ("'weight'", "[24, 3, 4, 4]", "needs [24, 4, 4, 4]")
    ),
    Bad("patch_embed", {"image": _zeros(2, 3, 10, 12)}, ValueError, ("'image'", "height of 10", "multiple", "4")),
    Bad("patch_embed", {"image": _zeros(2, 3, 8, 13)}, ValueError, ("'image'", "width of 13", "multiple", "4")),
    Bad(
        "patch_embed", {"image": _zeros(2, 3, 3, 12)}, ValueError, ("'image'", "height of 3", "at least one patch of 4")
    ),
    Bad("patch_embed", {"image": _zeros(2, 3, 8, 0)}, ValueError, ("'image'", "width of 0", "at least one patch of 4")),
    Bad("patch_embed", {"image": _integers(2, 3, 8, 12)}, TypeError, ("'image'", "torch.int64", "uint8 or floating")),
    Bad("patch_embed", {"image": _meta(2, 3, 8, 12)}, ValueError, ("'weight'", "cpu", "'image' is on meta")),
    Bad("patch_embed", {"image": None}, TypeError, ("'image'", "NoneType", "torch.Tensor")),
    Bad("patch_embed", {"weight": _zeros(24, 48)}, ValueError, ("'weight'", "[24, 48]", "4 dimensions, [D, C, P, P]")),
    Bad("patch_embed", {"weight": _integers(24, 3, 4, 4)}, TypeError, ("'weight'", "torch.int64", FLOATING)),
    Bad("patch_embed", {"weight": _zeros(24, 3, 0, 4)}, ValueError, ("'weight'", "[24, 3, 0, 4]", "1 or more")),
    Bad("patch_embed", {"bias": _zeros(23)}, ValueError, ("'bias'", "[23]", "needs [24]")),
    Bad("patch_embed", {"bias": _double(24)}, TypeError, ("'bias'", "torch.float64", "'weight'", "torch.float32")),
    Bad("patch_embed", {"prefix": _zeros(1, 1, 24)}, ValueError, ("'prefix'", "[1, 1, 24]", "2 dimensions, [R, D]")),
    Bad("patch_embed", {"prefix": _zeros(1, 16)}, ValueError, ("'prefix'", "[1, 16]", "needs [1, 24]")),
    Bad("patch_embed", {"pos_embed": _zeros(1, 6, 24)}, ValueError, ("'pos_embed'", "[1, 6, 24]", "2 dimensions")),
    Bad("patch_embed", {"pos_embed": _zeros(7, 24)}, ValueError, ("'pos_embed'", "[7, 24]", "needs [6, 24]")),
    Bad(
        "patch_embed",
        {"pos_embed": _zeros(5, 24), "prefix": _zeros(1, 24)},
        ValueError,
        ("'pos_embed'", "[5, 24]", "needs [7, 24]"),
    ),
    Bad("patch_embed", {"pos_embed": _nan_row(6, 24, 2)}, ValueError, ("'pos_embed'", "NaN in 1 rows", "first 2")),
    Bad(
        "patch_embed",
        {"pos_embed": torch.nn.Parameter(_nan_row(6, 24, 5))},
        ValueError,
        ("'pos_embed'", "NaN in 1 rows", "first 5", "needs numbers"),
    ),
    Bad("patch_embed", {"keep": _integers(2)}, ValueError, ("'keep'", "[2]", "2 dimensions, [B, M]")),
    Bad("patch_embed", {"keep": _integers(3, 4)}, ValueError, ("'keep'", "[3, 4]", "needs [2, 4]", "batch")),
    Bad("patch_embed", {"keep": _zeros(2, 4)}, TypeError, ("'keep'", "torch.float32", "needs int64")),
    Bad("patch_embed", {"keep": _zeros(2, 4, dtype=torch.int32)}, TypeError, ("'keep'", "torch.int32", "needs int64")),
    Bad("patch_embed", {"keep": _integers(2, 0)}, ValueError, ("'keep'", "[2, 0]", "a patch of each image")),
    Bad(
        "patch_embed",
        {"keep": torch.tensor([[0, 5, 1], [3, 2, 3]])},
        ValueError,
        ("'keep'", "index 3 twice for image 1", "needs each once"),
    ),
    Bad("patch_embed", {"keep": _integers(2, 4) + 6}, ValueError, ("'keep'", "from 6 to 6", "needs 0 to 5")),
    Bad("patch_embed", {"keep": _integers(2, 4) - 1}, ValueError, ("'keep'", "from -1 to -1", "needs 0 to 5")),
    Bad("patch_embed", {"mean": [0.5]}, ValueError, ("'mean'", "1 numbers", "needs 3")),
    Bad("patch_embed", {"std": [0.5] * 4}, ValueError, ("'std'", "4 numbers", "needs 3")),
    Bad("patch_embed", {"std": [0.5, 0.0, 0.5]}, ValueError, ("'std'", "[0.5, 0.0, 0.5]", "other than 0")),
]

_LEARNED_SCALE = ("'scale'", "requires a gradient", "needs a number")
ATTENTION = [
    Bad("attention", {"q": _zeros(2, 7, 8)}, ValueError, ("'q'", "[2, 7, 8]", "4 dimensions, [B, H, Nq, K]")),
    Bad(
        "attention",
        {"q": _zeros(2, 3, 7, 0), "k": _zeros(2, 3, 9, 0), "v": _zeros(2, 3, 9, 0)},
        ValueError,
        ("'q'", "[2, 3, 7, 0]", "head width of 1 or more"),
    ),
    Bad("attention", {"k": _zeros(1, 3, 9, 8)}, ValueError, ("'k'", "[1, 3, 9, 8]", "needs [2, 3, 9, 8]")),
    Bad("attention", {"k": _zeros(2, 2, 9, 8)}, ValueError, ("'k'", "2 heads", "a divisor of q's 3")),
    Bad("attention", {"k": _zeros(2, 0, 9, 8)}, ValueError, ("'k'", "0 heads", "a divisor of q's 3")),
    Bad("attention", {"k": _zeros(2, 3, 9, 4)}, ValueError, ("'k'", "[2, 3, 9, 4]", "needs [2, 3, 9, 8]")),
    Bad("attention", {"v": _zeros(2, 3, 8, 8)}, ValueError, ("'v'", "[2, 3, 8, 8]", "needs [2, 3, 9, 8]", "k's shape")),
    Bad("attention", {"scale": torch.ones((), requires_grad=True)}, TypeError, _LEARNED_SCALE),
    Bad("attention_qkv", {"scale": torch.ones((), requires_grad=True)}, TypeError, _LEARNED_SCALE),
    Bad("attention", {"q": _integers(2, 3, 7, 8)}, TypeError, ("'q'", "torch.int64", FLOATING)),
    Bad("attention", {"k": _double(2, 3, 9, 8)}, TypeError, ("'k'", "torch.float64", "'q'", "torch.float32")),
    Bad("attention", {"v": _meta(2, 3, 9, 8)}, ValueError, ("'v'", "meta", "'q' is on cpu")),
    Bad("attention", {"attn_mask": _zeros(7, 8)}, ValueError, ("'attn_mask'", "[7, 8]", "broadcasts", "[2, 3, 7, 9]")),
    Bad("attention", {"attn_mask": _zeros(3, 1, 7, 9)}, ValueError, ("'attn_mask'", "[3, 1, 7, 9]", "[2, 3, 7, 9]")),
    Bad("attention", {"attn_mask": _zeros(0, 1, 7, 9)}, ValueError, ("'attn_mask'", "[0, 1, 7, 9]", "a divisor of B")),
    Bad(
        "attention", {"attn_mask": _zeros(1, 2, 3, 7, 9)}, ValueError, ("'attn_mask'", "[1, 2, 3, 7, 9]", "broadcasts")
    ),
    Bad("attention", {"attn_mask": _integers(7, 9)}, TypeError, ("'attn_mask'", "torch.int64", "bool or floating")),
    Bad("attention", {"attn_mask": _meta(7, 9)}, ValueError, ("'attn_mask'", "meta", "'q' is on cpu")),
    Bad("attention", {"is_causal": 1}, TypeError, ("'is_causal'", "int", "a bool")),
    Bad("attention", {"attn_mask": [[True]]}, TypeError, ("'attn_mask'", "list", "torch.Tensor")),
    Bad(
        "attention",
        {"attn_mask": _zeros(7, 9), "is_causal": True},
        ValueError,
        ("'attn_mask' and 'is_causal'", "both given", "one of them"),
    ),
    Bad("attention_qkv", {"qkv": _zeros(7, 48)}, ValueError, ("'qkv'", "[7, 48]", "3 dimensions, [B, N, 3 * D]")),
    Bad("attention_qkv", {"qkv": _zeros(2, 7, 50)}, ValueError, ("'qkv'", "last axis of 50", "3 * num_heads = 6")),
    Bad("attention_qkv", {"num_heads": 5}, ValueError, ("'qkv'", "last axis of 48", "3 * num_heads = 15")),
    Bad("attention_qkv", {"num_heads": 0}, ValueError, ("'num_heads'", "is 0", "1 or more")),
    Bad("attention_qkv", {"num_heads": 2.0}, ValueError, ("'num_heads'", "is 2.0", "an int")),
    Bad("attention_qkv", {"qkv": _zeros(2, 7, 0)}, ValueError, ("'qkv'", "[2, 7, 0]", "head width of 1 or more")),
    Bad("attention_qkv", {"qkv": _integers(2, 7, 48)}, TypeError, ("'qkv'", "torch.int64", FLOATING)),
    Bad("attention_qkv", {"is_causal": None}, TypeError, ("'is_causal'", "NoneType", "a bool")),
    Bad("attention_qkv", {"attn_mask": _zeros(7, 6)}, ValueError, ("'attn_mask'", "[7, 6]", "[2, 2, 7, 7]")),
    Bad("attention_qkv", {"attn_mask": _integers(7, 7)}, TypeError, ("'attn_mask'", "torch.int64", "bool or floating")),
    Bad("attention_qkv", {"attn_mask": _zeros(7, 7), "is_causal": True}, ValueError, ("'is_causal'", "both given")),
]

ADD_LAYER_NORM = [
    Bad("add_layer_norm", {"x": _zeros()}, ValueError, ("'x'", "[]", "at least 1 dimension")),
    Bad("add_layer_norm", {"x": _integers(2, 5, 16)}, TypeError, ("'x'", "torch.int64", FLOATING)),
    Bad(
        "add_layer_norm",
        {"x": _zeros(2, 5, 0), "branch": None, "weight": _zeros(0), "bias": None},
        ValueError,
        ("'x'", "[2, 5, 0]", "last axis of 1 or more"),
    ),
    Bad("add_layer_norm", {"branch": _zeros(5, 16)}, ValueError, ("'branch'", "[5, 16]", "needs [2, 5, 16]")),
    Bad("add_layer_norm", {"branch": _integers(2, 5, 16)}, TypeError, ("'branch'", "torch.int64", FLOATING)),
    Bad("add_layer_norm", {"branch": _meta(2, 5, 16)}, ValueError, ("'branch'", "meta", "'x' is on cpu")),
    Bad("add_layer_norm", {"weight": _zeros(5)}, ValueError, ("'weight'", "[5]", "needs [16]")),
    Bad("add_layer_norm", {"weight": _integers(16)}, TypeError, ("'weight'", "torch.int64", FLOATING)),
    Bad("add_layer_norm", {"weight": None}, ValueError, ("'bias'", "'weight' is None", "a weight beside it")),
    Bad("add_layer_norm", {"weight": 1.0}, TypeError, ("'weight'", "float", "torch.Tensor")),
    Bad(
        "add_layer_norm", {"weight": _zeros(5, 16)}, ValueError, ("'weight'", "[5, 16]", "needs [2, 16]", "first axis")
    ),
    Bad("add_layer_norm", {"weight": _zeros(1, 16)}, ValueError, ("'weight'", "[1, 16]", "needs [2, 16]")),
    Bad("add_layer_norm", {"weight": _zeros(2, 16)}, ValueError, ("'bias'", "[16]", "needs [2, 16]", "weight's shape")),
    Bad("add_layer_norm", {"bias": _zeros(5, 16)}, ValueError, ("'bias'", "[5, 16]", "needs [16]")),
    Bad("add_layer_norm", {"branch_bias": _zeros(1)}, ValueError, ("'branch_bias'", "[1]", "needs [16]")),
    Bad("add_layer_norm", {"scale": _zeros(15)}, ValueError, ("'scale'", "[15]", "needs [16]")),
    Bad("add_layer_norm", {"scale": _zeros(5, 16)}, ValueError, ("'scale'", "[5, 16]", "needs [2, 16]")),
    Bad("add_layer_norm", {"scale": 0.1}, TypeError, ("'scale'", "float", "torch.Tensor")),
    Bad(
        "add_layer_norm",
        {"row_scale": _zeros(5)},
        ValueError,
        ("'row_scale'", "[5]", "needs [2]", "one factor a sample"),
    ),
    Bad("add_layer_norm", {"row_scale": _zeros(2, 1, 1)}, ValueError, ("'row_scale'", "[2, 1, 1]", "needs [2]")),
    Bad(
        "add_layer_norm", {"branch": None, "scale": _zeros(16)}, ValueError, ("'scale'", "'branch' is None", "a branch")
    ),
    Bad("add_layer_norm", {"branch": None, "row_scale": _zeros(2)}, ValueError, ("'row_scale'", "'branch' is None")),
    Bad(
        "add_layer_norm", {"branch": None, "branch_bias": _zeros(16)}, ValueError, ("'branch_bias'", "'branch' is None")
    ),
    Bad("add_layer_norm", {"out_dtype": torch.int32}, TypeError, ("'out_dtype'", "torch.int32", FLOATING)),
]

ADD_RMS_NORM = [
    Bad("add_rms_norm", {"x": _integers(2, 5, 16)}, TypeError, ("add_rms_norm", "'x'", "torch.int64", FLOATING)),
    Bad("add_rms_norm", {"branch": _zeros(5, 16)}, ValueError, ("add_rms_norm", "'branch'", "[5, 16]", "[2, 5, 16]")),
    Bad("add_rms_norm", {"weight": _zeros(5)}, ValueError, ("add_rms_norm", "'weight'", "[5]", "needs [16]")),
    Bad("add_rms_norm", {"weight": _zeros(3, 16)}, ValueError, ("'weight'", "[3, 16]", "needs [2, 16]")),
    Bad("add_rms_norm", {"weight": None, "bias": _zeros(16)}, ValueError, ("'bias'", "'weight' is None")),
    Bad("add_rms_norm", {"bias": _zeros(2, 16)}, ValueError, ("'bias'", "[2, 16]", "needs [16]", "weight's shape")),
    Bad("add_rms_norm", {"branch": None, "scale": _zeros(16)}, ValueError, ("'scale'", "'branch' is None")),
    Bad("add_rms_norm", {"out_dtype": torch.int32}, TypeError, ("'out_dtype'", "torch.int32", FLOATING)),
]

_APART = (_zeros(24, 16), _zeros(24, 16))
GLU_MLP = [
    Bad("glu_mlp", {"x": _zeros()}, ValueError, ("'x'", "[]", "at least 1 dimension")),
    Bad("glu_mlp", {"x": _integers(2, 16)}, TypeError, ("'x'", "torch.int64", FLOATING)),
    Bad("glu_mlp", {"w_gate_up": _zeros(48)}, ValueError, ("'w_gate_up'", "[48]", "2 dimensions, [2 * F, D]")),
    Bad("glu_mlp", {"w_gate_up": _zeros(48, 15)}, ValueError, ("'w_gate_up'", "[48, 15]", "needs [48, 16]")),
    Bad("glu_mlp", {"w_gate_up": _zeros(47, 16)}, ValueError, ("'w_gate_up'", "47", "2 * F, an even number")),
    Bad("glu_mlp", {"w_gate_up": _meta(48, 16)}, ValueError, ("'w_gate_up'", "meta", "'x' is on cpu")),
    Bad("glu_mlp", {"w_gate_up": (_zeros(24, 16),)}, TypeError, ("'w_gate_up'", "tuple(Tensor)", "or two")),
    Bad("glu_mlp", {"w_gate_up": [_zeros(24, 16), None]}, TypeError, ("'w_gate_up'", "list(Tensor, NoneType)")),
    Bad(
        "glu_mlp",
        {"w_gate_up": (_zeros(24, 16), _zeros(23, 16))},
        ValueError,
        ("'w_gate_up'", "[24, 16]", "[23, 16]", "two tensors of one shape"),
    ),
    Bad(
        "glu_mlp", {"b_gate_up": (_zeros(24), _double(24))}, ValueError, ("'b_gate_up'", "float64", "one shape, dtype")
    ),
    Bad("glu_mlp", {"b_gate_up": _zeros(24)}, ValueError, ("'b_gate_up'", "[24]", "needs [48]")),
    Bad("glu_mlp", {"b_gate_up": (None, _zeros(23))}, ValueError, ("'b_gate_up'", "[46]", "needs [48]")),
    Bad("glu_mlp", {"w_gate_up": _APART, "b_gate_up": _zeros(24)}, ValueError, ("'b_gate_up'", "[24]", "needs [48]")),
    Bad(
        "glu_mlp",
        {"w_gate_up": _APART, "b_gate_up": (None, _zeros(23))},
        ValueError,
        ("'b_gate_up[1]'", "[23]", "needs [24]"),
    ),
    Bad("glu_mlp", {"w_gate_up": _APART, "b_gate_up": 1}, TypeError, ("'b_gate_up'", "int", "needs a torch.Tensor")),
    Bad("glu_mlp", {"w_gate_up": _APART, "w_down": _zeros(16, 12)}, ValueError, ("'w_down'", "needs [16, 24]")),
    Bad("glu_mlp", {"w_gate_up": (_zeros(24), _zeros(24))}, ValueError, ("'w_gate_up'", "[24]", "[F, D]")),
    Bad("glu_mlp", {"w_down": _zeros(16, 48)}, ValueError, ("'w_down'", "[16, 48]", "needs [16, 24]", "half")),
    Bad("glu_mlp", {"w_down": _double(16, 24)}, TypeError, ("'w_down'", "torch.float64", "'x'", "torch.float32")),
    Bad("glu_mlp", {"b_down": _zeros(24)}, ValueError, ("'b_down'", "[24]", "needs [16]")),
    Bad("glu_mlp", {"activation": "sigmoid"}, ValueError, ("'activation'", "'sigmoid'", "'gelu', 'gelu_tanh'")),
]

MLP = [
    Bad("mlp", {"x": _zeros()}, ValueError, ("'x'", "[]", "at least 1 dimension")),
    Bad("mlp", {"x": _integers(2, 16)}, TypeError, ("'x'", "torch.int64", FLOATING)),
    Bad("mlp", {"w1": _zeros(24, 15)}, ValueError, ("'w1'", "[24, 15]", "needs [24, 16]")),
    Bad("mlp", {"w1": _zeros(24)}, ValueError, ("'w1'", "[24]", "2 dimensions, [F, D]")),
    Bad("mlp", {"w1": _meta(24, 16)}, ValueError, ("'w1'", "meta", "'x' is on cpu")),
    Bad("mlp", {"b1": _zeros(16)}, ValueError, ("'b1'", "[16]", "needs [24]")),
    Bad("mlp", {"w2": _zeros(24, 16)}, ValueError, ("'w2'", "[24, 16]", "needs [24, 24]", "w1's first axis")),
    Bad("mlp", {"w2": _double(16, 24)}, TypeError, ("'w2'", "torch.float64", "'x'", "torch.float32")),
    Bad("mlp", {"b2": _zeros(24)}, ValueError, ("'b2'", "[24]", "needs [16]")),
    Bad("mlp", {"activation": "tanh"}, ValueError, ("'activation'", "'tanh'", "'gelu', 'gelu_tanh'", "'silu'")),
    Bad("mlp", {"activation": None}, ValueError, ("'activation'", "None", "'gelu'")),
]


ROTARY = [
    Bad("rotary", {"x": _zeros(2, 7, 8)}, ValueError, ("'x'", "[2, 7, 8]", "4 dimensions, [B, H, N, K]")),
    Bad("rotary", {"x": _zeros(2, 3, 7, 9)}, ValueError, ("'x'", "last axis of 9", "an even number")),
    Bad("rotary", {"x": _zeros(2, 3, 7, 0)}, ValueError, ("'x'", "last axis of 0", "2 or more")),
    Bad("rotary", {"x": _integers(2, 3, 7, 8)}, TypeError, ("'x'", "torch.int64", FLOATING)),
    Bad("rotary", {"sin": _zeros(7, 8)}, ValueError, ("'sin'", "[7, 8]", "broadcasts", "[2, 3, 6, 8]")),
    Bad("rotary", {"sin": _integers(6, 8)}, TypeError, ("'sin'", "torch.int64", FLOATING)),
    Bad("rotary", {"sin": 0.5}, TypeError, ("'sin'", "float", "torch.Tensor")),
    Bad("rotary", {"cos": _zeros(6, 4)}, ValueError, ("'cos'", "[6, 4]", "broadcasts", "[2, 3, 6, 8]")),
    Bad("rotary", {"cos": _zeros(2, 6, 8)}, ValueError, ("'cos'", "[2, 6, 8]", "broadcasts")),
    Bad("rotary", {"cos": _zeros(1, 1, 1, 6, 8)}, ValueError, ("'cos'", "[1, 1, 1, 6, 8]", "broadcasts")),
    Bad("rotary", {"cos": _meta(6, 8)}, ValueError, ("'cos'", "meta", "'x' is on cpu")),
    Bad("rotary", {"prefix": 8}, ValueError, ("'prefix'", "is 8", "from 0 to x's 7 tokens")),
    Bad("rotary", {"prefix": -1}, ValueError, ("'prefix'", "is -1", "from 0")),
    Bad("rotary", {"prefix": 1.0}, ValueError, ("'prefix'", "is 1.0", "an int")),
]


@pytest.mark.parametrize(
    "bad", [*LINEAR, *PATCH_EMBED, *ATTENTION, *ADD_LAYER_NORM, *ADD_RMS_NORM, *MLP, *GLU_MLP, *ROTARY], ids=str
)
def test_wrong_argument(bad: Bad) -> None:
    check_bad(bad, GOOD[bad.op])


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op: str) -> None:
    with vk.record() as calls:
        getattr(vk.ops, op)(**GOOD[op]())
    assert [call.op for call in calls] == [op]


# ---------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cuda",), ("use: unknown backend 'cuda'", "needs one of 'triton', 'ext', 'reference'")),
        (("ext", "Reference"), ("use: unknown backend 'Reference'", "needs one of")),
        ((), ("use: got no backend", "needs at least one of 'triton'")),
        ((None,), ("use: unknown backend None", "needs one of")),
    ],
)
def test_unknown_backend(names: tuple[Any, ...], words: tuple[str, ...]) -> None:
    check_refused(lambda: vk.use(*names), ValueError, words)
    assert dispatch.order("cpu") == ("ext", "reference")


def test_backend_that_is_not_there() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    with vk.use("triton"):
        check_refused(
            lambda: vk.ops.linear(x, weight),
            vk.BackendError,
            ("linear (forward)", "no backend in use can serve", f"triton: {vk.backends()['triton']}"),
        )


def test_backend_that_cannot_serve_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend's own reason is in the message, forward and backward."""
    linear = dispatch.OPS["linear"]
    for backend in ("ext", "reference"):
        given = linear.implementations[backend]
        declining = dispatch.Implementation(
            given.forward,
            given.backward,
            lambda direction, args, backend=backend: f"{backend} has no {direction} today",
        )
        monkeypatch.setitem(linear.implementations, backend, declining)
    monkeypatch.setattr(dispatch, "why_not", lambda backend: None)
    check_refused(
        lambda: vk.ops.linear(torch.randn(2, 4), torch.randn(3, 4)),
        vk.BackendError,
        ("linear (forward)", "ext: ext has no forward today", "reference: reference has no forward today"),
    )


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.zeros(1, device="meta"), "on meta"), (torch.zeros(1, dtype=torch.float8_e5m2), "torch.float8_e5m2")],
)
def test_ext_declines_in_words(tensor: Tensor, words: str) -> None:
    reason = dispatch.OPS["linear"].implementations["ext"].why_not("forward", (torch.zeros(1), None, 3, tensor))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("name", ["sse", "AVX2", ""])
def test_unknown_instruction_set(name: str) -> None:
    check_refused(lambda: ext.isa(name), ValueError, ("isa", repr(name), "'baseline', 'avx2', 'avx512'"))
