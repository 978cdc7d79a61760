"""The one list of cases: tests run it on every backend in every dtype, benches time it.

A new case is one line in the list of its op; attention's, the norms' and rotary's are in
`cases_attention`, `cases_norm` and `cases_rotary`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from case import DTYPES, Case, T
from cases_attention import (
    ATTENTION,
    ATTENTION_QKV,
    ATTENTION_REL_POS,
    ATTENTION_VARLEN,
    attention,
    attention_qkv,
    attention_rel_pos,
    attention_rel_pos_qkv,
    attention_varlen,
    attention_varlen_qkv,
)
from cases_norm import ADD_LAYER_NORM, ADD_RMS_NORM, VECTORS, add_layer_norm, add_rms_norm
from cases_rotary import LAYER, ROTARY, ROTARY_QKV, rotary, rotary_qkv
from draws import indices, keep_some, pixels

from vitkernels.ops.mlp import ACTIVATIONS

F32, F64, BF16, F16 = DTYPES
REDUCED = (BF16, F16)

# -------------------------------------------------------------------------------------- linear


def linear(name: str, rows: tuple[int, ...], inner: int, outer: int, bias: bool = True, **more: Any) -> Case:
    tensors = {"x": T((*rows, inner)), "weight": T((outer, inner), gain=inner**-0.5)}
    return Case("linear", name, tensors | ({"bias": T((outer,))} if bias else {}), **more)


LINEAR = [
    linear("plain", (2, 5), 16, 24),
    linear("odd", (3, 7), 33, 65),
    linear("no bias", (2, 5), 16, 24, bias=False),
    linear("one row", (1,), 33, 7),
    linear("no leading axis", (), 16, 8),
    linear("one column", (2, 33), 1, 1),
    linear("empty batch", (0, 5), 16, 24),
    linear("four axes", (2, 3, 2), 16, 8),
    linear("blocked gemm", (3, 100), 96, 288),
]

# -------------------------------------------------------------------------------------- patch_embed


def patch_embed(
    name: str,
    patch: int | tuple[int, int] = 4,
    grid: tuple[int, int] = (2, 3),
    *,
    batch: int = 2,
    channels: int = 3,
    width: int = 24,
    image: dict[str, Any] | None = None,
    bias: bool = True,
    prefix: int = 0,
    pos_embed: int | None = None,
    keep: int | None = None,
    table: torch.dtype | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    **more: Any,
) -> Case:
    down, across = (patch, patch) if isinstance(patch, int) else patch
    tensors = {
        "image": T((batch, channels, down * grid[0], across * grid[1]), **(image or {})),
        "weight": T((width, channels, down, across), gain=(channels * down * across) ** -0.5),
    }
    if bias:
        tensors["bias"] = T((width,))
    if prefix:
        tensors["prefix"] = T((prefix, width), dtype=table)
    if pos_embed is not None:
        tensors["pos_embed"] = T((pos_embed, width), dtype=table)
    if keep is not None:
        tensors["keep"] = T((batch, keep), convert=indices(grid[0] * grid[1]))
    options = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    return Case("patch_embed", name, tensors, options, **more)


IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
UINT8: dict[str, Any] = {"convert": pixels}

PATCH_EMBED = [
    *(patch_embed(f"patch {size}", size) for size in (1, 2, 4, 7, 14, 16, 32)),
    patch_embed("odd width, odd grid", 7, (5, 3), width=33),
    patch_embed("non-square patch", (4, 7), (3, 2)),
    patch_embed("one channel", 4, channels=1),
    patch_embed("four channels", 4, channels=4),
    patch_embed("one patch", 14, (1, 1)),
    patch_embed("one sample", 4, batch=1, prefix=1, pos_embed=7),
    patch_embed("empty batch", 4, batch=0, prefix=1, pos_embed=7),
    patch_embed("no bias", 4, bias=False),
    patch_embed("uint8", 16, image=UINT8),
    patch_embed("uint8, mean and std", 14, image=UINT8, **IMAGENET),
    patch_embed("uint8, no bias, everything", 4, image=UINT8, bias=False, prefix=5, pos_embed=11, **IMAGENET),
    patch_embed("mean and std", 4, **IMAGENET),
    patch_embed("mean alone", 4, mean=[0.5, 0.5, 0.25]),
    patch_embed("std alone", 4, std=[0.5, 2.0, 0.25]),
    patch_embed("float32 image", 4, image={"dtype": F32}, dtypes=REDUCED, **IMAGENET),
    patch_embed("bfloat16 image", 4, image={"dtype": BF16}, dtypes=(F32, F64)),
    patch_embed("prefix", 4, prefix=1),
    patch_embed("positions of patches", 4, pos_embed=6),
    patch_embed("prefix, positions of patches", 4, prefix=2, pos_embed=6),
    patch_embed("prefix, positions of all", 4, prefix=5, pos_embed=11),
    patch_embed("float32 positions", 4, prefix=1, pos_embed=7, table=F32, dtypes=REDUCED),
    patch_embed("keep", 4, keep=4),
    patch_embed(
        "keep, prefix, positions of patches", 4, (3, 3), keep=5, prefix=2, pos_embed=9, image=UINT8, **IMAGENET
    ),
    patch_embed("keep, prefix, positions of all", 7, (3, 3), keep=3, prefix=1, pos_embed=10, **IMAGENET),
    patch_embed("many tokens", 1, (33, 33), batch=3, channels=2, width=8, prefix=1, pos_embed=1090),
    patch_embed("many tokens kept", 1, (40, 40), batch=3, channels=2, width=8, keep=1100, pos_embed=1600),
    patch_embed("large mean", 4, image={"mean": 30.0}),
    patch_embed("blocked gemm", 16, (5, 7), width=96, prefix=1, pos_embed=36),
]

# -------------------------------------------------------------------------------------- mlp


def mlp(
    name: str,
    rows: tuple[int, ...] = (2, 5),
    sizes: tuple[int, int, int] = (16, 24, 16),
    *,
    biases: tuple[str, ...] = ("b1", "b2"),
    gain: float = 1.0,
    **more: Any,
) -> Case:
    inner, hidden, outer = sizes
    tensors = {
        "x": T((*rows, inner), gain=gain),
        "w1": T((hidden, inner), gain=inner**-0.5),
        "b1": T((hidden,)) if "b1" in biases else None,
        "w2": T((outer, hidden), gain=hidden**-0.5),
        "b2": T((outer,)) if "b2" in biases else None,
    }
    return Case("mlp", name, tensors, **more)


MLP = [
    *(mlp(f"{name}", options={"activation": name}) for name in ACTIVATIONS),
    *(mlp(f"{name}, blocked gemm", (3, 100), (96, 384, 96), options={"activation": name}) for name in ACTIVATIONS),
    mlp("no bias", biases=()),
    mlp("no bias, blocked gemm", (3, 100), (96, 384, 96), biases=()),
    mlp("first bias", biases=("b1",)),
    mlp("second bias", biases=("b2",)),
    mlp("odd", (3, 7), (33, 65, 7)),
    mlp("odd, blocked gemm", (1, 197), (65, 197, 33)),
    mlp("other width out", (2, 5), (16, 40, 8)),
    mlp("all widths one", (33,), (1, 1, 1), dtypes=(F32, F64)),
    mlp("one number", (1,), (1, 1, 1), dtypes=(F32, F64)),
    mlp("one row", (1, 1), (33, 65, 33)),
    mlp("no leading axis", ()),
    mlp("empty batch", (0, 5)),
    mlp("four axes", (2, 2, 3)),
    mlp("wide hidden layer", (2, 5), (16, 1030, 16)),
    mlp("large input", (3, 7), (33, 65, 33), gain=30.0),
]

# -------------------------------------------------------------------------------------- glu_mlp

GATES = ("silu", "gelu", "gelu_tanh")


def glu_mlp(
    name: str,
    rows: tuple[int, ...] = (2, 5),
    sizes: tuple[int, int, int] = (16, 24, 16),
    *,
    biases: tuple[str, ...] = ("b_gate_up", "b_down"),
    gain: float = 1.0,
    **more: Any,
) -> Case:
    inner, hidden, outer = sizes
    tensors = {
        "x": T((*rows, inner), gain=gain),
        "w_gate_up": T((2 * hidden, inner), gain=inner**-0.5),
        "b_gate_up": T((2 * hidden,)) if "b_gate_up" in biases else None,
        "w_down": T((outer, hidden), gain=hidden**-0.5),
        "b_down": T((outer,)) if "b_down" in biases else None,
    }
    return Case("glu_mlp", name, tensors, **more)


def glu_mlp_apart(
    name: str,
    rows: tuple[int, ...] = (2, 5),
    sizes: tuple[int, int, int] = (16, 24, 16),
    *,
    biases: tuple[str, ...] = ("b_gate", "b_up", "b_down"),
    **more: Any,
) -> Case:
    """Gate and up are two tensors each."""
    inner, hidden, outer = sizes
    shapes = {"w_gate": (hidden, inner), "b_gate": (hidden,), "w_up": (hidden, inner), "b_up": (hidden,)}
    shapes |= {"w_down": (outer, hidden), "b_down": (outer,)}
    tensors: dict[str, T | None] = {"x": T((*rows, inner))}
    for key, shape in shapes.items():
        gain = 1.0 if key[0] == "b" else shape[-1] ** -0.5
        tensors[key] = None if key[0] == "b" and key not in biases else T(shape, gain=gain)
    pairs = {"w_gate_up": ("w_gate", "w_up"), "b_gate_up": ("b_gate", "b_up")}
    return Case("glu_mlp", f"apart, {name}", tensors, pairs=pairs, **more)


GLU_MLP = [
    *(glu_mlp(f"{name}", options={"activation": name}) for name in ACTIVATIONS),
    *(glu_mlp(f"{name}, blocked gemm", (3, 100), (96, 384, 96), options={"activation": name}) for name in GATES),
    glu_mlp("no bias", biases=()),
    glu_mlp("no bias, blocked gemm", (3, 100), (96, 384, 96), biases=()),
    glu_mlp("first bias", biases=("b_gate_up",)),
    glu_mlp("second bias", biases=("b_down",)),
    glu_mlp("odd", (3, 7), (33, 65, 7)),
    glu_mlp("odd, blocked gemm", (1, 197), (65, 197, 33)),
    glu_mlp("odd hidden layer, blocked gemm", (1, 197), (64, 197, 32)),
    glu_mlp("all widths one", (33,), (1, 1, 1), dtypes=(F32, F64)),
    glu_mlp("one row", (1, 1), (33, 65, 33)),
    glu_mlp("no leading axis", ()),
    glu_mlp("empty batch", (0, 5)),
    glu_mlp("four axes", (2, 2, 3)),
    glu_mlp("wide hidden layer", (2, 5), (16, 1030, 16)),
    glu_mlp("large input", (3, 7), (33, 65, 33), gain=30.0),
    glu_mlp_apart("no bias", biases=()),
    glu_mlp_apart("gate's bias", biases=("b_gate", "b_down")),
    glu_mlp_apart("empty batch", (0, 5)),
]
GLU_MLP_APART = [  # what CPUs pack in another way than weights in one; GPUs' kernels get one
    glu_mlp_apart("up's bias", biases=("b_up",)),
    glu_mlp_apart("blocked gemm", (3, 100), (96, 384, 96), options={"activation": "gelu"}),
    glu_mlp_apart("odd", (3, 7), (33, 65, 7)),
    glu_mlp_apart("odd, blocked gemm", (1, 197), (65, 197, 33), biases=()),
    glu_mlp_apart("hidden layer of no whole panels, blocked gemm", (1, 197), (64, 198, 32)),
]

# -------------------------------------------------------------------------------------- stride matrix

SMALL = [  # one case an op, which gives every tensor argument
    linear("strides", (3, 5), 16, 24),
    patch_embed("strides", 4, (2, 4), prefix=2, pos_embed=10, keep=6),
    attention("strides", 2, 3, 9, mask=T((2, 3, 9, 9))),
    attention_qkv("strides", 2, 3, 9, mask=T((2, 3, 9, 9))),
    attention_rel_pos("strides", 2, 3, (3, 3)),
    attention_varlen("strides", (5, 0, 4), 4, keys=(3, 2, 6), keys_heads=2),
    add_layer_norm("strides", (3, 5, 16)),
    add_rms_norm("strides", (3, 5, 16), vectors=VECTORS, by_sample=("weight", "scale")),
    mlp("strides", (3, 5)),
    glu_mlp("strides", (3, 5)),
    glu_mlp_apart("strides", (3, 5)),
    rotary("strides", (3, 3, 5, 16), prefix=1, lead=(3, 3), layout="contiguous"),
    rotary_qkv("strides", (3, 5, 3, 3, 16), prefix=1, lead=(3, 3), **LAYER),
]
_LARGE = [  # where GEMMs take another path
    linear("strides, blocked gemm", (3, 100), 96, 288),
    mlp("strides, blocked gemm", (3, 100), (96, 384, 96)),
    glu_mlp("strides, blocked gemm", (3, 100), (96, 384, 96)),
    glu_mlp_apart("strides, blocked gemm", (3, 100), (96, 384, 96)),
]
_HALVES = [  # sizes at which GPUs have kernels for 16 bits: short attention, whole tiles, patches that TMA can load
    linear("strides, 16 bits", (3, 40), 64, 48),
    patch_embed("strides, 16 bits", 4, (2, 4), prefix=2, pos_embed=10, keep=6),
    patch_embed("strides, 16 bits, patch 16", 16, (2, 4), prefix=1, pos_embed=9, width=64),
    attention("strides, 16 bits", 2, 3, 40, 24, 64, mask=T((2, 1, 1, 24), convert=keep_some)),
    attention_qkv("strides, 16 bits", 2, 3, 40, 64),
    attention_rel_pos_qkv("strides, 16 bits", 2, 3, (5, 8), 64),
    attention_varlen_qkv("strides, 16 bits", (40, 7), 2, 64),
    add_layer_norm("strides, 16 bits", (3, 5, 64)),
    add_rms_norm("strides, 16 bits", (3, 5, 64)),
    mlp("strides, 16 bits", (3, 40), (64, 96, 64)),
    glu_mlp("strides, 16 bits", (3, 40), (64, 96, 64)),
    rotary("strides, 16 bits", (2, 3, 5, 64), prefix=1, layout="contiguous"),
    rotary_qkv("strides, 16 bits", (9, 3, 2, 64), **LAYER),
]
_MATRIX = ("transposed", "sliced", "every second row", "expanded", "expanded rows", "offset", "columns")
_VECTOR = ("sliced", "expanded", "offset")
_ARRIVING = ("transposed", "sliced", "expanded everywhere", "offset", "columns", "rows")


def _strided(base: Case, dtypes: tuple[torch.dtype, ...] = (F32,)) -> Iterator[Case]:
    """The base case with one tensor at a time, then one gradient, in each layout that torch can hand over."""
    for name, spec in base.tensors.items():
        assert spec is not None
        layouts: tuple[str, ...] = _VECTOR if len(spec.shape) == 1 else _MATRIX
        if len(spec.shape) == 4:
            layouts += ("channels_last", "heads last")
        if name == "image":
            layouts += ("grey",)
        if name.startswith("cu_seqlens"):
            layouts = ("sliced", "offset")  # all of one number they would be wrong
        for layout in layouts:
            tensors = {**base.tensors, name: dataclasses.replace(spec, layout=layout)}
            yield dataclasses.replace(base, name=f"{base.name}, {name} {layout}", tensors=tensors, dtypes=dtypes)
    for layout in _ARRIVING:
        yield dataclasses.replace(base, name=f"{base.name}, gradient {layout}", grad_layout=layout, dtypes=dtypes)


def _negated(base: Case) -> Case:
    tensors = {name: spec and dataclasses.replace(spec, layout="negated") for name, spec in base.tensors.items()}
    name = f"{base.name}, negated"
    return dataclasses.replace(base, name=name, tensors=tensors, grad_layout="negated", dtypes=(F32,))


NEGATED = [_negated(base) for base in SMALL]
STRIDES = [case for base in (*SMALL, *_LARGE) for case in _strided(base)]
STRIDES_16 = [case for base in _HALVES for case in _strided(base, REDUCED)]

PLAIN = [
    *LINEAR,
    *PATCH_EMBED,
    *ATTENTION,
    *ATTENTION_QKV,
    *ATTENTION_REL_POS,
    *ATTENTION_VARLEN,
    *ADD_LAYER_NORM,
    *ADD_RMS_NORM,
    *MLP,
    *GLU_MLP,
    *ROTARY,
    *ROTARY_QKV,
]
CASES = [*PLAIN, *GLU_MLP_APART, *NEGATED, *STRIDES, *STRIDES_16]
# with every fourth layout, for tests of what layouts share; a tensor has 3, 7 or 9, so that all of them have turns
FEWER = [*PLAIN, *GLU_MLP_APART, *NEGATED, *STRIDES[::4], *STRIDES_16[::4]]
