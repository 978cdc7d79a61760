"""The cases of rotary, a part of the list in `cases`."""

from __future__ import annotations

from typing import Any

import torch
from case import DTYPES, Case, T

F32, F64, *_ = DTYPES


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
