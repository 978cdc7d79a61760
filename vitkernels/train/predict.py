"""What a trained model sees in images: the likeliest classes, and where its attention comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from vitkernels.settings import require_packages
from vitkernels.text import table
from vitkernels.train import augment
from vitkernels.train.charts import write_chart
from vitkernels.train.evaluate import view
from vitkernels.train.model import Trained, load_model
from vitkernels.train.rollout import rollout


@dataclass(frozen=True)
class Predictions:
    """The likeliest classes of each image, first the likeliest: {path: [(class, probability), ...]}."""

    images: dict[str, list[tuple[str, float]]]

    def to_json(self) -> str:
        rows = [
            {"image": path, "classes": [{"class": name, "probability": share} for name, share in found]}
            for path, found in self.images.items()
        ]
        return json.dumps(rows, indent=2)

    def __str__(self) -> str:
        shown = []
        for path, found in self.images.items():
            shown.append(f"{path}\n{table([(f'  {share:7.2%}', name) for name, share in found])}")
        return "\n".join(shown)


@torch.no_grad()
def predict(
    run: str | Path,
    images: list[str],
    *,
    weights: str = "last",
    top: int = 5,
    device: torch.device | str = "cpu",
    rollout: str | None = None,
) -> Predictions:
    """Classify image files with a run's model.

    Args:
        run: the run's folder.
        images: paths.
        weights: "last", "best" or "ema".
        top: how many classes to name.
        device: where.
        rollout: file for a picture of where the attention comes from.

    Raises:
        FileNotFoundError: no such run or image.
        ValueError: an image that cannot be read, or a model whose attention cannot be rolled out.
    """
    require_packages()
    model, classes = load_model(run, weights)
    model.to(device)
    pixels = [_read(path, model) for path in images]
    found = {}
    for path, image in zip(images, pixels, strict=True):
        shares = model(image.to(device)[None]).float().softmax(-1)[0].cpu()
        best = shares.topk(min(top, len(classes)))
        found[path] = [(classes[index], share) for share, index in zip(*map(Tensor.tolist, best), strict=True)]
    if rollout is not None:
        _draw(Path(rollout), model, pixels, found)
    return Predictions(found)


def _read(path: str, model: Trained) -> Tensor:
    if not Path(path).is_file():
        raise FileNotFoundError(f"predict: argument 'images' got {path!r}, which is no file")
    try:
        image = augment.read(path)
    except Exception as error:  # a decoder that is fed garbage may raise anything
        raise ValueError(f"predict: argument 'images' got {path!r}, which cannot be read: {error}") from error
    return augment.to_tensor(view(image, Random(0), spec=model.spec))


def _draw(path: Path, model: Trained, pixels: list[Tensor], found: dict[str, list[tuple[str, float]]]) -> None:
    """Each image beside the same one under its attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2 * len(pixels)), layout="constrained")
    rows: Any = figure.subplots(len(pixels), 2, squeeze=False)
    for (left, right), image, (name, classes) in zip(rows, pixels, found.items(), strict=True):
        heat = rollout(model, image)
        shown = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        left.imshow(shown)
        left.set_title(Path(name).name, fontsize=9)
        right.imshow(shown)
        size = image.shape[1]
        right.imshow(
            heat / heat.max(),
            cmap="inferno",
            alpha=0.6,
            extent=(-0.5, size - 0.5, size - 0.5, -0.5),
            interpolation="bicubic",
        )
        right.set_title(f"{classes[0][0]} {classes[0][1]:.1%}: attention", fontsize=9)
        for axes in (left, right):
            axes.set_axis_off()
    write_chart(path, figure)
