"""Multi-head self-attention as a module on `ops.attention_qkv`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch
from vitkernels.residual.sublayers import (
    ATTENTION,
    attention_step,
    join_heads,
    joined,
    linear_step,
    split_heads,
    why_not_linears,
)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one packed projection for q, k and v.

    Args:
        dim: D, the width of the tokens.
        num_heads: H; must divide D.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: a norm over the head width on q and k (Dehghani et al. 2023).
        eps: of those norms.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.

    Raises:
        ValueError: sizes below 1, a dim that num_heads does not divide, or an unknown norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        eps: float = 1e-6,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        dim, num_heads = _check.positive("Attention", dim=dim, num_heads=num_heads)
        _check.divisible("Attention", "dim", dim, "num_heads", num_heads)
        norm_layer = _check.norm("Attention", norm)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Let the tokens of x attend to each other.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: as in `ops.attention`.

        Returns:
            [B, N, D].
        """
        return self.branch(attn_mask=attn_mask, is_causal=is_causal).run(x, False)[0]

    def branch(self, **options: Any) -> Branch:
        """The module as the branch of a residual step; the options are forward's."""
        why_not = why_not_linears(qkv=self.qkv, proj=self.proj)
        is_plain = parts.is_identity(self.q_norm) and parts.is_identity(self.k_norm)

        def attend(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return parts.last_linear(self.proj, self._heads(qkv, is_plain, **options), bias_apart)

        packed = functools.partial(joined, self.qkv)
        step = attention_step(packed, self.proj, self.num_heads, **options) if is_plain else linear_step(packed, attend)
        return Branch(
            lambda x, bias_apart: attend(parts.linear(self.qkv, x), bias_apart),
            ATTENTION,
            self.qkv,
            why_not,
            step=step if why_not is None else None,
        )

    def _heads(self, qkv: Tensor, is_plain: bool, **options: Any) -> Tensor:
        """The heads' outputs side by side, [B, N, D]."""
        if is_plain:
            return ops.attention_qkv(qkv, self.num_heads, **options)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = parts.layer_norm(self.q_norm, q).to(v.dtype), parts.layer_norm(self.k_norm, k).to(v.dtype)
        return join_heads(ops.attention(q, k, v, **options))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
