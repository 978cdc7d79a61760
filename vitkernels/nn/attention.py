"""Multi-head self-attention as a module on `ops.attention_qkv`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import _check
from vitkernels.nn.packing import Packing
from vitkernels.nn.rope import Rope
from vitkernels.ops import _steps
from vitkernels.ops._steps import Called, HeadNorms, Images, Positions
from vitkernels.residual import parts
from vitkernels.residual.stream import Branch, Step
from vitkernels.residual.sublayers import (
    ATTENTION,
    attention_step,
    joined,
    linear_step,
    read_head_norms,
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
        options |= {"rope": rope, "packing": packing}

        def attend(qkv: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return parts.last_linear(self.proj, self._heads(qkv, **options), bias_apart)

        return Branch(
            lambda x, bias_apart: attend(parts.linear(self.qkv, x), bias_apart),
            ATTENTION,
            self.qkv,
            why_not,
            step=self._step(attend, options) if why_not is None else None,
        )

    def _step(self, attend: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]], options: dict[str, Any]) -> Step:
        norms, is_packed = self._norms(), options["packing"] is not None
        packed = functools.partial(joined, self.qkv)
        if norms is None or (is_packed and torch.compiler.is_compiling()):  # there the longest image is no constant
            return linear_step(packed, attend)
        is_plain = norms.norm is None and options["rope"] is None and not is_packed
        return attention_step(
            packed,
            self.proj,
            self.num_heads,
            norms=None if is_plain else self._norms,  # type: ignore[arg-type]
            call=_called,
            options=options,
            is_packed=is_packed,
        )

    def _norms(self) -> HeadNorms | None:
        """Norms of each head's q and k, as `ops.rotary_qkv` has them; None where it cannot stand for them."""
        return read_head_norms(self.q_norm, self.k_norm, self.proj)

    def _heads(self, qkv: Tensor, **options: Any) -> Tensor:
        """The heads' outputs side by side, [B, N, D]."""
        norms = self._norms()
        if norms is None:
            heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
            normed = (
                parts.layer_norm(*each).to(qkv.dtype) for each in zip((self.q_norm, self.k_norm), heads, strict=False)
            )
            qkv, norms = torch.stack([*normed, heads[2]], dim=-3).flatten(-3), HeadNorms()
        return _steps.between(qkv, self.num_heads, norms, _called(**options))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _called(
    rope: Rope | None = None, packing: Packing | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Called:
    """What a call with these options brings to the scores."""
    images = None if packing is None else Images(packing.cu_seqlens, max(packing.lengths))
    return Called(attn_mask, is_causal, Positions() if rope is None else Positions(*rope), images)
