"""The machine sees faults that are planted in compiled kernels; what it does not see is shown to be redundant.

A sample; `make emulate` plants them all.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vitkernels import kernels

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from ptx import cuda
from ptx.faults import KINDS, KINDS_OF_CPP, redundant, seen
from ptx.plant import KERNELS, Kernel

SAMPLE = [
    each for each in KERNELS if each.op in ("mlp", "attention_qkv", "add_layer_norm") and each.capability == (9, 0)
]
OPS_OF_CPP = ("attention_qkv", "add_layer_norm", "rotary_qkv")
SAMPLE_OF_CPP = [each for each in KERNELS if each.op in OPS_OF_CPP and each.backend == "cuda"]


@pytest.mark.parametrize("kernel", SAMPLE, ids=str)
def test_planted_faults(kernel: Kernel) -> None:
    check(kernel, KINDS)


@pytest.mark.skipif(cuda.why_not() is not None, reason=f"{cuda.why_not()}")
@pytest.mark.parametrize("kernel", SAMPLE_OF_CPP, ids=str)
def test_planted_faults_of_cuda_cpp(kernel: Kernel) -> None:
    check(kernel, KINDS_OF_CPP)


def check(kernel: Kernel, kinds: Iterable[str]) -> None:
    """The first or the last place of each kind of fault, by turns."""
    found = list(kernel.sites())
    by_kind = {kind: [site for site in found if site.kind == kind] for kind in kinds}
    chosen = [sites[-(number % 2)] for number, sites in enumerate(each for each in by_kind.values() if each)]
    hidden = [site for site in chosen if not seen(site)]
    assert not [str(site) for site in hidden if not redundant(site)]
    assert len(hidden) <= len(chosen) // 2
