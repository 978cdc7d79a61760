"""Trying a fused module against its own class on random numbers, where only its structure says what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.swap import Fused, restore, swap
from vitkernels.residual import known

Keywords = Callable[[nn.Module, Tensor], dict[str, Any]]


def difference(module: nn.Module, mixin: type[Fused], keywords: Keywords = lambda module, tokens: {}) -> str | None:
    """In what a module, run fused, differs from itself in eval; None in nothing.

    A float32 copy runs both ways, without hooks. Its weights are random too: with those that a module starts with, a
    LayerScale of 1e-5 would hide whatever the branch computes, and on the meta device there are none.

    Args:
        module: to try; it is left alone.
        mixin: to swap in.
        keywords: (module, tokens) -> what its `forward` is given beside the tokens [2, 5, D].
    """
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        twin = _random_copy(module, generator)
        known.try_out(twin)
        device = next((each.device for each in twin.parameters()), torch.device("cpu"))
        tokens = _normal((2, 5, _width(twin)), generator).to(device)
        arguments = keywords(twin, tokens)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            expected = twin(tokens, **arguments)
            got = swap(twin, mixin)(tokens, **arguments)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    except Exception as error:
        return f"its structure is known, but not what it computes: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def _random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = copy.deepcopy(module)
    if any(each.is_meta for each in twin.parameters()):
        twin = twin.to_empty(device="cpu")
    twin = twin.float().eval()
    for each in twin.modules():
        restore(each)
        for hooks in (each._forward_hooks, each._forward_pre_hooks):
            hooks.clear()
        each.__dict__.pop("forward", None)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(_random(tensor.shape, generator))
    return twin


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights that keep numbers at about 1; vectors, which may be factors, are positive."""
    if len(shape) < 2:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    return _normal(shape, generator) / shape[1:].numel() ** 0.5


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _width(module: nn.Module) -> int:
    """D, by the first norm or Linear."""
    for each in module.modules():
        if isinstance(each, nn.LayerNorm):
            return each.normalized_shape[-1]
        if isinstance(each, nn.Linear):
            return each.in_features
    return 1
