"""timm: blocks whose attention and feed-forward stand side by side: one norm and one projection for both (Dehghani et
al. 2023), or several of each kind (Touvron et al. 2022). Read from timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_of
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import why_not_two_masks
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch, Sublayer, normed_branch
from vitkernels.residual.sublayers import join_heads, linear_step, split_heads, why_not_linears


class FusedScalingBlock(PreNormBlock):
    """ParallelScalingBlock: q, k, v and the hidden features of the feed-forward come out of one product."""

    reads = ("in_norm",)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: self._why_not_drops() or why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run(x, attn_mask=attn_mask, is_causal=is_causal)

    def _why_not_drops(self) -> str | None:
        rate = getattr(self.attn_drop, "p", 0.0) if self.training else 0.0  # read past the module's own mode
        dropped = rate or not parts.drops_nothing(self.attn_drop)  # type: ignore[arg-type]
        return "a dropout of attention's weights" if dropped else None

    def why_not_joined(self) -> str | None:
        return super().why_not_joined() or self._why_not_drops()

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        outputs = {
            name: linear
            for name in ("out_proj", "attn_out_proj", "mlp_out_proj")
            if (linear := getattr(block, name)) is not None
        }
        why_not = why_not_linears(in_proj=block.in_proj, **outputs)

        def packed() -> tuple[Tensor, Tensor | None]:
            bias = block.in_proj.bias
            if block.mlp_bias is not None:
                bias = torch.cat([block.mlp_bias, block.mlp_bias.new_zeros(sum(block.in_split[1:]))])
            return block.in_proj.weight, bias

        def project(x: Tensor) -> Tensor:
            if why_not is None:
                return ops.linear(x, *packed())
            both = block.in_proj(x)
            return both if block.mlp_bias is None else both + packed()[1]

        def finish(both: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            hidden, qkv = both.split([block.in_split[0], sum(block.in_split[1:])], dim=-1)
            heads, hidden = self.attend(qkv, **options), block.mlp_drop(block.mlp_act(hidden))
            if block.out_proj is not None:
                return parts.last_linear(block.out_proj, torch.cat((heads, hidden), dim=-1), bias_apart)
            return parts.linear(block.attn_out_proj, heads) + parts.linear(block.mlp_out_proj, hidden), None

        branch = Branch(
            lambda x, bias_apart: finish(project(x), bias_apart),
            "linear, attention, activation of torch, linear",
            block.in_proj,
            self._why_not_drops() or why_not,
            step=linear_step(packed, finish) if why_not is None else None,
        )
        return [Sublayer("attn and mlp", block.in_norm, branch, block.ls, block.drop_path)]

    def attend(self, qkv: Tensor, **options: Any) -> Tensor:
        """q, k and v side by side to the heads' outputs side by side."""
        block: Any = self
        if parts.is_identity(block.q_norm) and parts.is_identity(block.k_norm):
            return ops.attention_qkv(qkv, block.num_heads, **options)
        q, k, v = split_heads(qkv, block.num_heads)
        q, k = _normed_heads(block.q_norm, q).to(v.dtype), _normed_heads(block.k_norm, k).to(v.dtype)
        return join_heads(ops.attention(q, k, v, **options))


def _normed_heads(norm: nn.Module, heads: Tensor) -> Tensor:
    """[B, H, N, K]; a norm that is called gets them as [B, N, H, K]."""
    if parts.why_not_layer_norm("", norm) is None:
        return parts.layer_norm(norm, heads)
    return norm(heads.transpose(1, 2)).transpose(1, 2)


class FusedThingsBlock(PreNormBlock):
    """ParallelThingsBlock: the sum of several attentions, then that of several feed-forwards, each with a norm."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.declines(x, lambda: self._why_not_read() or why_not_two_masks(attn_mask, is_causal), attn_mask):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run(x, attn_mask=attn_mask, is_causal=is_causal)

    def _why_not_read(self) -> str | None:
        block: Any = self
        named = [(f"{name}.{i}", each) for name in ("attns", "ffns") for i, each in enumerate(getattr(block, name))]
        reasons = (parts.why_not_part(name, each, nn.Sequential) for name, each in named)
        return next((reason for reason in reasons if reason is not None), None)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        with self.backend():
            sublayers = self.sublayers(**options)
            for several, steps in (
                (block.attns, sublayers[: len(block.attns)]),
                (block.ffns, sublayers[len(block.attns) :]),
            ):
                scaled = [  # one after the other, as their dropouts and DropPaths draw
                    each.drop_path(each.ls(normed_branch(x, step.norm, step.branch)))
                    for each, step in zip(several, steps, strict=True)
                ]
                x = x + torch.stack(scaled).sum(0)
        return x

    def why_not_joined(self) -> str | None:
        return "its attentions are side by side"

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        passes = {"attn_mask": None, "is_causal": False} | options
        return [
            *(
                Sublayer(
                    f"attns.{i}",
                    each.norm,
                    attention_of(f"attns.{i}.attn", each.attn, **passes),
                    each.ls,
                    each.drop_path,
                )
                for i, each in enumerate(block.attns)
            ),
            *(
                Sublayer(f"ffns.{i}", each.norm, branch_of(f"ffns.{i}.mlp", each.mlp), each.ls, each.drop_path)
                for i, each in enumerate(block.ffns)
            ),
        ]


_ARGUMENTS = ("x", "attn_mask", "is_causal")
RULES = (
    Rule(
        FusedScalingBlock,
        frozenset({"timm.models.vision_transformer.ParallelScalingBlock"}),
        lambda block: differs(
            block,
            _ARGUMENTS,
            ("in_norm", "in_proj", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act", "ls", "drop_path"),
            ("out_proj", "attn_out_proj", "mlp_out_proj"),
            ("mlp_bias",),
        ),
    ),
    Rule(
        FusedThingsBlock,
        frozenset({"timm.models.vision_transformer.ParallelThingsBlock"}),
        lambda block: differs(block, _ARGUMENTS, ("attns", "ffns")),
    ),
)
