"""patch_embed in Triton: the projection reads its patches from the image, so they are never in memory unfolded.

    forward          one kernel: gather, normalise, product, bias, prefix and positions, straight into [B, R + N, D]
    weight           one kernel: the same gather against dout, partial sums over parts of the batch, then their sum
    image            one kernel: dout times weight, stored where the pixels lie; each pixel has one writer
    the others       one pass over dout: its sums over the batch for each row of the position table

A patch's pixels are one axis of the product, (c, y, x), with x padded to a power of two so that a thread's loads stay
whole; the weight gets the same padding, of zeros. Workspace: a padded copy of the weight where padding is needed, and
for its gradient one float32 copy of the weight for each part of the batch. Nothing is atomic, all is repeatable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from vitkernels.kernels import capability, configs
from vitkernels.kernels.common import processors
from vitkernels.kernels.launch import cdiv, launch
from vitkernels.kernels.patch_embed_kernels import embed, image_gradient, sum_tokens, weight_gradient
from vitkernels.kernels.patch_embed_variants import padded_shape, variants
from vitkernels.ops._amp import nothing

__all__ = ["backward", "forward", "variants", "why_not"]

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Patches:
    """Where the patches of a call lie, and how its pixels become numbers."""

    image: Tensor
    weight: Tensor
    keep: Tensor | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    prefixes: int

    @property
    def across(self) -> int:
        return self.image.shape[3] // self.weight.shape[3]

    @property
    def count(self) -> int:
        """Patches of an image."""
        return self.image.shape[2] // self.weight.shape[2] * self.across

    @property
    def tokens(self) -> int:
        """Patches of an image that are kept."""
        return self.count if self.keep is None else self.keep.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the result, over the batch."""
        return self.image.shape[0] * (self.prefixes + self.tokens)

    @property
    def normalize(self) -> bool:
        return self.image.dtype == torch.uint8 or self.mean is not None or self.std is not None

    @property
    def converted(self) -> bool:
        """Whether what is multiplied is not what lies in memory."""
        return self.normalize or self.image.dtype != self.weight.dtype

    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(pixel / 255 - mean) / std as a factor and an offset for each channel; only uint8 is divided by 255."""
        channels = self.image.shape[1]
        mean, std = self.mean or [0.0] * channels, self.std or [1.0] * channels
        scale = 255.0 if self.image.dtype == torch.uint8 else 1.0
        return tuple(1 / (s * scale) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))

    def shape(self) -> dict[str, int]:
        """The constants that every kernel of the product takes."""
        return padded_shape(*self.weight.shape)

    def padded_weight(self) -> Tensor:
        """[WIDTH, SIZE] as `padded_shape` has it; weight itself where no padding is needed."""
        width, channels, rows, columns = self.weight.shape
        shape = self.shape()
        weight = self.weight if shape["PITCH"] == columns else F.pad(self.weight, (0, shape["PITCH"] - columns))
        weight = weight.reshape(width, channels * rows * shape["PITCH"])
        return F.pad(weight, (0, shape["SIZE"] - weight.shape[1])).contiguous()


def _tile(kernel: str, patches: Patches, wide: bool = False) -> configs.PatchEmbedTile:
    weight = patches.weight
    regular = patches.keep is None and patches.image.stride(3) == 1 and weight.shape[3] % 16 == 0 and not wide
    call = {
        "float32": weight.dtype == torch.float32,
        "converted": patches.converted,
        "wide": regular and weight.shape[0] % 256 == 0,
    }
    return configs.PATCH_EMBED[kernel].pick(capability(weight.device), **call)


def _launch_options(tile: configs.PatchEmbedTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def why_not(direction: str, call: Any) -> str | None:
    """A sentence for a call that the kernels cannot serve, or None."""
    image, weight = call.image, call.weight
    tokens = image.shape[0] * (image.shape[2] // weight.shape[2]) * (image.shape[3] // weight.shape[3])
    if tokens >= 2**31 - 2**16:
        return f"the kernels number rows in 32 bits, and the batch has {tokens} patches"
    # A library multiplies TF32 on the tensor cores, several times as fast as these kernels on the ordinary ones
    if weight.dtype == torch.float32 and weight.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "torch.backends.cuda.matmul allows TF32, and the kernels multiply float32 exactly"
    return None


def forward(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """vitkernels::patch_embed; an index in keep that is out of range reads the nearest patch."""
    patches = Patches(image, weight, keep, mean, std, 0 if prefix is None else prefix.shape[0])
    dtypes = [tensor.dtype for tensor in (weight, prefix, pos_embed) if tensor is not None]
    out = image.new_empty(
        image.shape[0],
        patches.prefixes + patches.tokens,
        weight.shape[0],
        dtype=functools.reduce(torch.promote_types, dtypes),
    )
    if out.numel() == 0:
        return out
    tile = _tile("embed", patches, wide=out.dtype != weight.dtype)
    launch(
        embed,
        (cdiv(weight.shape[0], tile.columns) * cdiv(patches.rows, tile.rows),),
        image,
        patches.padded_weight(),
        _packed(bias),
        _packed(prefix),
        _packed(pos_embed),
        _packed(keep),
        out,
        *patches.affine(),
        patches.rows,
        patches.tokens,
        patches.prefixes,
        patches.across,
        patches.count - 1,
        0 if pos_embed is None else pos_embed.shape[0] - patches.count,
        *image.stride(),
        **patches.shape(),
        NORMALIZE=patches.normalize,
        **_launch_options(tile),
    )
    return out


def backward(
    dout: Tensor,
    image: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    prefix: Tensor | None,
    pos_embed: Tensor | None,
    keep: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """vitkernels::patch_embed_backward."""
    patches = Patches(image, weight, keep, mean, std, 0 if prefix is None else prefix.shape[0])
    dimage = dweight = dbias = dprefix = dpos = nothing(weight)
    if needs[0]:
        dimage = _image_gradient(dout, patches)
    if needs[1]:
        dweight = _weight_gradient(dout, patches)
    if needs[2] or needs[3] or needs[4]:
        sums = _sums(dout, patches, by_patch=needs[4])
        if needs[2]:
            dbias = sums[patches.prefixes :].sum(0).to(weight.dtype)
        if needs[3] and prefix is not None:
            dprefix = sums[: patches.prefixes].to(prefix.dtype, copy=True)
        if needs[4] and pos_embed is not None:
            dpos = sums[sums.shape[0] - pos_embed.shape[0] :].to(pos_embed.dtype, copy=True)
    return dimage, dweight, dbias, dprefix, dpos


def _weight_gradient(dout: Tensor, patches: Patches) -> Tensor:
    weight, image, shape = patches.weight, patches.image, patches.shape()
    if dout.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dout = dout.to(weight.dtype)  # converted in the kernel, it would feed wgmma from registers that are written anew
    tile = _tile("weight_gradient", patches)
    grid = cdiv(shape["SIZE"], tile.columns), cdiv(shape["WIDTH"], tile.rows)
    blocks = cdiv(patches.rows, tile.depth)
    steps = cdiv(blocks, max(1, 2 * processors(image.device) // (grid[0] * grid[1])))
    parts = torch.empty(cdiv(blocks, steps), shape["WIDTH"], shape["SIZE"], dtype=torch.float32, device=image.device)
    launch(
        weight_gradient,
        (*grid, parts.shape[0]),
        dout,
        image,
        _packed(patches.keep),
        parts,
        *patches.affine(),
        patches.rows,
        patches.tokens,
        patches.prefixes,
        patches.across,
        patches.count - 1,
        steps,
        *dout.stride(),
        *image.stride(),
        **shape,
        NORMALIZE=patches.normalize,
        DTYPE=_TRITON_DTYPES[weight.dtype],
        **_launch_options(tile),
    )
    width, channels, rows, columns = weight.shape
    lines = parts.sum(0)[:, : channels * rows * shape["PITCH"]].view(width, channels, rows, shape["PITCH"])
    return lines[..., :columns].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)


def _image_gradient(dout: Tensor, patches: Patches) -> Tensor:
    image, weight = patches.image, patches.weight
    dimage = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    if dimage.numel() == 0:
        return dimage
    if patches.keep is None:
        dpatches = dout[:, patches.prefixes :].to(weight.dtype)
    else:  # linear: a patch kept twice gets the product of the sum
        groups = _groups(patches.keep, patches.count, of_image=True)
        dpatches = dout.new_empty(image.shape[0], patches.count, weight.shape[0], dtype=weight.dtype)
        _sum(dout, dpatches, patches, groups)
    tile = _tile("image_gradient", patches)
    shape, rows = patches.shape(), image.shape[0] * patches.count
    launch(
        image_gradient,
        (cdiv(shape["SIZE"], tile.columns) * cdiv(rows, tile.rows),),
        dpatches,
        patches.padded_weight(),
        dimage,
        tuple(1 / s for s in patches.std or [1.0] * image.shape[1]),
        rows,
        patches.count,
        patches.across,
        image.shape[2],
        *dpatches.stride(),
        **shape,
        **_launch_options(tile),
    )
    return dimage


def _sums(dout: Tensor, patches: Patches, by_patch: bool) -> Tensor:
    """Sums over the batch, float32 [R + tokens, D]; with `by_patch` [R + N, D], a kept patch's under its own number."""
    keep = patches.keep if by_patch else None
    rows = patches.prefixes + (patches.tokens if keep is None else patches.count)
    sums = torch.empty(rows, dout.shape[2], dtype=torch.float32, device=dout.device)
    if keep is None:
        _sum(dout, sums, patches)
    else:
        _sum(dout[:, : patches.prefixes], sums[: patches.prefixes], patches)
        _sum(dout, sums[patches.prefixes :], patches, _groups(keep, patches.count, of_image=False))
    return sums


def _groups(keep: Tensor, patches: int, of_image: bool) -> tuple[Tensor, Tensor]:
    """Kept tokens sorted by patch (and, with `of_image`, by image first), and where each patch's begin."""
    number = keep.clamp(0, patches - 1)
    groups = patches
    if of_image:
        number = number + torch.arange(0, len(keep) * patches, patches, device=keep.device).unsqueeze(1)
        groups = len(keep) * patches
    number, order = number.flatten().sort(stable=True)
    return order, torch.searchsorted(number, torch.arange(groups + 1, device=keep.device))


def _sum(dout: Tensor, sums: Tensor, patches: Patches, groups: tuple[Tensor, Tensor] | None = None) -> None:
    if sums.numel() == 0:
        return
    width = dout.shape[2]
    tile = configs.PATCH_EMBED_SUM.pick(capability(dout.device))
    order, starts = groups or (None, None)
    launch(
        sum_tokens,
        (cdiv(width, tile.columns) * (sums.numel() // width),),
        dout,
        order,
        starts,
        sums,
        dout.shape[0],
        patches.tokens,
        patches.prefixes,
        *dout.stride(),
        WIDTH=width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
