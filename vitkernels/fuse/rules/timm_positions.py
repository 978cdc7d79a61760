"""timm: blocks with rotary positions (EVA, DINOv3, PE) and with a learned bias on the scores (BEiT, relpos).

Read from timm 1.0.31: `models/eva.py`, `models/beit.py`, `models/vision_transformer_relpos.py`, `layers/attention.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention, FusedBlock, why_not_two_masks
from vitkernels.fuse.swap import branch_of
from vitkernels.ops._steps import Called, HeadNorms, Positions
from vitkernels.residual import parts
from vitkernels.residual.stream import Sublayer
from vitkernels.residual.sublayers import (
    ATTENTION,
    ROTARY,
    join_heads,
    joined,
    projected,
    read_head_norms,
    rotary,
    split_heads,
    why_not_linears,
)

_MASKS = ("attn_mask", "shared_rel_pos_bias", "shared_rel_pos")


def _why_not_two_masks(attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> str | None:
    return why_not_two_masks(attn_mask, is_causal)


def _mask(options: Mapping[str, Any]) -> Any:
    """What a call brings for the scores: a mask, or a bias of positions, which is one to torch's attention."""
    return next((options[name] for name in _MASKS if options.get(name) is not None), None)


def _attended(attn: FusedAttention, x: Tensor, **options: Any) -> Tensor:
    """What an attention's forward does with the arguments that are its own."""
    if attn.declines(x, lambda: attn.why_not_now() or _why_not_two_masks(**options), _mask(options)):
        return super(FusedAttention, attn).forward(x, **options)
    return attn.run(x, **options)


def _stepped(block: FusedBlock, x: Tensor, **options: Any) -> Tensor:
    """The same of a block's."""
    if block.declines(x, lambda: _why_not_two_masks(**options), _mask(options)):
        return super(FusedBlock, block).forward(x, **options)
    return block.run(x, **options)


class FusedRopeAttention(FusedAttention):
    """timm's AttentionRope and EvaAttention: one projection or three, norms, rotary positions, then the heads."""

    steps = ROTARY

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _attended(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)

    def why_not_now(self) -> str | None:
        attn: Any = self
        if getattr(attn, "q_bias", None) is not None:  # timm reads qkv's weight, past anything hung on the module
            return super().why_not_now() or why_not_linears(qkv=attn.qkv)
        return super().why_not_now()

    def _projections(self) -> dict[str, Any]:
        """The Linears of q, k and v where there are three."""
        attn: Any = self
        return {"q_proj": attn.q_proj, "k_proj": attn.k_proj, "v_proj": attn.v_proj}

    def project(self, x: Tensor) -> Tensor:
        attn: Any = self
        if getattr(attn, "q_bias", None) is not None:
            return ops.linear(x, *self.packed())
        return projected(x, *self._projections().values()) if attn.qkv is None else parts.linear(attn.qkv, x)

    def packed(self) -> tuple[Tensor, Tensor | None]:
        attn: Any = self
        if attn.qkv is None:
            return joined(*self._projections().values())
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv.weight, attn.qkv.bias
        return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])

    def head_norms(self) -> HeadNorms | None:
        attn: Any = self
        if getattr(attn, "num_kv_groups", 1) > 1:
            return None
        return read_head_norms(attn.q_norm, attn.k_norm, attn.proj, self.by_halves())

    def by_halves(self) -> bool:
        """Whether an element's pair is half a head away."""
        return getattr(self, "rotate_half", False)

    def positions(self, rope: Tensor | None = None, **options: Any) -> Positions:
        attn: Any = self
        if rope is None:
            return Positions()
        sin, cos = rope.chunk(2, -1)
        return Positions(sin, cos, attn.num_prefix_tokens)

    def is_one_step(self, rope: Tensor | None = None, **options: Any) -> bool:
        """Positions that learn are plain torch's."""
        return super().is_one_step() and (rope is None or not rope.requires_grad)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, H, N, K]; of k and v there are fewer where several heads of q share one of them
        (grouped-query attention, Ainslie et al. 2023)."""
        attn: Any = self
        if getattr(attn, "num_kv_groups", 1) == 1:
            return split_heads(qkv, attn.num_heads)
        widths = [each.out_features for each in self._projections().values()]
        q, k, v = (each.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for each in qkv.split(widths, dim=-1))
        return q, k, v

    def attend(self, qkv: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        if self.is_one_step(**options):
            return super().attend(qkv, **options)
        called = self.called(**options)
        q, k, v = self.heads(qkv)
        q, k = parts.layer_norm(attn.q_norm, q), parts.layer_norm(attn.k_norm, k)
        sin, cos, prefix = called.positions.of(q.shape[2])
        if sin is not None and cos is not None:
            q, k = (rotary(each, sin, cos, prefix=prefix, half=self.by_halves()) for each in (q, k))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return join_heads(ops.attention(q, k, v, attn_mask=called.attn_mask, is_causal=called.is_causal))


class FusedBeitAttention(FusedRopeAttention):
    """timm.models.beit.Attention: a learned bias of relative positions on the scores, with its gradient."""

    steps = ATTENTION
    makes_mask = True

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _attended(self, x, shared_rel_pos_bias=shared_rel_pos_bias)

    def is_plain(self) -> bool:
        return True

    def head_norms(self) -> HeadNorms:
        return HeadNorms()

    def called(self, shared_rel_pos_bias: Tensor | None = None) -> Called:  # type: ignore[override]
        attn: Any = self
        bias = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return Called(bias)


class FusedRelPosAttention(FusedAttention):
    """timm's RelPosAttention: the bias comes from a module of its own, or from the model."""

    makes_mask = True

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _attended(self, x, shared_rel_pos=shared_rel_pos)

    def called(self, shared_rel_pos: Tensor | None = None) -> Called:  # type: ignore[override]
        attn: Any = self
        return Called(shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias())


class FusedRelPosBlock(FusedBlock):
    """timm's RelPosBlock."""

    passes: ClassVar[dict[str, Any]] = {"shared_rel_pos": None}

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _stepped(self, x, shared_rel_pos=shared_rel_pos)


class FusedEvaBlock(FusedBlock):
    """timm.models.eva.EvaBlock: as `Block`, with LayerScale as parameters of its own, and rotary positions."""

    passes: ClassVar[dict[str, Any]] = {"rope": None, "attn_mask": None, "is_causal": False}

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _stepped(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_of("attn", block.attn, **(self.passes | options))
        return [
            Sublayer("attn", block.norm1, attention, block.gamma_1, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), block.gamma_2, block.drop_path2),
        ]


class FusedRopeBlock(FusedEvaBlock):
    """DeepseekVitBlock: without factors of its own."""

    passes: ClassVar[dict[str, Any]] = {"rope": None}

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _stepped(self, x, rope=rope)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_of("attn", block.attn, **(self.passes | options))
        return [
            Sublayer("attn", block.norm1, attention, None, block.drop_path1),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), None, block.drop_path2),
        ]


class FusedBeitBlock(FusedEvaBlock):
    """timm.models.beit.Block."""

    passes: ClassVar[dict[str, Any]] = {"shared_rel_pos_bias": None}

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return _stepped(self, x, shared_rel_pos_bias=shared_rel_pos_bias)


_ROPE = ("x", "rope", "attn_mask", "is_causal")
_ATTENTION = ("q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
_BLOCK = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
_GAMMAS = ("gamma_1", "gamma_2")
_RELPOS = "timm.models.vision_transformer_relpos"
_BEIT = ("q_bias", "v_bias", "relative_position_bias_table")
RULES = (
    Rule(
        FusedRopeAttention,
        frozenset({"timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention"}),
        lambda attn: differs(attn, _ROPE, _ATTENTION, _PROJECTIONS, ("q_bias", "v_bias")),
    ),
    Rule(
        FusedBeitAttention,
        frozenset({"timm.models.beit.Attention"}),
        lambda attn: differs(attn, ("x", "shared_rel_pos_bias"), ("qkv", "attn_drop", "proj", "proj_drop"), (), _BEIT),
    ),
    Rule(
        FusedEvaBlock,
        frozenset({"timm.models.eva.EvaBlock"}),
        lambda block: differs(block, _ROPE, _BLOCK, (), _GAMMAS),
    ),
    Rule(
        FusedRopeBlock,
        frozenset({"timm.models.deepseek_vit.DeepseekVitBlock"}),
        lambda block: differs(block, ("x", "rope"), _BLOCK),
    ),
    Rule(
        FusedBeitBlock,
        frozenset({"timm.models.beit.Block"}),
        lambda block: differs(block, ("x", "shared_rel_pos_bias"), _BLOCK, (), _GAMMAS),
    ),
    Rule(
        FusedRelPosAttention,
        frozenset({f"{_RELPOS}.RelPosAttention"}),
        lambda attn: differs(
            attn, ("x", "shared_rel_pos"), ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"), ("rel_pos",)
        ),
    ),
    Rule(
        FusedRelPosBlock,
        frozenset({f"{_RELPOS}.RelPosBlock"}),
        lambda block: differs(block, ("x", "shared_rel_pos"), (*_BLOCK, "ls1", "ls2")),
    ),
)
