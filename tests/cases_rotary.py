"""The cases of rotary and rotary_qkv, a part of the list in `cases`."""

from __future__ import annotations

from typing import Any

import torch
from case import DTYPES, Case, T

F32, F64, BF16, F16 = DTYPES


def rotary(
    name: str,
    shape: tuple[int, int, int, int] = (2, 3, 7, 16),
    *,
    prefix: int = 0,
    half: bool = False,
    lead: tuple[int, ...] = (),
    layout: str = "heads last",
    positions: torch.dtype | None = F32,
    learned: bool = False,
    **more: Any,
) -> Case:
    """`lead` is what stands before [N - prefix, K] in the sines' and cosines' shape."""
    *_, tokens, width = shape
    place = T((*lead, tokens - prefix, width), dtype=positions, grad=learned)
    tensors = {"x": T(shape, layout=layout), "sin": place, "cos": place}
    return Case("rotary", name, tensors, {"prefix": prefix, "half": half}, **more)


def rotary_qkv(
    name: str,
    shape: tuple[int, ...] = (2, 7, 3, 3, 16),
    *,
    prefix: int = 0,
    half: bool = True,
    norm: str | None = None,
    vectors: tuple[str, ...] = (),
    lead: tuple[int, ...] | None = (),
    positions: torch.dtype | None = F32,
    parameters: torch.dtype | None = None,
    eps: float = 1e-6,
    mean: float = 0.0,
    layout: str = "contiguous",
    **more: Any,
) -> Case:
    """[B, N, P, H, K] or [T, P, H, K]; `lead` as in `rotary`, and None for no positions."""
    tokens, width = shape[-4], shape[-1]
    tensors = {"qkv": T(shape, mean=mean, layout=layout)}
    if lead is not None:
        place = T((*lead, tokens - prefix, width), dtype=positions, grad=False)
        tensors |= {"sin": place, "cos": place}
    weights = {f"{part}_weight": T((width,), gain=0.2, mean=1.0, dtype=parameters) for part in "qk"}
    biases = {f"{part}_bias": T((width,), dtype=parameters) for part in "qk"}
    tensors |= {vector: (weights | biases)[vector] for vector in vectors}
    return Case("rotary_qkv", name, tensors, {"prefix": prefix, "half": half, "norm": norm, "eps": eps}, **more)


WEIGHTS = ("q_weight", "k_weight")
VECTORS = ("q_weight", "q_bias", "k_weight", "k_bias")
LAYER: dict[str, Any] = {"norm": "layer_norm", "vectors": VECTORS}
RMS: dict[str, Any] = {"norm": "rms_norm", "vectors": WEIGHTS}

HALVES = {False: "pairs", True: "halves"}

ROTARY = [
    *(
        rotary(f"head width {width}, {HALVES[half]}", (2, 2, 9, width), prefix=1, half=half)
        for width in (2, 6, 16, 32, 64, 72, 80, 88, 128)
        for half in HALVES
    ),
    *(rotary(f"prefix {prefix}, {HALVES[half]}", prefix=prefix, half=half) for prefix in (0, 1, 5) for half in HALVES),
    *(
        rotary(f"{', '.join(map(str, lead))} in front, {HALVES[half]}", prefix=1, half=half, lead=lead)
        for lead in ((1,), (3,), (1, 3), (2, 1), (2, 3))
        for half in HALVES
    ),
    *(rotary(f"packed, {HALVES[half]}", prefix=1, half=half, layout="packed") for half in HALVES),
    *(rotary(f"many tokens, {HALVES[half]}", (2, 5, 65, 24), prefix=1, half=half) for half in HALVES),
    *(rotary(f"positions in x's dtype, {HALVES[half]}", half=half, positions=None) for half in HALVES),
    rotary("float64 positions", positions=F64, dtypes=(F64,)),
    rotary("one token", (2, 3, 1, 16)),
    rotary("one sample, one head", (1, 1, 7, 16), prefix=1),
    rotary("prefix alone", (2, 3, 5, 16), prefix=5),
    rotary("empty batch", (0, 3, 7, 16), prefix=1),
    rotary("no tokens", (2, 3, 0, 16)),
    rotary("no heads", (2, 0, 7, 16)),
]
ROTARY_LEARNED = [  # the reference alone has gradients of sines and cosines
    rotary("learned", prefix=1, learned=True),
    rotary("learned, halves, for each head", prefix=1, half=True, lead=(3,), learned=True),
    rotary("learned, for each sample", half=True, lead=(2, 1), learned=True),
]

NORMED = {"no norm": {}, "LayerNorm": LAYER, "RMSNorm": RMS}

ROTARY_QKV = [
    *(
        rotary_qkv(f"{name}, {HALVES[half]}", prefix=1, half=half, **norm)
        for name, norm in NORMED.items()
        for half in HALVES
    ),
    *(
        rotary_qkv(f"head width {width}, {name}", (2, 9, 3, 2, width), half=width % 16 == 0, **norm)
        for width in (2, 6, 64, 72, 80, 128)
        for name, norm in NORMED.items()
    ),
    *(rotary_qkv(f"many in one, {name}", (65, 3, 5, 24), **norm) for name, norm in NORMED.items()),
    *(rotary_qkv(f"many tokens, {name}", (2, 65, 3, 5, 24), prefix=1, **norm) for name, norm in NORMED.items()),
    *(rotary_qkv(f"norm alone, {name}", lead=None, **norm) for name, norm in NORMED.items() if norm),
    *(rotary_qkv(f"odd width, {name}", (2, 7, 3, 3, 33), lead=None, **norm) for name, norm in NORMED.items() if norm),
    *(
        rotary_qkv(f"{', '.join(map(str, lead))} in front", prefix=1, lead=lead, **RMS)
        for lead in ((1,), (3,), (2, 1), (2, 3))
    ),
    rotary_qkv("prefix alone", prefix=7, **LAYER),
    rotary_qkv("q and k", (2, 7, 2, 3, 16), **LAYER),
    rotary_qkv("q alone", (2, 7, 1, 3, 16), norm="rms_norm", vectors=("q_weight",)),
    rotary_qkv("no weights, LayerNorm", norm="layer_norm"),
    rotary_qkv("no weights, RMSNorm", norm="rms_norm"),
    rotary_qkv("q's weight", norm="layer_norm", vectors=("q_weight",)),
    rotary_qkv("k's weight and bias", norm="layer_norm", vectors=("k_weight", "k_bias")),
    rotary_qkv("weights without biases", norm="layer_norm", vectors=WEIGHTS),
    rotary_qkv("large mean", mean=30.0, **LAYER),
    rotary_qkv("eps", eps=0.5, **RMS),
    rotary_qkv("no eps", (1, 5, 3, 3, 16), eps=0.0, **LAYER),
    rotary_qkv("float32 parameters", parameters=F32, dtypes=(BF16, F16), **LAYER),
    rotary_qkv("positions in qkv's dtype", positions=None, half=False, **RMS),
    rotary_qkv("float64 positions", positions=F64, dtypes=(F64,), **RMS),
    rotary_qkv("one token", (1, 1, 3, 3, 16), **LAYER),
    rotary_qkv("empty batch", (0, 7, 3, 3, 16), prefix=1, **LAYER),
    rotary_qkv("no tokens", (0, 3, 3, 16), **RMS),
    rotary_qkv("no heads", (2, 7, 3, 0, 16), **LAYER),
]
