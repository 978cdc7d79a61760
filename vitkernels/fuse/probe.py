"""Trying a fused module against its own class on random tokens, where only its structure says what it computes."""

from __future__ import annotations

import torch
from torch import nn

from vitkernels.fuse.swap import Fused, restore, swap


def difference(module: nn.Module, mixin: type[Fused]) -> str | None:
    """In what a module, run fused, differs from itself on random tokens in eval; None in nothing.

    Weights that are not there yet (on the meta device) cannot be tried: None. The module is left as it was.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return None
    width = _width(module)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, width, generator=generator).to(weight)
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = module(tokens)
            swap(module, mixin)
            try:
                got = module(tokens)
            finally:
                restore(module)
        tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    except Exception as error:
        return f"its structure is known, but not what it computes: {str(error).splitlines()[0]}"
    finally:
        for each, training in modes:
            each.training = training
    return None


def _width(module: nn.Module) -> int:
    """D, by the first norm or Linear."""
    for each in module.modules():
        if isinstance(each, nn.LayerNorm):
            return each.normalized_shape[-1]
        if isinstance(each, nn.Linear):
            return each.in_features
    return 1
