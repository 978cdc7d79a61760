"""What the trainer's tests share: a folder of images that can be learnt, and settings of a run that is done at once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from vitkernels.train import TrainConfig

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16",
    "model_args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "epochs": 2,
    "batch_size": 4,
    "lr": 3e-3,
    "workers": 0,
    "val_split": 0.25,
    "warmup_epochs": 0.5,
    "backend": "ext,reference",
}
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 30, 20)}
FORMATS = ("png", "jpg", "webp")


def make_images(folder: Path, each: int = 8) -> Path:
    """`folder`/COLOUR/NUMBER.FORMAT: small images in shades of the colour that their class is named after."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            shade = tuple(min(255, channel + 5 * number) for channel in colour)
            image = Image.new("RGB", (20 + number % 8, 20 + number % 5), shade)
            image.save(folder / name / f"{number}.{FORMATS[number % 3]}")
    return folder


def tiny(data: Path | str, out: Path | str, **changes: Any) -> TrainConfig:
    """Settings of a run that takes a fraction of a second."""
    return TrainConfig(**{**TINY, "data": str(data), "out": str(out), **changes})


def tiny_words(data: Path | str, out: Path | str, *more: str) -> list[str]:
    """The same settings for the command line; `more` comes last and so wins."""
    words = ["train", "--data", str(data), "--out", str(out)]
    for name, value in TINY.items():
        words.append(f"--{name.replace('_', '-')}")
        words += [f"{key}={each}" for key, each in value.items()] if name == "model_args" else [str(value)]
    return [*words, *more]


def silent() -> Console:
    """A console that nobody sees; what it shows is in `.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
