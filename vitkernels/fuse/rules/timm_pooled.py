"""timm: attention whose queries are the largest of several tokens, where a block leaves fewer (Hiera, Ryali et al.
2023, and SAM 2's), and TinyViT's windows (Wu et al. 2022). Read from timm 1.0.31.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.around import attention_within
from vitkernels.fuse.pooled import PooledBlock
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.rules.timm import FusedMlp
from vitkernels.fuse.rules.timm_window_attention import FusedPlainAttention
from vitkernels.fuse.rules.timm_windows import FusedOwnBlock, Names
from vitkernels.fuse.swap import Fused, branch_of
from vitkernels.ops._windows import from_windows, to_windows
from vitkernels.residual import genuine, parts
from vitkernels.residual.stream import Branch, Part
from vitkernels.residual.sublayers import join_heads, mlp_branch


def unit_attention(
    x: Tensor,
    qkv: nn.Module,
    proj: nn.Module,
    heads: int,
    units: int,
    stride: int,
    largest: Callable[[Tensor], Tensor],
    scale: float | None = None,
) -> Tensor:
    """Hiera's attention: of each unit, whose tokens lie apart in [B, N, D]; queries are the largest of so many.

    Args:
        x: the tokens.
        qkv, proj: the projections.
        heads, units, stride: how many heads, how many units an image has, how many tokens make one query.
        largest: [B, H, stride, M, K] to [B, H, M, K].
        scale: of the scores, 1 / sqrt(K) by default.
    """

    def apart(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)

    called = parts.why_not_part("", qkv, nn.Linear) is not None  # with the tokens as they are
    packed = apart(qkv(x)) if called else parts.linear(qkv, apart(x))
    if stride == 1:
        out = ops.attention_qkv(packed, heads, scale=scale)
    else:
        q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = join_heads(ops.attention(largest(q.unflatten(2, (stride, -1))), k, v, scale=scale))
    return parts.linear(proj, out.unflatten(0, (-1, units)).transpose(1, 2).flatten(1, 2))


class FusedUnitAttention(FusedPlainAttention):
    """Hiera's MaskUnitAttention: units of a mask are windows; a unit's tokens lie apart, [B, T, W, D]."""

    def why_not_now(self) -> str | None:
        attn: Any = self
        return None if attn.fused_attn or parts.is_usual(attn.scale, attn.head_dim**-0.5) else "a scale of its own"

    def run(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        units = x.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
        with self.backend():
            return unit_attention(x, attn.qkv, attn.proj, attn.heads, units, attn.q_stride, lambda q: q.amax(2))


class FusedScaleAttention(FusedPlainAttention):
    """MultiScaleAttention of SAM 2's Hiera: [B, H, W, D], queries pooled by a module."""

    axes = 4

    def why_not_now(self) -> str | None:
        attn: Any = self
        plain = attn.fused_attn or parts.is_usual(attn.scale, (attn.dim_out // attn.num_heads) ** -0.5)
        return None if plain else "a scale of its own"

    def run(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        with self.backend():
            qkv, sides = parts.linear(attn.qkv, x), x.shape[1:3]
            if attn.q_pool is None:
                heads = ops.attention_qkv(qkv.flatten(1, 2), attn.num_heads)
            else:
                q, k, v = qkv.chunk(3, dim=-1)
                q = attn.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                sides = q.shape[1:3]
                q, k, v = (each.flatten(1, 2).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
                heads = join_heads(ops.attention(q, k, v))
            return parts.linear(attn.proj, heads.unflatten(1, sides))


class FusedPoolingBlock(PooledBlock, FusedOwnBlock):
    """What both Hieras' blocks share."""

    names = Names(("ls1", "ls2"))

    def changes(self) -> bool:
        block: Any = self
        return block.dim != block.dim_out


class FusedHieraBlock(FusedPoolingBlock):
    """HieraBlock."""

    kind = "units of a mask"

    def shortcut(self, x: Tensor, normed: Tensor, **options: Any) -> Tensor:
        block: Any = self
        several = (x if block.proj is None else parts.linear(block.proj, normed)).unflatten(
            1, (block.attn.q_stride, -1)
        )
        return several.amax(1) if block.proj is not None else torch.cat([several.amax(1), several.mean(1)], dim=-1)


class FusedHieraDetBlock(FusedPoolingBlock):
    """MultiScaleBlock of SAM 2's Hiera."""

    axes = 4
    kind = "windows"

    def shortcut(self, x: Tensor, normed: Tensor, **options: Any) -> Tensor:
        block: Any = self
        x = parts.linear(block.proj, normed)
        return x if block.pool is None else block.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def own(self, x: Tensor, **options: Any) -> Tensor:
        block: Any = self
        if not block.is_windowed:
            return block.attn(x)
        functions = sys.modules[genuine.owner(self).__module__]
        stride = block.q_stride or (1, 1)
        sides = [length // step for length, step in zip(x.shape[1:3], stride, strict=True)]
        size = [length // step for length, step in zip(block.window_size, stride, strict=True)]
        down, right = functions._calc_pad(*x.shape[1:3], block.window_size)[2:]
        windows = functions.window_partition(F.pad(x, (0, 0, 0, right, 0, down)), block.window_size)
        image = functions.window_unpartition(block.attn(windows), size, functions._calc_pad(*sides, size)[:2])
        return image[:, : sides[0], : sides[1]].contiguous()


# -------------------------------------------------------------------------------------------------------- TinyViT


class FusedTinyAttention(FusedPlainAttention):
    """TinyViT's Attention: a norm in front, and a bias for each distance, [H, N, N]."""

    reads = ("norm",)

    def why_not_now(self) -> str | None:
        attn: Any = self
        if attn.val_dim != attn.key_dim:
            return "its values are wider than its keys"
        return None if attn.fused_attn or parts.is_usual(attn.scale, attn.key_dim**-0.5) else "a scale of its own"

    def run(self, x: Tensor, **options: Any) -> Tensor:
        attn: Any = self
        bias = attn.get_attention_biases(x.device)
        with self.backend():
            qkv = parts.linear(attn.qkv, parts.layer_norm(attn.norm, x, parts.operand_dtype(attn.qkv, x)))
            q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
            return parts.linear(attn.proj, join_heads(ops.attention(q, k, v, attn_mask=bias)))


class FusedNormMlp(FusedMlp):
    """TinyViT's NormMlp."""

    reads = ("norm",)

    def inner(self) -> Branch:
        mlp: Any = self
        inner = mlp_branch(mlp.fc1, mlp.act, mlp.fc2, mlp.drop1)

        def run(x: Tensor, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
            return inner.run(parts.layer_norm(mlp.norm, x, parts.operand_dtype(mlp.fc1, x)), bias_apart)

        return Branch(run, f"add_layer_norm, {inner.ops}", None, inner.reason)


class FusedTinyBlock(Fused):
    """TinyVitBlock: a convolution between its two steps, whose sums are torch's."""

    is_block = True
    axes = 4

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if self.declines(x):
            return super().forward(x)
        size = (block.window_size, block.window_size)
        windows, counts = to_windows(x, size)
        x = x + block.drop_path1(from_windows(block.attn(windows), size, counts, x.shape[1:3]))
        image = block.local_conv(x.permute(0, 3, 1, 2))
        tokens = image.flatten(2).transpose(1, 2)
        return (tokens + block.drop_path2(block.mlp(tokens))).unflatten(1, image.shape[2:])

    def parts(self) -> list[Part]:
        block: Any = self
        attention = attention_within("attn", block.attn, block.attn, "a bias for each distance")
        return [attention.part("attn"), branch_of("mlp", block.mlp).part("mlp")]


_STEPS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


def _rule(
    mixin: type[Fused],
    owner: str,
    children: tuple[str, ...],
    optional: tuple[str, ...] = (),
    parameters: tuple[str, ...] = (),
) -> Rule:
    def contract(module: nn.Module) -> str | None:
        return differs(module, ("x",), children, optional, parameters)

    return Rule(mixin, frozenset({f"timm.models.{owner}"}), contract)


RULES = (
    _rule(FusedUnitAttention, "hiera.MaskUnitAttention", ("qkv", "proj")),
    _rule(FusedHieraBlock, "hiera.HieraBlock", _STEPS, ("proj",)),
    _rule(FusedScaleAttention, "hieradet_sam2.MultiScaleAttention", ("qkv", "proj"), ("q_pool",)),
    _rule(FusedHieraDetBlock, "hieradet_sam2.MultiScaleBlock", (*_STEPS, "proj"), ("pool",)),
    _rule(FusedTinyAttention, "tiny_vit.Attention", ("norm", "qkv", "proj"), (), ("attention_biases",)),
    _rule(FusedNormMlp, "tiny_vit.NormMlp", ("norm", "fc1", "act", "drop1", "fc2", "drop2")),
    _rule(FusedTinyBlock, "tiny_vit.TinyVitBlock", ("attn", "drop_path1", "mlp", "drop_path2", "local_conv")),
)
