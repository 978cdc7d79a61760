"""The pre-norm Transformer block, with each residual add fused into the norm that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import _check
from vitkernels.nn.attention import Attention
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.layer_scale import LayerScale
from vitkernels.nn.mlp import GluMlp, Mlp
from vitkernels.residual import parts
from vitkernels.residual.genuine import why_not_around
from vitkernels.residual.kept import Kept
from vitkernels.residual.stream import Branch, Sublayer, pre_norm


class Block(nn.Module):
    """x = x + drop_path(ls1(attn(norm1(x)))); x = x + drop_path(ls2(mlp(norm2(x)))).

    Args:
        dim: D, the width of the tokens.
        num_heads: H; must divide D.
        mlp_ratio: the feed-forward's hidden width over D; of a gated one, that of gate and up together.
        qkv_bias, qk_norm: of the attention.
        proj_bias: whether proj, fc1 and fc2 have a bias.
        init_values: where LayerScale starts; None for none.
        drop_path: rate of stochastic depth, 0 to below 1.
        activation: of the feed-forward, as in `Mlp`.
        eps: of the norms.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
        gated_mlp: whether the feed-forward is a `GluMlp`: SwiGLU with the activation "silu".

    Raises:
        ValueError: sizes below 1, a dim that num_heads does not divide, an unknown activation or norm, a rate out of
            range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        activation: str = "gelu",
        eps: float = 1e-6,
        norm: str = "layer",
        gated_mlp: bool = False,
    ) -> None:
        super().__init__()
        dim, num_heads = _check.positive("Block", dim=dim, num_heads=num_heads)
        _check.rate("Block", "drop_path", drop_path)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"Block: argument 'mlp_ratio' is {mlp_ratio!r}; needs at least 1 / dim = 1 / {dim}")
        norm_layer = _check.norm("Block", norm)
        self.norm1 = norm_layer(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, eps, norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, eps=eps)
        self.mlp = (GluMlp if gated_mlp else Mlp)(dim, int(dim * mlp_ratio), activation=activation, bias=proj_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._kept = Kept()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: as in `ops.attention`.

        Returns:
            [B, N, D].
        """
        options = {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}
        if why_not_around() is not None:  # every module is called, and seen
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **options)))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if options or torch.compiler.is_compiling():
            return pre_norm(x, self.sublayers(**options))
        return pre_norm(x, self._kept.get(self, None, self.sublayers))

    def sublayers(self, **options: Any) -> list[Sublayer]:
        """The block's residual steps; the options are forward's."""
        return [
            Sublayer("attn", self.norm1, _branch("attn", self.attn, **options), self.ls1, self.drop_path1),
            Sublayer("mlp", self.norm2, _branch("mlp", self.mlp), self.ls2, self.drop_path2),
        ]


def _branch(name: str, layer: nn.Module, **options: Any) -> Branch:
    """A sub-layer by its parts, or called as it is where it may not be read."""
    kind = Attention if name == "attn" else GluMlp if isinstance(layer, GluMlp) else Mlp
    why_not = parts.why_not_part(name, layer, kind)
    if why_not is None:
        return layer.branch(**options)  # type: ignore[operator]
    return Branch(lambda x, bias_apart: (layer(x, **options), None), "", None, why_not)
