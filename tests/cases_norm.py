"""The cases of add_layer_norm and add_rms_norm, a part of the list in `cases`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from case import DTYPES, Case, T
from draws import drop_path

F32, F64, BF16, F16 = DTYPES
REDUCED = (BF16, F16)

# -------------------------------------------------------------------------------------- add_layer_norm

VECTORS = ("bias", "branch_bias", "scale", "row_scale")


def add_layer_norm(
    name: str,
    shape: tuple[int, ...] = (3, 5, 33),
    *,
    branch: bool = True,
    vectors: tuple[str, ...] = VECTORS,
    by_sample: tuple[str, ...] = (),
    mean: float = 0.0,
    x: torch.dtype | None = None,
    parameters: torch.dtype | None = None,
    op: str = "add_layer_norm",
    **more: Any,
) -> Case:
    """`vectors` are given beside weight; those `by_sample` have a row for each sample, and bias is as weight."""

    def of(vector: str, **draw: Any) -> T:
        return T((shape[0], shape[-1]) if vector in by_sample else shape[-1:], dtype=parameters, **draw)

    known = {
        "weight": of("weight", gain=0.2, mean=1.0),
        "bias": of("weight"),
        "branch_bias": of("branch_bias"),
        "scale": of("scale"),
        "row_scale": T(shape[:1], dtype=parameters, convert=drop_path),
    }
    tensors = {"x": T(shape, mean=mean, dtype=x), "branch": T(shape) if branch else None}
    tensors |= {vector: known[vector] for vector in ("weight", *vectors)}
    return Case(op, name, tensors, **more)


def _without_weight(name: str, op: str, **more: Any) -> Case:
    case = add_layer_norm(name, op=op, **more)
    return dataclasses.replace(case, tensors={**case.tensors, "weight": None})


ADD_LAYER_NORM = [
    # every optional argument there and not there
    *(
        add_layer_norm(f"with {', '.join(vectors) or 'no vector'}", vectors=vectors)
        for count in range(len(VECTORS) + 1)
        for vectors in itertools.combinations(VECTORS, count)
    ),
    add_layer_norm("no branch", branch=False, vectors=("bias",)),
    add_layer_norm("no branch, no bias", branch=False, vectors=()),
    add_layer_norm("no branch, normed alone", branch=False, vectors=("bias",), used=("normed",)),
    add_layer_norm("total alone", used=("total",)),
    add_layer_norm("normed alone", used=("normed",)),
    *(add_layer_norm(f"width {width}", (2, 3, width)) for width in (7, 64, 65, 192, 197, 768)),
    add_layer_norm("width 1", (2, 3, 1), options={"eps": 0.1}),
    add_layer_norm("many rows", (4, 65, 48)),
    add_layer_norm("197 tokens", (2, 197, 40)),
    add_layer_norm("one token", (1, 1, 33)),
    add_layer_norm("one sample", (1, 7, 16)),
    add_layer_norm("empty batch", (0, 5, 16)),
    add_layer_norm("no tokens", (2, 0, 16)),
    add_layer_norm("two axes", (5, 16)),
    add_layer_norm("four axes", (2, 3, 2, 16)),
    add_layer_norm("one axis", (16,), vectors=("bias", "branch_bias", "scale")),
    add_layer_norm("large mean", (3, 5, 64), mean=30.0),
    add_layer_norm("large mean, no branch", (3, 5, 65), mean=30.0, branch=False, vectors=("bias",)),
    add_layer_norm("eps", (3, 5, 16), options={"eps": 0.5}),
    add_layer_norm("reduced branch on a float32 residual", x=F32, parameters=F32, dtypes=REDUCED),
    add_layer_norm("reduced branch on a float32 residual, no vector", x=F32, vectors=(), dtypes=REDUCED),
    add_layer_norm("float32 parameters", parameters=F32, dtypes=REDUCED),
    add_layer_norm("float32 parameters, no branch", branch=False, parameters=F32, vectors=("bias",), dtypes=REDUCED),
    add_layer_norm("normed in bfloat16", x=F32, parameters=F32, options={"out_dtype": BF16}, dtypes=(F32, BF16)),
    add_layer_norm("normed in float32", parameters=F32, options={"out_dtype": F32}, dtypes=REDUCED),
]

_FACTORS = ("branch_bias", "scale", "row_scale")
_ADAPTIVE: dict[str, Any] = {"vectors": ("bias", "scale"), "by_sample": ("weight", "scale")}
ADD_LAYER_NORM += [  # and what is left out, for both norms
    *(
        case
        for op in ("add_layer_norm", "add_rms_norm")
        for case in (
            _without_weight("no weight", op, vectors=_FACTORS),
            _without_weight("no weight, no branch", op, branch=False, vectors=()),
            add_layer_norm("adaptive", op=op, **_ADAPTIVE),
            add_layer_norm("adaptive, many rows", (4, 65, 48), op=op, **_ADAPTIVE),
            add_layer_norm("adaptive, no gate", op=op, branch=False, vectors=("bias",), by_sample=("weight",)),
        )
    ),
    add_layer_norm("adaptive, every vector", vectors=VECTORS, by_sample=("weight", "scale")),
    add_layer_norm("weight by sample", vectors=VECTORS, by_sample=("weight",)),
    add_layer_norm("scale by sample", vectors=VECTORS, by_sample=("scale",)),
    add_layer_norm("adaptive, 33 samples", (33, 17, 40), **_ADAPTIVE),
    add_layer_norm("adaptive, one sample", (1, 40, 16), **_ADAPTIVE),
    add_layer_norm("adaptive, two axes", (5, 16), **_ADAPTIVE),
    add_layer_norm("adaptive, four axes", (2, 3, 2, 16), **_ADAPTIVE),
    add_layer_norm("adaptive, empty batch", (0, 5, 16), **_ADAPTIVE),
    add_layer_norm("adaptive, no tokens", (2, 0, 16), **_ADAPTIVE),
    add_layer_norm("adaptive, float32 vectors", parameters=F32, dtypes=REDUCED, **_ADAPTIVE),
]

# -------------------------------------------------------------------------------------- add_rms_norm


def add_rms_norm(name: str, shape: tuple[int, ...] = (3, 5, 33), **more: Any) -> Case:
    return add_layer_norm(name, shape, **{"vectors": _FACTORS, "op": "add_rms_norm", **more})


ADD_RMS_NORM = [
    add_rms_norm("every factor"),
    add_rms_norm("no factor", vectors=()),
    *(add_rms_norm(f"with {vector}", vectors=(vector,)) for vector in VECTORS),
    add_rms_norm("no branch", branch=False, vectors=()),
    add_rms_norm("no branch, normed alone", branch=False, vectors=(), used=("normed",)),
    add_rms_norm("total alone", used=("total",)),
    add_rms_norm("normed alone", used=("normed",)),
    *(add_rms_norm(f"width {width}", (2, 3, width)) for width in (7, 65, 192, 768)),
    add_rms_norm("width 1", (2, 3, 1), options={"eps": 0.1}),
    add_rms_norm("many rows", (4, 65, 48)),
    add_rms_norm("one token", (1, 1, 33)),
    add_rms_norm("empty batch", (0, 5, 16)),
    add_rms_norm("no tokens", (2, 0, 16)),
    add_rms_norm("two axes", (5, 16)),
    add_rms_norm("four axes", (2, 3, 2, 16)),
    add_rms_norm("one axis", (16,), vectors=("branch_bias", "scale")),
    add_rms_norm("large mean", (3, 5, 64), mean=30.0),
    add_rms_norm("eps", (3, 5, 16), options={"eps": 0.5}),
    add_rms_norm("reduced branch on a float32 residual", x=F32, parameters=F32, dtypes=REDUCED),
    add_rms_norm("float32 parameters", parameters=F32, dtypes=REDUCED),
    add_rms_norm("normed in bfloat16", x=F32, parameters=F32, options={"out_dtype": BF16}, dtypes=(F32, BF16)),
    add_rms_norm("normed in float32", parameters=F32, options={"out_dtype": F32}, dtypes=REDUCED),
]
