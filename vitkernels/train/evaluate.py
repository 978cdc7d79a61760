"""A trained model on images that it did not see: accuracy, top-5, calibration, and who is taken for whom."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitkernels.settings import require_packages, resume_config
from vitkernels.text import table
from vitkernels.train import augment, stored
from vitkernels.train.charts import write_chart
from vitkernels.train.checkpoint import write_json
from vitkernels.train.data import IGNORED, ImageSet, loader, open_source
from vitkernels.train.folders import halves, scan
from vitkernels.train.model import ModelSpec, load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

BINS = 15  # of confidence, in the calibration error (Guo et al. 2017)
NUMBERED = 20  # classes up to which the picture holds numbers


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; print it, or `write` it.

    Attributes:
        run: the run's folder.
        data: where the images are, the part that was held out.
        classes: their names.
        confusion: [classes, classes] int64, images by their class and by the one that they were taken for.
        top5: share of images whose class is among the five likeliest.
        calibration: expected calibration error: how far confidence and accuracy lie apart, weighted over 15 bins.
        skipped: images that could not be read.
        notes: what else was left out.
    """

    run: str
    data: str
    classes: list[str]
    confusion: Tensor
    top5: float
    calibration: float
    skipped: list[str]
    notes: list[str]

    @property
    def accuracy(self) -> float:
        return self.confusion.diagonal().sum().item() / max(int(self.confusion.sum()), 1)

    def to_dict(self) -> dict[str, Any]:
        """The same for programs, in plain Python values."""
        return {
            "run": self.run,
            "data": self.data,
            "images": int(self.confusion.sum()),
            "accuracy": self.accuracy,
            "top5": self.top5,
            "calibration_error": self.calibration,
            "classes": self.classes,
            "confusion": self.confusion.tolist(),
            "skipped": self.skipped,
        }

    def write(self, folder: Path) -> None:
        """eval.json and confusion.png into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "eval.json", self.to_dict())
        write_chart(folder / "confusion.png", self.picture())

    def __str__(self) -> str:
        wrong = self.confusion.clone().fill_diagonal_(0)
        most = wrong.flatten().argsort(descending=True, stable=True)[:3].tolist()
        pairs = [(index // len(self.classes), index % len(self.classes)) for index in most]
        taken = [f"{self.classes[a]} for {self.classes[b]} ({wrong[a, b]})" for a, b in pairs if wrong[a, b]]
        rows = [
            ("images", f"{int(self.confusion.sum()):,}"),
            ("accuracy", f"{self.accuracy:.2%}"),
            *([("accuracy, top 5", f"{self.top5:.2%}")] if len(self.classes) > 5 else []),
            ("calibration error", f"{self.calibration:.2%}"),
            ("taken most often", ", ".join(taken) or "nothing for another"),
            *([("skipped", f"{len(self.skipped)}, the first {self.skipped[0]}")] if self.skipped else []),
        ]
        return "\n".join([*self.notes, table(rows)])

    def picture(self) -> Figure:
        """The confusion as a square, each row as shares of its class."""
        from matplotlib.figure import Figure

        count = len(self.classes)
        side = min(4 + 0.35 * count, 14)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        shares = self.confusion / self.confusion.sum(1, keepdim=True).clamp(min=1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        step = -(-count // 40)
        places = list(range(0, count, step))
        names = [self.classes[place] for place in places]
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(places, names)
        axes.set(xlabel="taken for", ylabel="class", title=f"{self.data}: accuracy {self.accuracy:.2%}")
        if count <= NUMBERED:
            for row in range(count):
                for column in range(count):
                    if number := int(self.confusion[row, column]):
                        colour = "white" if shares[row, column] > 0.5 else "black"
                        axes.text(column, row, str(number), ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, label="share of the class", format=lambda share, place: f"{share:.0%}", shrink=0.8)
        return figure


@torch.no_grad()
def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    weights: str = "last",
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Test a run's model on a folder of images.

    Args:
        run: the run's folder.
        data: images as `train` takes them, their classes named as the run's are; of several parts, the one that is
            held out: val/ of train/ and val/. Of what the run was trained on, the images that it held out.
        weights: "last", "best" or "ema".
        batch_size: images at a time.
        workers: processes that decode.
        device: where.

    Raises:
        FileNotFoundError: no such run or folder.
        ValueError: a class that the run does not know, or no image that can be read.
    """
    require_packages()
    model, classes = load_model(run, weights)
    place, names, found, numbers, notes = _images(run, str(data))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(
            f"eval: argument 'data' got {place!r} with the class {unknown[0]!r}; needs those of the run: "
            f"{', '.join(classes[:10])}"
        )
    labels = [classes.index(names[number]) for number in numbers]
    spec = model.spec
    if isinstance(found, ImageSet) and names == classes:
        images = found  # seen as the run saw them
    else:
        files = found.images if isinstance(found, ImageSet) else found
        shape = (spec.channels, spec.image_size, spec.image_size)
        images = ImageSet(files, labels, functools.partial(view, spec=spec), shape=shape, seed=0)
    model.to(device)
    keys = [(0, index) for index in range(len(images))]
    logits, known, skipped = [], [], []
    for batch in loader(images, workers, torch.device(device).type == "cuda", sampler=keys, batch_size=batch_size):
        readable = batch.labels != IGNORED
        skipped += batch.errors
        logits.append(model(batch.images.to(device)).float().cpu()[readable])
        known.append(batch.labels[readable])
    answers, truth = torch.cat(logits), torch.cat(known)
    if not len(truth):
        raise ValueError(f"eval: none of {len(images)} images can be read, the first being {skipped[0]}")
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((truth, answers.argmax(-1)), torch.ones_like(truth), accumulate=True)
    five = answers.topk(min(5, len(classes))).indices
    return Evaluation(
        str(run),
        place,
        classes,
        confusion,
        (five == truth[:, None]).any(-1).double().mean().item(),
        calibration_error(answers.softmax(-1), truth),
        skipped,
        notes,
    )


Images = tuple[str, list[str], Sequence[Any] | ImageSet, Sequence[int], list[str]]


def _images(run: str | Path, data: str) -> Images:
    """Where the images that a run is tested on are, their classes, they, their labels, and notes."""
    parts = stored.find(data, "data")
    name, part = ("train", None) if parts is None else stored.held_out(parts)
    if part is not None and name != "train":
        return f"{data}/{name}", part.classes, part.images, part.labels, []
    found = halves(data) if part is None and Path(data).is_dir() else None
    if found is not None:
        return str(found[1]), *scan(found[1], "data")
    notes = []
    config = resume_config(str(run), aug=None)
    if data == config.data or Path(data).resolve() == Path(config.data).resolve():
        source = open_source(config) if config.val_data is None else None
        if source is not None and source.test is not None:
            of = len(source.train) + len(source.test)
            notes = [*source.notes, f"of {of:,} images in {data}, the {len(source.test):,} that the run held out"]
            return data, source.classes, source.test, source.test.labels, notes
        notes = [f"the run was trained on the images in {data}: it knows them"]
    if part is not None:
        return f"{data}/{name}", part.classes, part.images, part.labels, notes
    classes, paths, labels, left_out = scan(data, "data")
    return data, classes, paths, labels, [*left_out, *notes]


def view(image: Image.Image, rng: Any, *, spec: ModelSpec) -> Image.Image:
    """The square that a run's model is tested on."""
    image = augment.centre_crop(image, rng, size=spec.image_size)
    return image.convert("L") if spec.channels == 1 else image


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """How far the likeliest class's probability and its accuracy lie apart: the mean over bins, weighted by images."""
    confidence, answers = probabilities.double().max(-1)
    right = (answers == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return (gaps.abs().sum() / len(labels)).item()
