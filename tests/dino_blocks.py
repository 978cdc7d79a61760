"""Small copies of the blocks of Meta's DINOv2 and DINOv3 repositories, which cannot be installed.

Written from their contracts: the same attributes, signatures, order of operations and random draws. xformers'
block-diagonal attention over a list of crops is a mask here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        factor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0:
            factor.div_(keep)
        return x * factor


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class SwiGLUFFN(nn.Module):
    """DINOv2's."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class ThreeSwiGLUFFN(nn.Module):
    """DINOv3's."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.w1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.w2 = nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


# ---------------------------------------------------------------------------------------------------------- DINOv2


class Attention(nn.Module):
    """As DINOv2 first had it."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        weights = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim)))


class CausalAttention(nn.Module):
    """As later versions have it: `attn_drop` is a number."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (each.transpose(1, 2) for each in torch.unbind(qkv, 2))
        dropped = self.attn_drop if self.training else 0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=is_causal)
        return self.proj_drop(self.proj(heads.transpose(1, 2).contiguous().view(batch, tokens, dim)))


class BlockDiagonalMask:
    """Which tokens of a list of crops, side by side in one row, see each other."""

    def __init__(self, crops: Sequence[Tensor]) -> None:
        self.shapes = [tuple(crop.shape[:2]) for crop in crops]
        lengths = [tokens for batch, tokens in self.shapes for _ in range(batch)]
        self.mask = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()

    def split(self, x: Tensor) -> list[Tensor]:
        pieces = x.split([batch * tokens for batch, tokens in self.shapes], dim=1)
        return [piece.reshape(*shape, -1) for piece, shape in zip(pieces, self.shapes, strict=True)]


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias: BlockDiagonalMask | None = None) -> Tensor:
        if attn_bias is None:
            return super().forward(x)
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (each.transpose(1, 2) for each in torch.unbind(qkv, 2))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias.mask)
        return self.proj_drop(self.proj(heads.transpose(1, 2).reshape(batch, tokens, dim)))


def drop_add_residual_stochastic_depth(
    x: Tensor, residual_func: Callable[[Tensor], Tensor], sample_drop_ratio: float
) -> Tensor:
    """Run the branch on a random subset of the samples, and add it, scaled up, where they are."""
    batch = x.shape[0]
    count = max(int(batch * (1 - sample_drop_ratio)), 1)
    chosen = torch.randperm(batch, device=x.device)[:count]
    residual = residual_func(x[chosen])
    added = torch.index_add(x.flatten(1), 0, chosen, residual.to(x.dtype).flatten(1), alpha=batch / count)
    return added.view_as(x)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: type[nn.Module] = Attention,
        ffn_layer: type[nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(dim, num_heads=num_heads, attn_drop=attn_drop, proj_drop=drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor) -> Tensor:
        def attn_residual(x: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(x)))

        def ffn_residual(x: Tensor) -> Tensor:
            return self.ls2(self.mlp(self.norm2(x)))

        if self.training and self.sample_drop_ratio > 0.1:
            x = drop_add_residual_stochastic_depth(x, attn_residual, self.sample_drop_ratio)
            return drop_add_residual_stochastic_depth(x, ffn_residual, self.sample_drop_ratio)
        if self.training and self.sample_drop_ratio > 0.0:
            x = x + self.drop_path1(attn_residual(x))
            return x + self.drop_path1(ffn_residual(x))
        x = x + attn_residual(x)
        return x + ffn_residual(x)


class NestedTensorBlock(Block):
    def forward_nested(self, x_list: list[Tensor]) -> list[Tensor]:
        if self.training and self.sample_drop_ratio > 0.0:
            return [super(NestedTensorBlock, self).forward(x) for x in x_list]
        bias = BlockDiagonalMask(x_list)
        x = torch.cat([each.reshape(1, -1, each.shape[-1]) for each in x_list], dim=1)
        x = x + self.ls1(self.attn(self.norm1(x), attn_bias=bias))
        return bias.split(x + self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x_or_x_list: Any) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        return self.forward_nested(x_or_x_list)


# ---------------------------------------------------------------------------------------------------------- DINOv3


class LinearKMaskedBias(nn.Linear):
    """The mask is NaN until weights are loaded: 0 for k's bias then, 1 for the others."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if self.bias is not None:
            self.register_buffer("bias_mask", torch.full_like(self.bias, fill_value=math.nan))

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias * self.bias_mask.to(self.bias.dtype) if self.bias is not None else None
        return F.linear(input, self.weight, bias)


def rope_apply(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class SelfAttention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, mask_k_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = (LinearKMaskedBias if mask_k_bias else nn.Linear)(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)  # never applied
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def apply_rope(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        sin, cos = rope
        prefix = q.shape[-2] - sin.shape[-2]
        turned = []
        for each in (q, k):
            wide = each.to(sin.dtype)
            patches = rope_apply(wide[:, :, prefix:], sin, cos)
            turned.append(torch.cat([wide[:, :, :prefix], patches], dim=-2).to(each.dtype))
        return turned

    def forward(self, x: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), attn_bias, rope)))

    def forward_list(self, x_list: list[Tensor], attn_bias: Any = None, rope_list: Any = None) -> list[Tensor]:
        flat = self.qkv(torch.cat([x.flatten(0, 1) for x in x_list]))
        pieces = flat.split([x.shape[0] * x.shape[1] for x in x_list])
        heads = [
            self.compute_attention(piece.view(*x.shape[:2], -1), attn_bias, rope)
            for piece, x, rope in zip(pieces, x_list, rope_list, strict=True)
        ]
        flat = self.proj(torch.cat([each.flatten(0, 1) for each in heads]))
        pieces = flat.split([x.shape[0] * x.shape[1] for x in x_list])
        return [piece.view_as(x) for piece, x in zip(pieces, x_list, strict=True)]

    def compute_attention(self, qkv: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        assert attn_bias is None
        batch, tokens, _ = qkv.shape
        dim = self.qkv.in_features
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (each.transpose(1, 2) for each in torch.unbind(qkv, 2))
        if rope is not None:
            q, k = self.apply_rope(q, k, rope)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)


class SelfAttentionBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        mask_k_bias: bool = True,
        ffn_layer: type[nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, attn_drop, drop, mask_k_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * ffn_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def _forward_list(self, x_list: list[Tensor], rope_list: list[Any]) -> list[Tensor]:
        if not (self.training and self.sample_drop_ratio > 0.0):
            out = []
            for x, rope in zip(x_list, rope_list, strict=True):
                x = x + self.ls1(self.attn(self.norm1(x), rope=rope))
                out.append(x + self.ls2(self.mlp(self.norm2(x))))
            return out
        counts = [max(int(len(x) * (1 - self.sample_drop_ratio)), 1) for x in x_list]
        steps: list[Callable[[list[Tensor]], list[Tensor]]] = [
            lambda subsets: [
                self.ls1(each) for each in self.attn.forward_list([self.norm1(x) for x in subsets], rope_list=rope_list)
            ],
            lambda subsets: [self.ls2(self.mlp(self.norm2(x))) for x in subsets],
        ]
        for step in steps:
            chosen = [torch.randperm(len(x))[:count] for x, count in zip(x_list, counts, strict=True)]
            added = step([x[indices] for x, indices in zip(x_list, chosen, strict=True)])
            x_list = [
                torch.index_add(x, 0, indices, residual.to(x.dtype), alpha=len(x) / len(indices))
                for x, indices, residual in zip(x_list, chosen, added, strict=True)
            ]
        return x_list

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self._forward_list([x_or_x_list], [rope_or_rope_list])[0]
        return self._forward_list(x_or_x_list, rope_or_rope_list or [None] * len(x_or_x_list))


# ---------------------------------------------------------------------------------------------------------- models


class Encoder(nn.Module):
    """Blocks and the last norm, run as both repositories run them: on a tensor or a list, with or without rope."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, *crops: Tensor, ropes: Any = None) -> Any:
        x: Any = list(crops) if len(crops) > 1 else crops[0]
        for block in self.blocks:
            x = block(x) if ropes is None else block(x, ropes)
        return [self.norm(each) for each in x] if isinstance(x, list) else self.norm(x)


def rope_of(height: int, width: int, head_width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sines and cosines of axial positions, each [height * width, head_width]."""
    periods = 100 ** (torch.arange(head_width // 4) / (head_width // 4))
    places = [(torch.arange(size) + 0.5) / size * 2 - 1 for size in (height, width)]
    grid = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1, 2).tile(2)
    return angles.sin().to(dtype), angles.cos().to(dtype)
