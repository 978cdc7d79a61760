"""Multi-head self-attention as a module on `ops.attention_qkv`."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.nn._stock import is_stock, layer_norm, linear


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one packed projection for q, k and v.

    Args:
        dim: D, the width of the tokens.
        num_heads: H; must divide D.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: LayerNorm over the head width on q and k (Dehghani et al. 2023).
        eps: of those norms.

    Raises:
        ValueError: sizes below 1, or a dim that num_heads does not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim, num_heads = _check.positive("Attention", dim=dim, num_heads=num_heads)
        _check.divisible("Attention", "dim", dim, "num_heads", num_heads)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Let the tokens of x attend to each other.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: as in `ops.attention`.

        Returns:
            [B, N, D].
        """
        return linear(self.proj, self._heads(x, attn_mask, is_causal))

    def branch(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """forward(x) in two parts, proj's product and its bias, for an op that adds the bias on its way."""
        heads = self._heads(x, attn_mask, is_causal)
        if is_stock(self.proj, nn.Linear):
            return ops.linear(heads, self.proj.weight), self.proj.bias
        return self.proj(heads), None

    def _heads(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The heads' outputs side by side, [B, N, D]."""
        qkv = linear(self.qkv, x)
        if is_stock(self.q_norm, nn.Identity) and is_stock(self.k_norm, nn.Identity):
            return ops.attention_qkv(qkv, self.num_heads, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = layer_norm(self.q_norm, q), layer_norm(self.k_norm, k)
        return ops.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
