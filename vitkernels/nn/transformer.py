"""torch.nn's Transformer layers and attention, served by the kernels from the start.

Each is a subclass of torch's own with its constructor, parameters, keys and numbers, and computes by the same text that
`vk.fuse` gives to torch's: an instance's class is what the rule makes of it. They are layers for torch's
TransformerEncoder and TransformerDecoder too.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Twin(nn.Module):
    """What they share. `vk.unfuse` leaves them served; a call that does not fit raises the package's own sentence."""

    def serve(self) -> None:
        """Take the rule's class. A subclass that computes something else stays as it is; `vk.explain` says why."""
        from vitkernels.fuse.walk import swap_known  # its rules know vk.nn

        swap_known(self)


class MultiheadAttention(Twin, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on `ops.attention_qkv`, or on `ops.attention` where keys and queries differ.

    Its arguments are torch's; the kernels serve calls with `need_weights=False` that have a batch.

    Args:
        query: [B, N, embed_dim], or [N, B, embed_dim] without `batch_first`.
        key, value: [B, M, kdim] and [B, M, vdim], or with the first two axes exchanged.
        key_padding_mask: [B, M], bool (True is left out) or floating point, added to the scores.
        attn_mask: [N, M] or [B * num_heads, N, M]; as key_padding_mask.
        need_weights, average_attn_weights: the maps come from torch's own code, [B, N, M] or [B, num_heads, N, M].
        is_causal: says that attn_mask is the causal one.

    Returns:
        The query's shape, and the maps or None. A query whose keys are all left out gets zeros.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes that do not fit each other or the module, or is_causal without a mask.
    """

    @functools.wraps(nn.MultiheadAttention.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.serve()


class TransformerEncoderLayer(Twin, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: self-attention and feed-forward, each add run with the norm that follows it.

    Its arguments are torch's. `forward` takes src [B, N, d_model], or [N, B, d_model] without `batch_first`, and masks
    as `MultiheadAttention` does, and returns src's shape.

    Raises:
        TypeError, ValueError: as in `MultiheadAttention`.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.self_attn.__class__ = MultiheadAttention  # torch's constructor made it, and drew its weights
        self.serve()


class TransformerDecoderLayer(Twin, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: self-attention, attention to an encoder's memory, and feed-forward.

    Its arguments are torch's. `forward` takes tgt [B, M, d_model] and memory [B, N, d_model], or both with the first
    two axes exchanged without `batch_first`, masks of either attention as `MultiheadAttention` does, and returns tgt's
    shape.

    Raises:
        TypeError, ValueError: as in `MultiheadAttention`.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for attention in (self.self_attn, self.multihead_attn):
            attention.__class__ = MultiheadAttention
        self.serve()
