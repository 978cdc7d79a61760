"""torch.nn: the layers of nn.Transformer, pre-norm and post-norm, and nn.MultiheadAttention (read from torch 2.13).

nn.TransformerEncoder and its relatives stay as they are: their layers are joined, and the norm behind them. Where the
encoder makes a nested tensor of a padded batch (in inference), its layers run torch's own code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.multihead import (
    NO_MASKS,
    FusedMultiheadAttention,
    Masks,
    Names,
    attention_branch,
    why_not_call,
)
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import PreNormBlock
from vitkernels.residual import parts
from vitkernels.residual.stream import Sublayer, post_norm
from vitkernels.residual.sublayers import dropped, mlp_branch

_SRC = Names("TransformerEncoderLayer", "src", "src", "src", "src_mask", "src_key_padding_mask")
_TGT = Names("TransformerDecoderLayer", "tgt", "tgt", "tgt", "tgt_mask", "tgt_key_padding_mask", "tgt_is_causal")
_MEMORY = Names(
    "TransformerDecoderLayer",
    "tgt",
    "memory",
    "memory",
    "memory_mask",
    "memory_key_padding_mask",
    "memory_is_causal",
)


class FusedLayer(PreNormBlock):
    """What the layers of encoder and decoder share; their norms stand in front or behind."""

    reads = ("norm1",)
    axes = None

    def run(self, x: Tensor, **options: Any) -> Tensor:
        """The layer on its tokens: [B, N, D], or [N, B, D] without batch_first, to the same."""
        if self.norm_first:
            return super().run(x, **options)
        with self.backend():
            return post_norm(x, self.sublayers(**options), self._vitkernels.residual_dtype)

    def why_not_joined(self) -> str | None:
        layer: Any = self
        if not layer.norm_first:
            return "its norms stand behind"
        return super().why_not_joined() or (None if layer.self_attn.batch_first else "its tokens are [N, B, D]")

    def self_attention(self, masks: Masks) -> Sublayer:
        layer: Any = self
        branch = attention_branch("self_attn", layer.self_attn, masks)
        return Sublayer("self_attn", layer.norm1, dropped(branch, layer.dropout1))

    def feed_forward(self, norm: nn.Module, dropout: nn.Module) -> Sublayer:
        layer: Any = self
        branch = mlp_branch(layer.linear1, layer.activation, layer.linear2, layer.dropout, ("linear1", "linear2"))
        return Sublayer("feed_forward", norm, dropped(branch, dropout))


class FusedEncoderLayer(FusedLayer):
    """torch.nn.TransformerEncoderLayer, its adds run with the norms that follow them."""

    follows = ("_sa_block", "_ff_block")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = Masks(src_mask, src_key_padding_mask, is_causal)
        if self.declines(src, lambda: why_not_call(self.self_attn, src, src, masks, names=_SRC) or self.why_not_now()):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return self.run(src, masks=masks)

    def why_not_now(self) -> str | None:
        layer: Any = self
        drops = not all(map(parts.drops_nothing, (layer.dropout, layer.dropout1, layer.dropout2)))
        # without gradients, torch's one kernel for a layer in eval leaves them out
        if drops and not layer.training:
            return "a dropout in training, in a layer in eval"
        # torch's own layer looks at the attention's weights on its way, and what makes them is made once more
        reason = parts.why_not_part("self_attn", layer.self_attn)
        return reason if reason is not None and "parametrization" in reason else None

    def sublayers(self, masks: Masks = NO_MASKS) -> list[Sublayer]:  # type: ignore[override]
        layer: Any = self
        return [self.self_attention(masks), self.feed_forward(layer.norm2, layer.dropout2)]


class FusedDecoderLayer(FusedLayer):
    """torch.nn.TransformerDecoderLayer: attention to its own tokens, to the encoder's memory, and feed-forward."""

    follows = ("_sa_block", "_mha_block", "_ff_block")

    def why_not_joined(self) -> str | None:
        return "it reads an encoder's memory"

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        layer: Any = self
        own = Masks(tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = Masks(memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.declines(
            tgt,
            lambda: (
                why_not_call(layer.self_attn, tgt, tgt, own, names=_TGT)
                or why_not_call(layer.multihead_attn, tgt, memory, cross, names=_MEMORY)
            ),
        ):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        return self.run(tgt, own=own, memory=memory, cross=cross)

    def sublayers(  # type: ignore[override]
        self, own: Masks = NO_MASKS, memory: Tensor | None = None, cross: Masks = NO_MASKS
    ) -> list[Sublayer]:
        layer: Any = self
        attention = attention_branch("multihead_attn", layer.multihead_attn, cross, memory)
        return [
            self.self_attention(own),
            Sublayer("multihead_attn", layer.norm2, dropped(attention, layer.dropout2)),
            self.feed_forward(layer.norm3, layer.dropout3),
        ]


_LAYER = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")

ENCODER_LAYER = Rule(
    FusedEncoderLayer,
    frozenset({"torch.nn.modules.transformer.TransformerEncoderLayer"}),
    lambda layer: differs(layer, ("src", "src_mask", "src_key_padding_mask", "is_causal"), _LAYER, ("activation",)),
)
DECODER_LAYER = Rule(
    FusedDecoderLayer,
    frozenset({"torch.nn.modules.transformer.TransformerDecoderLayer"}),
    lambda layer: differs(
        layer,
        (
            "tgt",
            "memory",
            "tgt_mask",
            "memory_mask",
            "tgt_key_padding_mask",
            "memory_key_padding_mask",
            "tgt_is_causal",
            "memory_is_causal",
        ),
        (*_LAYER, "multihead_attn", "norm3", "dropout3"),
        ("activation",),
    ),
)
ATTENTION = Rule(
    FusedMultiheadAttention,
    frozenset({"torch.nn.modules.activation.MultiheadAttention"}),
    lambda attn: differs(
        attn,
        (
            "query",
            "key",
            "value",
            "key_padding_mask",
            "need_weights",
            "attn_mask",
            "average_attn_weights",
            "is_causal",
        ),
        ("out_proj",),
        parameters=(
            "in_proj_weight",
            "in_proj_bias",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "bias_k",
            "bias_v",
        ),
    ),
)
RULES = (ENCODER_LAYER, DECODER_LAYER, ATTENTION)
