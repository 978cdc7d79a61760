"""What every ecosystem has: the convolution that cuts an image or a video into patches; blocks in an nn.Sequential."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.fuse.rules import Rule, match
from vitkernels.fuse.sequential import FusedSequential
from vitkernels.fuse.swap import Fused, PreNormBlock
from vitkernels.residual.genuine import name_of
from vitkernels.residual.stream import Part


class FusedPatchConv(Fused):
    """A Conv2d whose patches do not overlap, on `ops.patch_embed`.

    It returns what the convolution returns, [B, D, H / P, W / P], as a view of the tokens [B, N, D]: flattened and
    transposed, as every ViT does next, they are contiguous again without a copy. While a dropout of the model drops, it
    lies in memory as the convolution's: a dropout draws in that order.
    """

    lays_out = True
    follows = ("_conv_forward",)
    axes = 4

    def reader(self) -> object:
        return self

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        if self.declines(input, lambda: _why_not_patches(conv) or _why_not_image(conv, input)):
            return super().forward(input)
        height, width = conv.kernel_size
        with self.backend():
            tokens = ops.patch_embed(input, conv.weight, conv.bias)
        out = tokens.transpose(1, 2).unflatten(2, (input.shape[2] // height, input.shape[3] // width))
        return self.laid_out(input, out)

    def laid_out(self, image: Tensor, out: Tensor) -> Tensor:
        """The result in the convolution's order of memory where a dropout draws; in a compiled graph draws are its
        compiler's."""
        if not self.training or torch.compiler.is_compiling():
            return out
        drops = any(each.training and each.p for each in self._vitkernels.dropouts)
        kind = torch.channels_last if out.dim() == 4 else torch.channels_last_3d
        weight: Any = self.weight
        last = any(each.is_contiguous(memory_format=kind) and not each.is_contiguous() for each in (image, weight))
        return out.contiguous() if drops and not last else out

    def parts(self) -> list[Part]:
        return [Part("", "patch_embed", _why_not_patches(self))]


class FusedReduction(FusedPatchConv):
    """One that makes an image of features smaller, as wide as it is: the keys of PVT's attention and its relatives'."""

    loses_small = 1


class FusedVideoConv(FusedPatchConv):
    """A Conv3d whose patches do not overlap: its frames are channels of an image, and where there is one patch alone,
    as in towers that are handed patches, it is a Linear.

    It returns what the convolution returns, [B, D, T / P0, H / P1, W / P2], as a view of tokens.
    """

    axes = 5

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        if self.declines(input, lambda: _why_not_patches(conv) or _why_not_image(conv, input)):
            return super(FusedPatchConv, self).forward(input)
        counts = [size // side for size, side in zip(input.shape[2:], conv.kernel_size, strict=True)]
        with self.backend():
            if counts == [1, 1, 1]:
                return ops.linear(input.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]
            frames = input.unflatten(2, (counts[0], -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
            tokens = ops.patch_embed(frames, conv.weight.flatten(1, 2), conv.bias)
        out = tokens.unflatten(0, (-1, counts[0])).unflatten(2, counts[1:]).permute(0, 4, 1, 2, 3)
        return self.laid_out(input, out)


def _why_not_patches(conv: Any) -> str | None:
    """In what a convolution is more than a projection of patches side by side; None when it is one."""
    if conv.kernel_size != conv.stride or (conv.padding != "valid" and any(conv.padding)):
        return "its patches overlap or are padded"
    if conv.groups != 1 or any(each != 1 for each in conv.dilation):
        return "it is grouped or dilated"
    return None


def _why_not_image(conv: Any, image: Tensor) -> str | None:
    """Why these images go to the convolution itself, or None when they do not."""
    if image.dim() != conv.weight.dim() or image.shape[1] != conv.in_channels:
        return f"called with shape {list(image.shape)}"  # the convolution's own error is the one to see
    if any(size % side for size, side in zip(image.shape[2:], conv.kernel_size, strict=True)):
        return "called with an image that is no multiple of the patch"
    return None


def _is_patch_conv(conv: Any) -> str | None:
    # a ConvNet's stem has small patches, and wants its output in the convolution's layout
    return _why_not_patches(conv) or (None if min(conv.kernel_size[-2:]) >= 7 else "its patches are smaller than 7")


def _is_reduction(conv: Any) -> str | None:
    return _is_patch_conv(conv) or (None if conv.in_channels == conv.out_channels else "it changes the width")


def _why_not_blocks(sequential: Any) -> str | None:
    """None for two blocks or more, side by side, that can be run as one stream."""
    kinds = [match(each) for each in sequential]
    blocks = [
        kind is not None and kind.declined is None and issubclass(kind.rule.mixin, PreNormBlock) for kind in kinds
    ]
    neighbours = any(one and other for one, other in itertools.pairwise(blocks))
    return None if neighbours else "it holds no blocks side by side"


SEQUENTIAL = Rule(FusedSequential, frozenset({name_of(nn.Sequential)}), _why_not_blocks, is_common=True)
RULES = (
    Rule(FusedReduction, frozenset({name_of(nn.Conv2d)}), _is_reduction, is_common=True),
    Rule(FusedPatchConv, frozenset({name_of(nn.Conv2d)}), _is_patch_conv),
    Rule(FusedVideoConv, frozenset({name_of(nn.Conv3d)}), _is_patch_conv),
    SEQUENTIAL,
)
