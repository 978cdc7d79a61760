"""The pre-norm Transformer block, with each residual add fused into the LayerNorm that follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.nn._stock import is_layer_norm, is_stock, layer_norm, operand_dtype
from vitkernels.nn.attention import Attention
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.layer_scale import LayerScale
from vitkernels.nn.mlp import Mlp


class Block(nn.Module):
    """x = x + drop_path(ls1(attn(norm1(x)))); x = x + drop_path(ls2(mlp(norm2(x)))).

    Args:
        dim: D.
        num_heads: H; must divide D.
        mlp_ratio: the feed-forward's hidden width over D.
        qkv_bias, qk_norm: of the attention.
        proj_bias: whether proj, fc1 and fc2 have a bias.
        init_values: where LayerScale starts; None for none.
        drop_path: rate of stochastic depth, 0 to below 1.
        activation: of the feed-forward, as in `Mlp`.
        eps: of the norms.

    Raises:
        ValueError: sizes below 1, a dim that num_heads does not divide, an unknown activation, a rate out of range.
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
    ) -> None:
        super().__init__()
        _check.positive("Block", dim=dim, num_heads=num_heads)
        _check.rate("Block", "drop_path", drop_path)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"Block: argument 'mlp_ratio' is {mlp_ratio!r}; needs at least 1 / dim = 1 / {dim}")
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, proj_bias=proj_bias, eps=eps)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation=activation, bias=proj_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        normed: Tensor | None = None,
        next_norm: nn.Module | None = None,
        next_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block; the keywords let two neighbours share one pass over memory at their border.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: as in `ops.attention`.
            normed: norm1(x), where whoever made x has it already.
            next_norm: the norm that comes next; a LayerNorm runs together with this block's last residual add.
            next_dtype: the dtype of its result; x's by default.

        Returns:
            The block's output, [B, N, D]; with next_norm, (output, next_norm(output)).
        """
        if normed is None:
            normed = layer_norm(self.norm1, x, self.norm1_dtype(x))
        mlp_dtype = operand_dtype(self.mlp.fc1, x) if is_stock(self.mlp, Mlp) else None
        masked = attn_mask is not None or is_causal
        options = {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}
        x, normed = _add_norm(x, normed, self.attn, self.ls1, self.drop_path1, self.norm2, mlp_dtype, **options)
        if next_norm is None:
            return x + self.drop_path2(self.ls2(self.mlp(normed)))
        return _add_norm(x, normed, self.mlp, self.ls2, self.drop_path2, next_norm, next_dtype)

    def norm1_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which the attention wants norm1(x); None for x's."""
        return operand_dtype(self.attn.qkv, x) if is_stock(self.attn, Attention) else None


def _add_norm(
    x: Tensor,
    normed: Tensor,
    layer: nn.Module,
    scale: nn.Module,
    drop_path: nn.Module,
    norm: nn.Module,
    out_dtype: torch.dtype | None,
    **options: Tensor | bool | None,
) -> tuple[Tensor, Tensor]:
    """total = x + drop_path(scale(layer(normed))), and norm(total): one op where all of them are stock."""
    if not (
        is_stock(layer, Attention, Mlp)
        and is_stock(scale, LayerScale, nn.Identity)
        and is_stock(drop_path, DropPath, nn.Identity)
        and is_layer_norm(norm)
    ):
        total = x + drop_path(scale(layer(normed, **options)))
        return total, layer_norm(norm, total, out_dtype)
    branch, bias = layer.branch(normed, **options)  # type: ignore[operator]  # mypy joins the two to Module
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    # drawn in the dtype that the scaled branch has where the modules run one by one
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    factor = drop_path.factor(branch, dtype) if isinstance(drop_path, DropPath) else None
    return ops.add_layer_norm(
        x,
        branch,
        norm.weight,
        norm.bias,
        norm.eps,
        branch_bias=bias,
        scale=gamma,
        row_scale=factor,
        out_dtype=out_dtype,
    )
