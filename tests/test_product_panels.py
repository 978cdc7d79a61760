"""Panels of a product's right side, written by what comes before it."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vitkernels import products


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx2"])
@pytest.mark.parametrize("rows", [255, 1577])
def test_activations_are_written_as_the_next_product_reads_them(force_isa, force_library, rows: int, isa: str) -> None:
    """Behind a library's gradient of the rows as well: the weight's gradient has the same bits, and no copy is made."""
    force_isa(isa)
    force_library("vitkernels")
    hidden, width = 520, 130
    x, dy, pre, w1, w2 = (
        torch.randn(*shape).bfloat16()
        for shape in ((rows, width), (rows, width), (rows, hidden), (hidden, width), (width, hidden))
    )
    found, large = [], rows * hidden * pre.itemsize  # more than a weight has
    for library in ("vitkernels", "torch"):
        choice = dict.fromkeys(products.KINDS, "vitkernels") | {f"bfloat16 {products.INPUTS}": library}
        torch.ops.vitkernels_ext.configure("products", products.encode(choice))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            found.append(torch.ops.vitkernels_ext.mlp_backward(dy, x, pre, w1, w2, "gelu", [True] * 5))
        events = profiled.profiler.kineto_results.events()
        made = sum(each.name() == "[memory]" and each.nbytes() >= large for each in events)
        assert made == 2, "the derivative, and the activations"
    assert torch.equal(found[0][3], found[1][3])
