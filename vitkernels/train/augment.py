"""From a decoded image to the square that the model sees: one `view` for training, one for testing, per source.

A view takes an image and a random.Random of the sample's own, so that it depends on nothing that ran before it.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from vitkernels.libraries import needed

if TYPE_CHECKING:
    from PIL import Image


def read(file: str | BinaryIO) -> Image.Image:
    """An image file, `upright`; what Pillow warns of in it (a damaged EXIF block) is no matter of its pixels.

    Raises:
        Exception: of any kind, where a decoder is fed garbage.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL", category=UserWarning)
        with Image.open(file) as image:
            return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Any mode that Pillow reads as RGB: turned as EXIF says, transparency laid on white, 16 bits cut to 8.

    Raises:
        ValueError: pixels in floating point, whose white nobody knows.
    """
    from PIL import Image, ImageOps

    with contextlib.suppress(Exception):  # a damaged EXIF block raises anything, and the pixels do without it
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; needs 8 or 16 bits")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def random_crop(image: Image.Image, rng: Random, *, size: int) -> Image.Image:
    """A random part of 8 to 100 % of the area and 3:4 to 4:3 in shape, resized, flipped half of the time.

    This is the augmentation of Szegedy et al. 2015, on which ImageNet training has rested since.
    """
    from PIL import ImageOps

    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
            box = (left, top, left + across, top + down)
            break
    flip = rng.random() < 0.5
    view = resize(image, size, box or _centre(image, 1.0))
    return ImageOps.mirror(view) if flip else view


def centre_crop(image: Image.Image, rng: Random, *, size: int) -> Image.Image:
    """The middle seven eighths of the image's largest square, resized."""
    return resize(image, size, _centre(image, 0.875))


def resize(image: Image.Image, size: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """The part of an image inside `box` (left, top, right, bottom), or all of it, as a square, bicubically."""
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def shake(image: Image.Image, rng: Random, *, degrees: float, zoom: float, shift: float) -> Image.Image:
    """A small rotation, zoom (a share of 1) and shift (a share of the width) about the centre; black comes in."""
    from PIL import Image

    width, height = image.size
    angle = math.radians(rng.uniform(-degrees, degrees))
    factor = 1 + rng.uniform(-zoom, zoom)
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    x, y = width / 2, height / 2
    dx, dy = rng.uniform(-shift, shift) * width, rng.uniform(-shift, shift) * height
    # Pillow's coefficients lead from a pixel of the result to its source
    affine = (cos, sin, x - cos * (x + dx) - sin * (y + dy), -sin, cos, y + sin * (x + dx) - cos * (y + dy))
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


def as_is(image: Image.Image, rng: Random) -> Image.Image:
    """The image itself: it has the model's size already."""
    return image


class TimmView:
    """timm's training transform, by its own augmentation string; drawn from the sample's generator.

    Args:
        policy: as `timm.data.create_transform` has `auto_augment`: "rand-m9-mstd0.5-inc1", "augmix-m5", "original".
        size: side of the result in pixels.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: a policy that timm does not know.
    """

    def __init__(self, policy: str, size: int) -> None:
        timm = needed("timm.data", "argument 'aug'")
        try:
            made = timm.create_transform(size, is_training=True, auto_augment=policy, use_prefetcher=True)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"train: argument 'aug' got {policy!r}, which timm does not take: {error}") from error
        self.steps = made.transforms[:-1]  # the last one makes an array

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        with drawing_from(rng):
            for step in self.steps:
                image = step(image)
        return image


@contextlib.contextmanager
def drawing_from(rng: Random) -> Iterator[None]:
    """Let the generators of Python, numpy and torch (on the CPU) draw from `rng` for a while."""
    import numpy as np

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(rng.getrandbits(64))
        np.random.seed(rng.getrandbits(32))
        torch.default_generator.manual_seed(rng.getrandbits(63))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def to_tensor(image: Image.Image) -> Tensor:
    """[C, H, W] uint8 of an "L" or "RGB" image."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def _centre(image: Image.Image, share: float) -> tuple[float, float, float, float]:
    side = min(image.size) * share
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side
