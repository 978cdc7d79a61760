"""Image to tokens as a module on `ops.patch_embed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.nn import _check
from vitkernels.residual import parts


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each one to a token.

    Args:
        img_size: the usual image size in pixels, int or (height, width), a multiple of patch_size: `grid_size` and
            `num_patches` are of it. Images of other multiples work as well. None: no usual size.
        patch_size: P, int or (height, width).
        in_chans: C, the channels of the image.
        embed_dim: D, the width of the tokens.
        bias: whether the projection has one.
        mean, std: C numbers each, in [0, 1] pixel units; pixels become (pixel - mean) / std on their way in.

    Raises:
        ValueError: sizes below 1, an img_size that is no multiple of patch_size, mean or std that do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        owner = "PatchEmbed"
        in_chans, embed_dim = _check.positive(owner, in_chans=in_chans, embed_dim=embed_dim)
        self.patch_size = _check.pair(owner, "patch_size", patch_size)
        self.img_size = None if img_size is None else _check.pair(owner, "img_size", img_size)
        if self.img_size is not None:
            for size, side in zip(self.img_size, self.patch_size, strict=True):
                _check.divisible(owner, "img_size", size, "patch_size", side)
            self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
            self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.mean = _per_channel("mean", mean, in_chans)
        self.std = _per_channel("std", std, in_chans)
        if self.std is not None and 0.0 in self.std:
            raise ValueError(f"{owner}: argument 'std' is {self.std}; needs numbers other than 0")
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias)

    def forward(
        self,
        image: Tensor,
        prefix: Tensor | None = None,
        pos_embed: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Turn a batch of images into tokens.

        Args:
            image: [B, C, H, W], floating point or uint8 (scaled to [0, 1] first).
            prefix: [R, D], tokens put before the patches.
            pos_embed: [R + N, D], or [N, D] for the patches alone.
            keep: [B, M] int64, the patches of each image to read, by row-major index; the others are left out.

        Returns:
            [B, R + N, D]; with keep, [B, R + M, D].
        """
        if parts.why_not_part("", self.proj, nn.Conv2d) is None:
            return ops.patch_embed(
                image,
                self.proj.weight,
                self.proj.bias,
                mean=self.mean,
                std=self.std,
                prefix=prefix,
                pos_embed=pos_embed,
                keep=keep,
            )
        tokens = self.proj(self._pixels(image)).flatten(2).transpose(1, 2)
        return place(tokens, prefix, pos_embed, keep)

    def _pixels(self, image: Tensor) -> Tensor:
        """What the projection multiplies, for one that is a module of its own."""
        weight = next(self.proj.parameters(), image.new_empty(0, dtype=torch.float32))
        pixels = image.to(torch.promote_types(weight.dtype, torch.float32))
        if image.dtype == torch.uint8:
            pixels = pixels / 255
        if self.mean is not None:
            pixels = pixels - pixels.new_tensor(self.mean).view(-1, 1, 1)
        if self.std is not None:
            pixels = pixels / pixels.new_tensor(self.std).view(-1, 1, 1)
        return pixels.to(weight.dtype)


def place(tokens: Tensor, prefix: Tensor | None, pos_embed: Tensor | None, keep: Tensor | None = None) -> Tensor:
    """Prefix tokens [R, D] before the patches' [B, N, D], and the position table ([R + N, D] or [N, D]) on them; of the
    patches, those in keep, [B, M], alone."""
    if pos_embed is not None:
        prefixes = len(pos_embed) - tokens.shape[1]
        tokens = tokens + pos_embed[prefixes:]
        prefix = prefix if prefix is None or not prefixes else prefix + pos_embed[:prefixes]
    if keep is not None:
        tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    return tokens if prefix is None else torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != channels:
        raise ValueError(f"PatchEmbed: argument '{name}' has {len(numbers)} numbers; needs {channels}, one a channel")
    return numbers
