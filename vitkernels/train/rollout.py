"""Attention rollout (Abnar and Zuidema 2020): which patches a model's answer comes from, through all of its blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkernels.fuse import unfuse
from vitkernels.nn import Attention
from vitkernels.train.model import Trained

_PREFIXES = range(10)  # class token, distillation token, registers


@torch.no_grad()
def rollout(model: Trained, image: Tensor) -> Tensor:
    """Shares of the patches in the answer.

    Args:
        model: as `load_model` gives it.
        image: [C, S, S] uint8.

    Returns:
        [H, W] float32 on the CPU, a number a patch, which sum to 1.

    Raises:
        ValueError: a model without attention over all of its tokens in every block, as one with windows.
    """
    model = copy.deepcopy(model)
    unfuse(model)
    found: list[Tensor] = []
    with _watched(model, found.append):
        model(image.to(next(model.parameters()).device)[None])
    tokens = found[0].shape[-1] if found else 0
    if not tokens or any(each.shape != (1, tokens, tokens) for each in found):
        raise ValueError(
            f"predict: argument 'rollout' is set with {model.spec.name!r}; needs a model with attention over all "
            "tokens in every block"
        )
    total = torch.eye(tokens, device=found[0].device)
    for weights in found:  # the residual stream counts as much as the branch
        total = (weights[0] + torch.eye(tokens, device=total.device)) / 2 @ total
    prefixes = next((count for count in _PREFIXES if math.isqrt(tokens - count) ** 2 == tokens - count), None)
    if prefixes is None:
        raise ValueError(f"predict: argument 'rollout' is set with {tokens} tokens; needs a square of patches")
    side = math.isqrt(tokens - prefixes)
    answer = total[0] if prefixes else total.mean(0)
    heat = answer[prefixes:].view(side, side).cpu()
    return heat / heat.sum()


@contextmanager
def _watched(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every attention's weights, [B, N, N], the mean of its heads."""
    own = [each for each in model.modules() if isinstance(each, Attention)]
    handles = [each.qkv.register_forward_hook(_of_packed(each, see)) for each in own]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch.nn's own attention calls what is watched
    try:
        with _Watch(see):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def _of_packed(attention: Attention, see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
        see(_weights(attention.q_norm(q), attention.k_norm(k)))

    return hook


class _Watch(TorchFunctionMode):
    """Sees every call of torch's attention."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k = (args[place] if len(args) > place else kwargs[name] for place, name in enumerate(("query", "key")))
            self.see(_weights(q, k, kwargs.get("scale")))
        return function(*args, **kwargs)


def _weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T), the mean of the heads, [B, N, N] in float32."""
    scores = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return scores.softmax(-1).mean(1)
