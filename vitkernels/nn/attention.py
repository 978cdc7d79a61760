"""Multi-head self-attention as a module on `ops.attention_qkv`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.nn.packing import Packing
from vitkernels.nn.rope import Rope
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch
from vitkernels.residual.sublayers import (
    ATTENTION,
    attention_step,
    joined,
    linear_step,
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

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Rope | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Let the tokens of x attend to each other.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: as in `ops.attention`.
            rope: rotary positions of q and k.
            packing: x is [T, 1, D], the tokens of many images one behind the other, each of which attends to itself;
                there is no attn_mask beside it.

        Returns:
            x's shape.

        Raises:
            ValueError: an attn_mask with a packing, or what `ops.attention_qkv` and `ops.attention_varlen` refuse.
        """
        return self.branch(attn_mask=attn_mask, is_causal=is_causal, rope=rope, packing=packing).run(x, False)[0]

    def branch(self, rope: Rope | None = None, packing: Packing | None = None, **options: Any) -> Branch:
        """The module as the branch of a residual step; the options are forward's."""
        if packing is not None and options.get("attn_mask") is not None:
            raise ValueError("Attention: argument 'attn_mask' is given with 'packing'; needs one of them")
        why_not = why_not_linears(qkv=self.qkv, proj=self.proj)
        is_plain = rope is None and packing is None and self._has_no_norms()

        def attend(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            heads = self._heads(self._positioned(qkv, rope, packing), packing, **options)
            return parts.last_linear(self.proj, heads, bias_apart)

        packed = functools.partial(joined, self.qkv)
        step = attention_step(packed, self.proj, self.num_heads, **options) if is_plain else linear_step(packed, attend)
        return Branch(
            lambda x, bias_apart: attend(parts.linear(self.qkv, x), bias_apart),
            ATTENTION,
            self.qkv,
            why_not,
            step=step if why_not is None else None,
        )

    def _heads(
        self, qkv: Tensor, packing: Packing | None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The heads' outputs side by side, [B, N, D]."""
        if packing is None:
            return ops.attention_qkv(qkv, self.num_heads, attn_mask=attn_mask, is_causal=is_causal)
        packed = qkv.view(len(qkv), 3, self.num_heads, self.head_dim)
        out = ops.attention_varlen(packed, packing.cu_seqlens, max(packing.lengths), is_causal=is_causal)
        return out.flatten(1).unsqueeze(1)

    def _has_no_norms(self) -> bool:
        return parts.is_identity(self.q_norm) and parts.is_identity(self.k_norm)

    def _positioned(self, qkv: Tensor, rope: Rope | None, packing: Packing | None) -> Tensor:
        """[B, N, 3 * D] with the norms of q and k, and their rotary positions."""
        shape = qkv.shape
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, N, 3, H, K]
        if packing is not None:
            qkv = qkv.squeeze(1)  # [T, 3, H, K]
        norms: dict[str, Any] = {}
        if self._norms_are_read():
            q, k = parts.read_norm(self.q_norm), parts.read_norm(self.k_norm)
            norms = {"norm": "rms_norm" if q.rms else "layer_norm", "eps": q.eps}
            norms |= {"q_weight": q.weight, "q_bias": q.bias, "k_weight": k.weight, "k_bias": k.bias}
        elif not self._has_no_norms():
            heads = qkv.unbind(-3)
            normed = [
                parts.layer_norm(norm, each) for norm, each in zip((self.q_norm, self.k_norm), heads, strict=False)
            ]
            qkv = torch.stack([*(each.to(qkv.dtype) for each in normed), heads[2]], dim=-3)
        if rope is not None:
            norms |= {"sin": rope.sin, "cos": rope.cos, "prefix": rope.prefix}
        return (ops.rotary_qkv(qkv, **norms) if norms else qkv).view(shape)

    def _norms_are_read(self) -> bool:
        """Whether `ops.rotary_qkv` can stand for both norms."""
        reasons = (parts.why_not_layer_norm("", norm) for norm in (self.q_norm, self.k_norm))
        if any(reason is not None for reason in reasons):
            return False
        q, k = parts.read_norm(self.q_norm), parts.read_norm(self.k_norm)
        widths = {each.shape for each in (q.weight, k.weight) if each is not None}
        return (q.rms, q.eps) == (k.rms, k.eps) and widths == {(self.head_dim,)}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
