"""timm: TNT (Han et al. 2021): a stream of patches, and within each patch one of its pixels, which is added to it.

Read from timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedAttention
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch, Sublayer, pre_norm
from vitkernels.residual.sublayers import joined, projected, why_not_linears


class FusedPixelAttention(FusedAttention):
    """TNT's Attention: one projection for q and k, and one for v."""

    reads = ("qk",)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x, self.why_not_now):
            return super(FusedAttention, self).forward(x)
        return self.run(x)

    def why_not_now(self) -> str | None:
        attn: Any = self
        equal = attn.hidden_dim == attn.proj.in_features
        return super().why_not_now() if equal else "its values are of another width than its keys"

    def project(self, x: Tensor) -> Tensor:
        return projected(x, self.qk, self.v)  # type: ignore[arg-type]

    def packed(self) -> tuple[Tensor, Tensor | None]:
        return joined(self.qk, self.v)

    def is_plain(self) -> bool:
        return True

    def branch(self, **options: Any) -> Branch:
        attn: Any = self
        why_not = why_not_linears(qk=attn.qk, v=attn.v, proj=attn.proj)
        return Branch(
            lambda x, bias_apart: self.output(x, self.attend(self.project(x)), bias_apart),
            self.steps,
            None if why_not else attn.qk,
            why_not,
            step=None if why_not else self.step(),
        )


class FusedTntBlock(PreNormBlock):
    """TNT's Block: pixels as [B * (N - 1), P, C], patches as [B, N, D]."""

    def forward(self, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        if self.declines(pixel_embed) or self.declines(patch_embed):
            return super().forward(pixel_embed, patch_embed)
        state = self._vitkernels
        with self.backend():
            steps = self.sublayers()
            x = pre_norm(pixel_embed, steps[:2], state.residual_dtype, again=state.recompute_norms)
            first, patches = patch_embed[:, :1], patch_embed[:, 1:]
            patches = torch.cat([first, patches + self.told(x, patches.shape[:2])], dim=1)
            patches = pre_norm(patches, steps[2:], state.residual_dtype, again=state.recompute_norms)
        return x, patches

    def told(self, pixels: Tensor, shape: torch.Size) -> Tensor:
        """What a patch's pixels add to it, [B, N - 1, D]."""
        block: Any = self
        if block.norm2_proj is None:
            normed = parts.layer_norm(block.norm1_proj, pixels, parts.operand_dtype(block.proj, pixels))
            return parts.linear(block.proj, normed.reshape(*shape, -1))
        pixels = pixels.reshape(*shape, -1)
        normed = parts.layer_norm(block.norm1_proj, pixels, parts.operand_dtype(block.proj, pixels))
        out = parts.linear(block.proj, normed)
        return parts.layer_norm(block.norm2_proj, out, parts.operand_dtype(None, out))

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        named = (
            ("attn_in", block.norm_in, attention_of("attn_in", block.attn_in)),
            ("mlp_in", block.norm_mlp_in, branch_of("mlp_in", block.mlp_in)),
            ("attn_out", block.norm_out, attention_of("attn_out", block.attn_out)),
            ("mlp", block.norm_mlp, branch_of("mlp", block.mlp)),
        )
        return [Sublayer(name, norm, branch, None, block.drop_path) for name, norm, branch in named]

    def why_not_joined(self) -> str | None:
        return "it has two streams"


_BLOCK = ("norm_in", "attn_in", "norm_mlp_in", "mlp_in", "norm1_proj", "proj")
_OUTER = ("norm_out", "attn_out", "drop_path", "norm_mlp", "mlp")


def _why_not_block(block: nn.Module) -> str | None:
    return differs(block, ("pixel_embed", "patch_embed"), (*_BLOCK, *_OUTER), ("norm2_proj",))


RULES = (
    Rule(
        FusedPixelAttention,
        frozenset({"timm.models.tnt.Attention"}),
        lambda attn: differs(attn, ("x",), ("qk", "v", "attn_drop", "proj", "proj_drop")),
    ),
    Rule(FusedTntBlock, frozenset({"timm.models.tnt.Block"}), _why_not_block),
)
