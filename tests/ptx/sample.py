"""What `make test` runs of everything that could run on the machine: a sample, chosen by the rules that stand here.

`make emulate` runs all of it. The machine takes a second where a GPU takes a microsecond, so that each rule leaves out
what another trial shows too; a test holds that what is left launches every kernel of every op.

Triton's kernels
    Every plain case, in bfloat16 on sm_90, with 1 multiprocessor: cases are the borders of kernels. With 132 of them
    tiles and grids differ, which whole groups of cases share: every fourth case of the ops that ask for the number.
    Other dtypes and sm_80 are other texts of the same kernels: `FEW`, with 1 and with 132 multiprocessors by turns.
    Rows of bench/results/emulated.json that hold, for the sources are the same, were executed whole: of them `FEW`.
CUDA C++
    Every plain case on sm_80, in one dtype, by turns: the kernels of float16 are bfloat16's text, those of float32 are
    the same templates on other cores. Multiprocessors choose a number of blocks alone, which has a test of its own.
Layouts
    Launchers hand strides on, or copy: one layout of each base case of the list, another one for each. CUDA C++ reads
    what is not aligned to vectors by kernels of its own: each tensor, and each gradient, once from an odd place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from case import Case
from cases import (
    PLAIN,
    STRIDES,
    STRIDES_16,
    add_layer_norm,
    linear,
    patch_embed,
    rotary_qkv,
)
from cases_attention import attention_rel_pos
from cases_rotary import LAYER

from ptx.trials import BF16, F16, F32, FEW, HEADS, PERSISTENT, Trial

DTYPES = (BF16, F32, F16)
# sizes that the cases of all backends do not have, and CUDA C++ has branches for
CUDA_CASES = [
    add_layer_norm("width 1152", (2, 3, 1152)),  # a block for a row
    add_layer_norm("width 1025", (1, 3, 1025)),
    add_layer_norm("width 4104", (1, 3, 4104)),  # sums that do not fit registers
    add_layer_norm("width 4097", (1, 2, 4097)),
    # pieces of a row, of 16 bits and of 32, without the branch's own gradients
    *(
        add_layer_norm(f"width {width}, {name}", (2, 5, width), vectors=("bias",), dtypes=(dtype,))
        for width in (256, 512, 768, 1024, 1536)
        for name, dtype in (("16 bits", BF16), ("32 bits", F32))
    ),
    linear("1,100 rows", (1100,), 8, 72),  # partial sums of a bias
    patch_embed("chunks of tokens", 1, (65, 65), batch=2, channels=1, width=8, prefix=1, pos_embed=4226),
    patch_embed("two parts, kept", 2, (7, 7), batch=18, channels=1, width=8, prefix=1, pos_embed=50, keep=40),
    rotary_qkv("blocks of heads", (1, 50, 2, 3, 256), half=False, **LAYER),
    # 8 elements for each of 48 threads
    add_layer_norm("width 384, autocast", (1, 3, 384), x=F32, parameters=F32, dtypes=(BF16, F16)),
    attention_rel_pos("wider than Triton takes", 1, 2, (3, 70), queries=9),  # three parts of its columns
    *(attention_rel_pos(f"head width {width}", 1, 1, (1, 5), width, dtypes=(BF16, F16)) for width in (96, 112)),
]
# a minute on the machine, for what "two parts, kept" shows
SLOW = ("many tokens kept",)


def layouts(cases: Sequence[Case]) -> list[Case]:
    """One layout of each base case, by turns."""
    bases = itertools.groupby(cases, lambda case: (case.op, case.name.rpartition(", ")[0]))
    groups = [list(group) for _, group in bases]
    return [group[number % len(group)] for number, group in enumerate(groups)]


def triton() -> list[Trial]:
    """The sample of Triton's kernels."""
    trials = [Trial(case, BF16) for case in PLAIN if BF16 in case.dtypes]
    asking = [case for case in PLAIN if case.op in PERSISTENT and BF16 in case.dtypes]
    few = [case for case in FEW if case.op in (*PERSISTENT, *HEADS)]
    trials += [Trial(case, BF16, processors=132) for case in dict.fromkeys([*asking[::4], *few])]
    trials += [Trial(case, BF16) for case in layouts(STRIDES_16)]
    for turn, (dtype, capability) in enumerate([(F16, (9, 0)), (F32, (9, 0)), (BF16, (8, 0))]):
        for number, case in enumerate(FEW):
            many = case in few and (turn + number) % 2
            trials.append(Trial(case, dtype, capability, 132 if many else 1))
    return trials


def cuda() -> list[Trial]:
    """The sample of the extension's CUDA C++."""
    cases = [case for case in (*PLAIN, *CUDA_CASES) if case.name not in SLOW]
    cases += [*layouts(STRIDES), *layouts(STRIDES_16), *(case for case in STRIDES if case.name.endswith(" offset"))]
    trials = []
    for number, case in enumerate(cases):
        dtypes = [each for each in DTYPES if each in case.dtypes]
        if dtypes:
            trials.append(Trial(case, dtypes[number % len(dtypes)], (8, 0), backend="cuda"))
    return trials


def of(backend: str) -> list[Trial]:
    return {"triton": triton, "cuda": cuda}[backend]()
