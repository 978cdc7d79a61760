"""open_clip: the blocks of its image and text towers (read from open_clip 3.3).

Its blocks hand nn.MultiheadAttention the same tokens three times; the rule in `torch_nn` serves that as one product.
Its LayerNorm answers in its input's dtype; what follows it multiplies in autocast's, and gets that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.multihead import NO_MASKS, Masks, why_not_call
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of
from vitkernels.residual import known, parts
from vitkernels.residual.genuine import why_not_weights
from vitkernels.residual.stream import Branch, Part, Sublayer
from vitkernels.residual.sublayers import (
    dropped,
    followed,
    join_heads,
    linear_step,
    mlp_branch,
    split_heads,
    why_not_linears,
)

_OWN = "open_clip.transformer"
known.LAYER_NORMS.update({f"{_OWN}.LayerNorm": lambda norm: None, f"{_OWN}.LayerNormFp32": lambda norm: None})
known.LAYER_SCALES[f"{_OWN}.LayerScale"] = "gamma"
known.ACTIVATIONS[f"{_OWN}.QuickGELU"] = lambda act: "quick_gelu"

# ------------------------------------------------------------------------------------------------------- attention


class FusedAttention(Fused):
    """open_clip.transformer.Attention: one raw projection, norms of q and k, a factor for each head, a norm inside."""

    reads = ("out_proj",)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.declines(x, lambda: self.why_not_now() or _why_not_mask(self, x, attn_mask), attn_mask):
            return super().forward(x, attn_mask)
        with self.backend():
            return self.branch(attn_mask=attn_mask).run(x, False)[0]

    def why_not_now(self) -> str | None:
        attn: Any = self
        if attn.logit_scale is not None:
            return "scaled cosine attention"
        return why_not_weights(self) or (
            None if parts.drops_nothing(attn.attn_drop) else "a dropout of attention's weights"
        )

    def branch(self, attn_mask: Tensor | None = None, **options: Any) -> Branch:
        attn: Any = self

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return finish(ops.linear(x, attn.in_proj_weight, attn.in_proj_bias), bias_apart)

        def finish(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            heads = parts.layer_norm(attn.ln_inner, self._heads(qkv, _taking_part(attn, attn_mask)))
            return parts.last_linear(attn.out_proj, heads, bias_apart)

        why_not = why_not_linears(out_proj=attn.out_proj)
        packed = (attn.in_proj_weight, attn.in_proj_bias)
        step = None if why_not else linear_step(lambda: packed, finish)
        return dropped(Branch(run, "linear, attention, linear", None, why_not, step=step), attn.out_drop)

    def _heads(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, 3 * D] to the heads' outputs side by side, [B, N, D]."""
        attn: Any = self
        if parts.is_identity(attn.ln_q) and parts.is_identity(attn.ln_k) and attn.head_scale is None:
            return ops.attention_qkv(qkv, attn.num_heads, attn_mask=mask)
        q, k, v = split_heads(qkv, attn.num_heads)
        q, k = parts.layer_norm(attn.ln_q, q).to(v.dtype), parts.layer_norm(attn.ln_k, k).to(v.dtype)
        out = ops.attention(q, k, v, attn_mask=mask)
        return join_heads(out if attn.head_scale is None else out * attn.head_scale)

    def parts(self) -> list[Part]:
        why_not = self.why_not_now()
        return [Part("", "", why_not) if why_not else self.branch().part("")]


def _why_not_mask(attn: Any, x: Tensor, mask: Tensor | None) -> str | None:
    """Why the call's mask is left to torch's own error, or None when it fits."""
    if x.dim() != 3:
        return f"called with shape {list(x.shape)}"
    batch, tokens, _ = x.shape
    fitting = ((tokens, tokens), (batch * attn.num_heads, tokens, tokens), (batch, attn.num_heads, tokens, tokens))
    return None if mask is None or mask.shape in fitting else f"called with a mask of shape {list(mask.shape)}"


def _taking_part(attn: Any, mask: Tensor | None) -> Tensor | None:
    """The mask as the ops take it: bool says what takes part there, and what is left out here."""
    if mask is None:
        return None
    if mask.dim() == 3:
        mask = mask.unflatten(0, (-1, attn.num_heads))
    return ~mask if mask.dtype == torch.bool else mask


# ----------------------------------------------------------------------------------------------------------- block


class _FusedBlock(PreNormBlock):
    """What the two blocks share: the feed-forward, and the adds, which run with the norms that follow them."""

    reads = ("ln_1",)

    def first_branch(self, **options: Any) -> Branch:
        """The attention's; a call's masks are keywords."""
        raise NotImplementedError

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        return [
            Sublayer("attn", block.ln_1, self.first_branch(**options), block.ls_1),
            Sublayer("mlp", block.ln_2, _feed_forward(block.mlp), block.ls_2),
        ]


def _feed_forward(mlp: Any) -> Branch:
    why_not = parts.why_not_part("mlp", mlp, nn.Sequential)
    if why_not is not None:
        return Branch(lambda x, bias_apart: (mlp(x), None), "", None, why_not)
    inner = getattr(mlp, "ln", None)
    if inner is None or parts.is_identity(inner):
        return mlp_branch(mlp.c_fc, mlp.gelu, mlp.c_proj, names=("c_fc", "c_proj"))

    def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        hidden = parts.layer_norm(inner, mlp.gelu(parts.linear(mlp.c_fc, x)))
        return parts.last_linear(mlp.c_proj, hidden, bias_apart)

    return Branch(run, "linear, linear", mlp.c_fc, "a norm between c_fc and c_proj")


class FusedResidualAttentionBlock(_FusedBlock):
    """open_clip.transformer.ResidualAttentionBlock: self-attention, or on the tokens of another tower."""

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        block: Any = self
        crosses = hasattr(self, "ln_1_kv") and (k_x is not None or v_x is not None)
        masks = Masks(None if attn_mask is None or not isinstance(q_x, Tensor) else attn_mask.to(q_x.dtype))

        def why_not() -> str | None:
            if crosses and k_x is not v_x:
                return "called with other keys than values"
            if not isinstance(block.attn, nn.MultiheadAttention):
                return None
            return why_not_call(block.attn, q_x, k_x if crosses and k_x is not None else q_x, masks)

        if self.declines(q_x, why_not):
            return super().forward(q_x, k_x, v_x, attn_mask)
        with self.backend():
            memory = parts.layer_norm(block.ln_1_kv, k_x) if crosses and k_x is not None else None
            return self.run(q_x, masks=masks, memory=memory)

    def first_branch(  # type: ignore[override]
        self, masks: Masks = NO_MASKS, memory: Tensor | None = None
    ) -> Branch:
        block: Any = self

        def call(x: Tensor) -> Tensor:
            return block.attention(q_x=x, k_x=memory, v_x=memory, attn_mask=masks.attn_mask)

        return branch_of("attn", block.attn, call, masks=masks, memory=memory)


class FusedCustomBlock(_FusedBlock):
    """open_clip.transformer.CustomResidualAttentionBlock: open_clip's own attention, and a norm behind it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        block: Any = self
        fused = isinstance(block.attn, FusedAttention)
        if self.declines(x, lambda: _why_not_mask(block.attn, x, attn_mask) if fused else None, attn_mask):
            return super().forward(x, attn_mask)
        return self.run(x, attn_mask=attn_mask)

    def first_branch(self, **options: Any) -> Branch:
        block: Any = self
        branch = branch_of("attn", block.attn, **options)
        if parts.is_identity(block.ln_attn):
            return branch
        return followed(branch, lambda out: parts.layer_norm(block.ln_attn, out))


def _why_not_feed_forward(mlp: Any) -> str | None:
    names = list(mlp._modules)
    known = (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"])
    return None if names in known else f"its mlp is made of {', '.join(names)}"


_STEPS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")
RULES = (
    Rule(
        FusedResidualAttentionBlock,
        frozenset({"open_clip.transformer.ResidualAttentionBlock"}),
        lambda block: (
            differs(block, ("q_x", "k_x", "v_x", "attn_mask"), _STEPS, ("ln_1_kv",)) or _why_not_feed_forward(block.mlp)
        ),
    ),
    Rule(
        FusedCustomBlock,
        frozenset({"open_clip.transformer.CustomResidualAttentionBlock"}),
        lambda block: differs(block, ("x", "attn_mask"), (*_STEPS, "ln_attn")) or _why_not_feed_forward(block.mlp),
    ),
    Rule(
        FusedAttention,
        frozenset({"open_clip.transformer.Attention"}),
        lambda attn: differs(
            attn,
            ("x", "attn_mask"),
            ("ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop"),
            (),
            ("in_proj_weight", "in_proj_bias", "logit_scale", "head_scale"),
        ),
    ),
)
