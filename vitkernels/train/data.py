"""Where images come from, and how they reach the training loop: folders of images, or scikit-learn's digit scans.

A sample's augmentation is a function of (seed, epoch, index) alone, and a batch is a list of such keys. So any worker
can make any sample, and a run that resumes in the middle of an epoch sees the very images that it would have seen.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from vitkernels.train import augment
from vitkernels.train.config import TrainConfig, require_packages

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IGNORED = -100  # the label of an image that could not be read: cross_entropy's ignore_index
SPLIT_SEED = 0  # not the run's: runs of different seeds are tested on the same images

Key = tuple[int, int]  # epoch, index
View = Callable[["Image.Image", Random], "Image.Image"]


class Batch(NamedTuple):
    """Samples side by side; one that could not be read is black, labelled IGNORED, and has a sentence in errors."""

    images: Tensor  # [B, C, S, S] uint8
    labels: Tensor  # [B] int64
    errors: list[str]


@dataclass(frozen=True)
class Source:
    """A data set as a run uses it. `test` is None where nothing is held out."""

    name: str
    classes: list[str]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: ImageSet
    test: ImageSet | None
    notes: list[str] = field(default_factory=list)  # what was found and not used, in sentences


class ImageSet(Dataset[tuple[Tensor, int, str | None]]):
    """Images, read from their files or held in memory, each through a view, as uint8 tensors."""

    def __init__(
        self,
        images: Sequence[str | Image.Image],
        labels: Sequence[int],
        view: View,
        *,
        shape: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.images, self.labels, self.view, self.shape, self.seed = images, labels, view, shape, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, str | None]:
        from PIL import Image

        epoch, index = key
        image = self.images[index]
        try:
            if isinstance(image, str):
                with Image.open(image) as file:
                    image = augment.upright(file)
            view = self.view(image, Random(f"{self.seed} {epoch} {index}"))
        except Exception as error:  # a decoder that is fed garbage may raise anything
            return torch.zeros(self.shape, dtype=torch.uint8, device="cpu"), IGNORED, f"{self.images[index]} ({error})"
        return augment.to_tensor(view), self.labels[index], None


class EpochBatches(Sampler[list[Key]]):
    """This process's keys for one epoch, batch by batch; set `epoch` and `start` (batches to leave out) first."""

    def __init__(self, sampler: DistributedSampler[int], batch: int) -> None:
        self.sampler, self.batch = sampler, batch
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.sampler) // self.batch - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        self.sampler.set_epoch(self.epoch)
        indices = list(self.sampler)
        for number in range(self.start, self.start + len(self)):
            yield [(self.epoch, index) for index in indices[number * self.batch : (number + 1) * self.batch]]


def open_source(config: TrainConfig) -> Source:
    """Find the images that a run trains on and is tested on.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: a folder without classes or images, or fewer images than a batch.
    """
    source = _digits(config) if config.data == DIGITS else _folder(config)
    if len(source.train) < config.batch_size:
        raise ValueError(
            f"train: argument 'batch_size' got {config.batch_size}; needs {len(source.train)} or less, "
            f"the number of training images in {config.data}"
        )
    return source


def train_loader(
    source: Source, config: TrainConfig, rank: int, size: int, pin: bool
) -> tuple[EpochBatches, DataLoader[Any]]:
    """Shuffled batches, config.batch_size over all processes, and the sampler that says which; a rest is left out."""
    sampler: DistributedSampler[int] = DistributedSampler(
        source.train, size, rank, shuffle=True, seed=config.seed, drop_last=True
    )
    batches = EpochBatches(sampler, config.batch_size // size)
    return batches, _loader(source.train, config, pin, batch_sampler=batches)


def held_out_loader(source: Source, config: TrainConfig, rank: int, size: int, pin: bool) -> DataLoader[Any] | None:
    """Every `size`-th test image, in order; None where nothing is held out."""
    if source.test is None:
        return None
    keys = [(0, index) for index in range(rank, len(source.test), size)]
    return _loader(source.test, config, pin, sampler=keys, batch_size=config.batch_size // size)


def _loader(dataset: ImageSet, config: TrainConfig, pin: bool, **which: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=pin,
        collate_fn=_collate,
        generator=torch.Generator("cpu"),  # else every epoch draws from torch's own, and a resumed one draws once more
        **which,
    )


def _collate(samples: list[tuple[Tensor, int, str | None]]) -> Batch:
    images, labels, errors = zip(*samples, strict=True)
    named = [error for error in errors if error is not None]
    return Batch(torch.stack(images), torch.tensor(labels, device="cpu"), named)


def split(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Indices to train on and to test on: `share` of every class with two images or more, and at least one of each."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    train: list[int] = []
    test: list[int] = []
    for label, members in of_class.items():
        Random(f"{SPLIT_SEED} {label}").shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1) if share else 0
        test += members[:count]
        train += members[count:]
    return sorted(train), sorted(test)


def scan(folder: str | Path, argument: str) -> tuple[list[str], list[str], list[int], list[str]]:
    """The classes of a folder (its subfolders, sorted), the paths of its images, their labels, and notes.

    Images lie in a class folder at any depth, behind links too. A note says what else lies there and is left out.

    Raises:
        FileNotFoundError, ValueError: as `open_source`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"train: argument '{argument}' got {str(folder)!r}, which is no folder")
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(
            f"train: argument '{argument}' got {str(folder)!r}, which holds {len(classes)} class folders; "
            "needs two or more, each with the images of one class"
        )
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found = []
        for path in _files(folder / name, others):
            kind = path.suffix.lower()
            if kind in SUFFIXES and path.is_file():
                found.append(path)
            else:
                others["link to nothing" if kind in SUFFIXES else kind or "file without a suffix"] += 1
        if not found:
            raise ValueError(
                f"train: argument '{argument}' got {str(folder)!r}, whose class folder {name!r} holds no image; "
                f"needs {', '.join(sorted(SUFFIXES))} files"
            )
        paths += map(str, sorted(found))
        labels += [label] * len(found)
    beside = sum(each.suffix.lower() in SUFFIXES and each.is_file() for each in folder.iterdir())
    if beside:
        others["image in no class folder"] = beside
    return classes, paths, labels, [_left_out(folder, others)] if others else []


def _left_out(folder: Path, others: Counter[str]) -> str:
    most = sorted(others.items(), key=lambda each: (-each[1], each[0]))
    counts = [f"{count} x {what}" for what, count in most[:6]]
    if most[6:]:
        counts.append(f"{sum(count for _, count in most[6:])} of other kinds")
    return f"left out of {folder}: {', '.join(counts)}; needs {', '.join(sorted(SUFFIXES))} files"


def _files(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Every file below a folder, once: links to folders are followed, after what is there without them.

    Args:
        folder: where.
        others: counts the folders that cannot be read.
    """

    def count(error: OSError) -> None:
        others["folder that cannot be read"] += 1

    # by what they are: links may lead in a circle, or up to where the other classes are
    seen = {_identity(each) for each in (*folder.absolute().parents, *folder.resolve().parents)}
    tops = [str(folder)]
    for top in tops:
        for here, folders, names in os.walk(top, onerror=count):
            identity = _identity(here)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            tops += [path for path in (os.path.join(here, name) for name in sorted(folders)) if os.path.islink(path)]
            yield from (Path(here, name) for name in names)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _folder(config: TrainConfig) -> Source:
    size = config.image_size
    views = functools.partial(augment.random_crop, size=size), functools.partial(augment.centre_crop, size=size)
    classes, paths, labels, notes = scan(config.data, "data")
    if config.val_data is None:
        train, test = split(labels, config.val_split)
        test_paths, test_labels = [paths[index] for index in test], [labels[index] for index in test]
        paths, labels = [paths[index] for index in train], [labels[index] for index in train]
    else:
        test_classes, test_paths, test_labels, test_notes = scan(config.val_data, "val_data")
        notes += test_notes
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"train: argument 'val_data' got {config.val_data!r}, whose classes are not those of {config.data!r}; "
                f"needs the same class folders ({', '.join(odd[:5])} in one alone)"
            )
    # pixels as ImageNet's models have them
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    make = functools.partial(ImageSet, shape=(3, size, size), seed=config.seed)
    return Source(
        name=Path(config.data).resolve().name,
        classes=classes,
        channels=3,
        mean=mean,
        std=std,
        train=make(paths, labels, views[0]),
        test=make(test_paths, test_labels, views[1]) if test_paths else None,
        notes=notes,
    )


def _digits(config: TrainConfig) -> Source:
    """scikit-learn's 1,797 scans of handwritten digits: 8 x 8 pixels of 0 to 16, scaled up bicubically."""
    require_packages({"sklearn": "scikit-learn"})
    from PIL import Image
    from sklearn.datasets import load_digits

    if config.val_data is not None:
        raise ValueError("train: argument 'val_data' is given with data='digits'; needs 'val_split' alone")
    scans = load_digits()
    size = config.image_size
    grey = (torch.from_numpy(scans.images) * (255 / 16)).round().to(torch.uint8)
    images = [augment.resize(Image.frombytes("L", (8, 8), bytes(each.flatten().tolist())), size) for each in grey]
    labels = scans.target.tolist()
    train, test = split(labels, config.val_split)

    def make(indices: list[int], view: View) -> ImageSet:
        chosen, their_labels = [images[index] for index in indices], [labels[index] for index in indices]
        return ImageSet(chosen, their_labels, view, shape=(1, size, size), seed=config.seed)

    return Source(
        name=DIGITS,
        classes=[str(name) for name in scans.target_names],
        channels=1,
        mean=(0.5,),
        std=(0.5,),
        train=make(train, functools.partial(augment.shake, degrees=10, zoom=0.1, shift=0.06)),
        test=make(test, augment.as_is) if test else None,
    )
