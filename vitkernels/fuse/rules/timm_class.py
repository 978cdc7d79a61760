"""timm: blocks in which the class token alone looks at the others (CaiT, Touvron et al. 2021; XCiT, VOLO).

Read from timm 1.0.31. The attention has one query and runs fused by itself; the norm before it sees all tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm_window_attention import FusedPlainAttention
from vitkernels.fuse.swap import PreNormBlock, branch_of
from vitkernels.residual import parts
from vitkernels.residual.stream import Sublayer, added_now, pre_norm
from vitkernels.residual.sublayers import join_heads, projected


class FusedClassAttention(FusedPlainAttention):
    """CaiT's and XCiT's ClassAttn: [B, N, D] to [B, 1, D]."""

    linears: ClassVar[tuple[str, ...]] = ("q", "k", "v", "proj")
    reads = ("q",)

    def query(self, x: Tensor) -> Tensor:
        """Of the class token, [B, 1, D]."""
        return parts.linear(self.q, x[:, 0]).unsqueeze(1)  # type: ignore[arg-type]

    def keys(self, x: Tensor) -> Tensor:
        """k and v side by side, [B, N, 2 * D]."""
        return projected(x, self.k, self.v)  # type: ignore[arg-type]

    def run(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        with self.backend():
            q = self.query(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            k, v = self.keys(x).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.output(x, join_heads(ops.attention(q, k, v)), False)[0]


class FusedPackedClassAttention(FusedClassAttention):
    """VOLO's ClassAttention."""

    linears = ("q", "kv", "proj")

    def query(self, x: Tensor) -> Tensor:
        return parts.linear(self.q, x[:, :1])  # type: ignore[arg-type]

    def keys(self, x: Tensor) -> Tensor:
        return parts.linear(self.kv, x)  # type: ignore[arg-type]


class FusedClassBlock(PreNormBlock):
    """LayerScaleBlockClassAttn of CaiT, called with the tokens and the class token apart."""

    reads = ("norm1",)

    def forward(self, x: Tensor, x_cls: Tensor) -> Tensor:
        if self.declines(x):
            return super().forward(x, x_cls)
        return self.looked(x_cls, torch.cat((x_cls, x), dim=1))

    def looked(self, token: Tensor, x: Tensor) -> Tensor:
        """The class token, [B, 1, D], after both its steps; x is all tokens."""
        state = self._vitkernels
        with self.backend():
            attention, feed_forward = self.sublayers()
            normed = parts.layer_norm(attention.norm, x, parts.operand_dtype(None, x))
            out, _ = attention.branch.run(normed, False)
            token = added_now(token, attention, out, widen=state.residual_dtype is None)
            return pre_norm(token, [feed_forward], state.residual_dtype, again=state.recompute_norms)

    def why_not_joined(self) -> str | None:
        return "its class token alone changes"

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        scales = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
        paths = [getattr(block, name, None) or block.drop_path for name in ("drop_path1", "drop_path2")]
        attention = attention_within("attn", block.attn, block.attn, "one query")
        return [
            Sublayer("attn", block.norm1, attention, scales[0], paths[0]),
            Sublayer("mlp", block.norm2, branch_of("mlp", block.mlp), scales[1], paths[1]),
        ]


class FusedVoloClassBlock(FusedClassBlock):
    """VOLO's ClassBlock: [B, N, D], the class token first."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.declines(x):
            return super(FusedClassBlock, self).forward(x)
        return torch.cat([self.looked(x[:, :1], x), x[:, 1:]], dim=1)


class FusedXcitClassBlock(FusedClassBlock):
    """XCiT's ClassAttentionBlock: the other tokens' norms are added to them too, by torch."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        block: Any = self
        if self.declines(x):
            return super(FusedClassBlock, self).forward(x)
        with self.backend():
            normed = parts.layer_norm(block.norm1, x, parts.operand_dtype(None, x))
            looked = torch.cat([block.attn(normed), normed[:, 1:]], dim=1)
            x = x + block.drop_path1(block.gamma1 * looked)
            if block.tokens_norm:
                x = parts.layer_norm(block.norm2, x, parts.operand_dtype(None, x))
            else:
                first = x[:, :1]
                x = torch.cat([parts.layer_norm(block.norm2, first, parts.operand_dtype(None, first)), x[:, 1:]], dim=1)
            token = block.gamma2 * block.mlp(x[:, :1])
            return x + block.drop_path2(torch.cat([token, x[:, 1:]], dim=1))


_BLOCK = ("norm1", "attn", "norm2", "mlp")
_PATHS = ("drop_path1", "drop_path2")
_OUT = ("attn_drop", "proj", "proj_drop")


def _rule(
    mixin: type[FusedClassAttention] | type[FusedClassBlock],
    owner: str,
    arguments: tuple[str, ...],
    children: tuple[str, ...],
    parameters: tuple[str, ...] = (),
) -> Rule:
    def contract(module: nn.Module) -> str | None:
        return differs(module, arguments, children, (), parameters)

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


RULES = (
    _rule(FusedClassAttention, "cait.ClassAttn", ("x",), ("q", "k", "v", *_OUT)),
    _rule(FusedPackedClassAttention, "volo.ClassAttention", ("x",), ("q", "kv", *_OUT)),
    _rule(
        FusedClassBlock,
        "cait.LayerScaleBlockClassAttn",
        ("x", "x_cls"),
        (*_BLOCK, "drop_path"),
        ("gamma_1", "gamma_2"),
    ),
    _rule(FusedVoloClassBlock, "volo.ClassBlock", ("x",), (*_BLOCK, *_PATHS)),
    _rule(FusedXcitClassBlock, "xcit.ClassAttentionBlock", ("x",), (*_BLOCK, *_PATHS), ("gamma1", "gamma2")),
)
