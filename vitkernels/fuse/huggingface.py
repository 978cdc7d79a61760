"""Attention for every model of Hugging Face transformers: a name to choose it by, where no rule serves the layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops

NAME = "vitkernels"
# What some models hand over beside the mask. "sdpa" knows the first and does without the second, in silence.
_SERVED_BY_SDPA = ("position_bias", "cache", "softcap")
_SERVED_BY_NONE = ("s_aux", "sinks", "indices", "block_indices")


def register_attention() -> None:
    """Add `ops.attention` to transformers under the name "vitkernels", for the models that choose it.

    After it, `from_pretrained(..., attn_implementation="vitkernels")` and `model.set_attn_implementation("vitkernels")`
    work for every model that takes its attention from the library's registry. Nothing else changes. The masks are those
    of "sdpa", and so are the results; a call that no kernel here serves (dropout in training, say) runs "sdpa" itself
    and warns once with the reason.

    Raises:
        ImportError: transformers 5 or newer is not installed.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without one of its own, a function is given no mask at all


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention module that calls.
        query: [B, H, Nq, K].
        key, value: [B, G, Nk, K]; each of the G heads serves H / G of query's, `module.num_key_value_groups`.
        attention_mask: broadcastable to [B, H, Nq, Nk]: bool (True takes part) or added to the scores.
        dropout: rate at which weights are dropped.
        scaling: factor on the scores, 1 / sqrt(K) by default.
        is_causal: without a mask, query i sees keys 0 to i; the module's own attribute by default.
        kwargs: what else the model hands to attention functions.

    Returns:
        ([B, Nq, H, K], None): the output, and no weights.

    Raises:
        ValueError: a keyword that asks for another kind of attention (sinks, chosen keys).
    """
    for name in _SERVED_BY_NONE:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r}: {type(module).__name__} calls with {name!r}, which it does not know; "
                "needs another attn_implementation"
            )
    reason = _why_not(query, key, value, attention_mask, dropout, kwargs)
    if reason is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if not torch.compiler.is_compiling():
            warnings.warn(f"vitkernels: attention of {type(module).__name__} runs torch's: {reason}", stacklevel=2)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and bool(causal)
    out = ops.attention(query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, options: dict[str, Any]
) -> str | None:
    """Why `ops.attention` cannot serve the call, or None when it can."""
    if dropout > 0:
        return "a dropout of attention's weights"
    for name in _SERVED_BY_SDPA:
        if options.get(name) is not None:
            return f"called with {name}"
    if mask is not None and not isinstance(mask, Tensor):
        return f"called with a {type(mask).__name__} for a mask"
    if value.shape != key.shape or query.shape[0] != key.shape[0]:
        return f"called with query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        return "called with mixed dtypes"
    return None
