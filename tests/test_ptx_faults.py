"""The machine sees faults that are planted in compiled kernels; what it does not see is shown to be redundant.

A sample; `make emulate` plants them all.
"""

from __future__ import annotations

import itertools

import pytest

from vitkernels import kernels

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from ptx.faults import KINDS, redundant, seen
from ptx.plant import KERNELS, Kernel

SAMPLE = [
    each for each in KERNELS if each.op in ("mlp", "attention_qkv", "add_layer_norm") and each.capability == (9, 0)
]


@pytest.mark.parametrize("kernel", SAMPLE, ids=str)
def test_planted_faults(kernel: Kernel) -> None:
    """The first and the last place of each kind of fault."""
    found = list(kernel.sites())
    by_kind = {kind: [site for site in found if site.kind == kind] for kind in KINDS}
    chosen = list(itertools.chain.from_iterable([sites[0], sites[-1]] for sites in by_kind.values() if sites))
    hidden = [site for site in chosen if not seen(site)]
    assert not [str(site) for site in hidden if not redundant(site)]
    assert len(hidden) <= len(chosen) // 2
