"""Tokens of an image laid out as windows (Swin, Liu et al. 2021), and back.

Each way is one copy, and one more for each side along which windows are shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def to_windows(image: Tensor, size: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """[B, H, W, D], padded with zeros to whole windows of h x w, to [B * R * C, h * w, D] and (R, C)."""
    down, right = (-side % length for side, length in zip(image.shape[1:3], size, strict=True))
    if down or right:
        image = F.pad(image, (0, 0, 0, right, 0, down))
    rows, columns = image.shape[1] // size[0], image.shape[2] // size[1]
    batch, width = image.shape[0], image.shape[-1]
    windows = image.reshape(batch, rows, size[0], columns, size[1], width).transpose(2, 3)
    return windows.reshape(batch * rows * columns, size[0] * size[1], width), (rows, columns)


def from_windows(windows: Tensor, size: Sequence[int], counts: tuple[int, int], sides: Sequence[int]) -> Tensor:
    """The way back, to an image of this height and width."""
    (rows, columns), (down, right), width = counts, size, windows.shape[-1]
    batch = windows.shape[0] // (rows * columns)
    image = windows.reshape(batch, rows, columns, down, right, width).transpose(2, 3)
    image = image.reshape(batch, rows * down, columns * right, width)
    return image if tuple(sides) == tuple(image.shape[1:3]) else image[:, : sides[0], : sides[1]]


class Windows(NamedTuple):
    """Whole windows of an image.

    Attributes:
        sides: height and width of the image, in tokens; multiples of the size.
        size: height and width of a window.
        shift: how many tokens further down and right the windows begin; those at the far edges go on at the near ones.
    """

    sides: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def whole(self) -> bool:
        """Whether the image is made of such windows."""
        return all(side and side % length == 0 for side, length in zip(self.sides, self.size, strict=True))

    @property
    def per_image(self) -> int:
        """How many an image has."""
        return self.sides[0] // self.size[0] * (self.sides[1] // self.size[1])

    @property
    def tokens(self) -> int:
        """How many a window has."""
        return self.size[0] * self.size[1]

    def check(self, x: Tensor) -> None:
        """Raise where tokens are not those of such an image."""
        if not self.whole:
            raise ValueError(
                f"attention: argument 'windows' has a size of {list(self.size)}; needs divisors of the image's sides, "
                f"{list(self.sides)}"
            )
        if tuple(x.shape[1:-1]) not in (self.sides, (math.prod(self.sides),)):
            raise ValueError(
                f"attention: argument 'x' has shape {list(x.shape)}; needs [B, H, W, D] or [B, H * W, D], "
                f"H and W {list(self.sides)} (the windows' sides)"
            )

    def made(self, x: Tensor) -> Tensor:
        """[B, ..., D], whose axes between are the image's or its tokens row by row, to [B * per_image, tokens, D]."""
        image = x if x.dim() == 4 else x.reshape(x.shape[0], *self.sides, x.shape[-1])
        if any(self.shift):
            image = torch.roll(image, [-each for each in self.shift], (1, 2))
        return to_windows(image, self.size)[0]

    def undone(self, windows: Tensor, shape: torch.Size) -> Tensor:
        """The way back, to tokens of this shape."""
        counts = self.sides[0] // self.size[0], self.sides[1] // self.size[1]
        image = from_windows(windows, self.size, counts, self.sides)
        if any(self.shift):
            image = torch.roll(image, self.shift, (1, 2))
        return image if len(shape) == 4 else image.reshape(shape)
