"""Hugging Face transformers: BridgeTower's layers, made of torch.nn's attention (read from transformers 5.23)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.multihead import Masks, attention_branch, why_not_call
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.transformers_parts import owners
from vitkernels.fuse.swap import PreNormBlock
from vitkernels.residual.stream import Sublayer
from vitkernels.residual.sublayers import mlp_branch

_MLP = ("c_fc", "gelu", "c_proj")


class FusedBridgeLayer(PreNormBlock):
    """BridgeTowerResidualAttention: tokens as [N, B, D]."""

    follows = ("attention",)
    reads = ("ln_1",)

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        layer: Any = self
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        masks = Masks(layer.attn_mask, mask)

        def why_not() -> str | None:
            return why_not_call(layer.attn, hidden_state, hidden_state, masks)

        if self.declines(hidden_state, why_not):
            return super().forward(hidden_state, attention_mask)
        return self.run(hidden_state, masks=masks)

    def why_not_joined(self) -> str | None:
        return "its tokens are [N, B, D]"

    def sublayers(self, masks: Masks | None = None) -> list[Sublayer]:  # type: ignore[override]
        layer: Any = self
        attention = attention_branch("attn", layer.attn, masks or Masks(layer.attn_mask))
        first, act, last = (layer.mlp[name] for name in _MLP)
        names = ("mlp.c_fc", "mlp.c_proj")
        return [
            Sublayer("attn", layer.ln_1, attention),
            Sublayer("mlp", layer.ln_2, mlp_branch(first, act, last, names=names)),
        ]


def _contract(layer: nn.Module) -> str | None:
    mlp: Any = layer._modules.get("mlp")
    made = tuple(mlp) if isinstance(mlp, nn.ModuleDict) else ()
    reason = differs(layer, ("hidden_state", "attention_mask"), ("attn", "ln_1", "mlp", "ln_2"))
    return reason or (None if made == _MLP else f"its mlp is made of {', '.join(made)}")


RULES = (Rule(FusedBridgeLayer, owners("bridgetower.BridgeTowerResidualAttention"), _contract),)
