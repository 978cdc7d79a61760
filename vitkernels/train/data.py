"""Where images come from, and how they reach the training loop: folders, stored data sets, or scikit-learn's digits.

A sample's augmentation is a function of (seed, epoch, index) alone, and a batch is a list of such keys. So any worker
can make any sample, and a run that resumes in the middle of an epoch sees the very images that it would have seen.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from vitkernels.settings import TrainConfig, require_packages
from vitkernels.train import augment, stored
from vitkernels.train.folders import halves, scan
from vitkernels.train.stopping import SIGNALS

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
IGNORED = -100  # the label of an image that could not be read: cross_entropy's ignore_index
SPLIT_SEED = 0  # not the run's: runs of different seeds are tested on the same images

Key = tuple[int, int]  # epoch, index
View = Callable[["Image.Image", Random], "Image.Image"]


class Batch(NamedTuple):
    """Samples side by side; one that could not be read is black, labelled IGNORED, and has a sentence in errors."""

    images: Tensor  # [B, C, S, S] uint8
    labels: Tensor  # [B] int64
    errors: list[str]
    seconds: float  # that one process took to read and augment them


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
    """Images, by their paths, held in memory or read by a sequence, each through a view, as uint8 tensors."""

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
        epoch, index = key
        name = f"image {index}"
        try:
            image = self.images[index]
            if isinstance(image, str):
                name = image
                image = augment.read(image)
            view = self.view(image, Random(f"{self.seed} {epoch} {index}"))
        except Exception as error:  # a decoder that is fed garbage may raise anything
            return torch.zeros(self.shape, dtype=torch.uint8, device="cpu"), IGNORED, f"{name} ({error})"
        return augment.to_tensor(view), self.labels[index], None

    def __getitems__(self, keys: list[Key]) -> tuple[list[tuple[Tensor, int, str | None]], float]:
        """A batch's samples, and the seconds that they took."""
        start = time.perf_counter()
        return [self[key] for key in keys], time.perf_counter() - start


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
        ModuleNotFoundError: the library of a stored data set is not installed.
    """
    source = _digits(config) if config.data == DIGITS else _stored(config) or _folder(config)
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
    return batches, loader(source.train, config.workers, pin, batch_sampler=batches)


def held_out_loader(source: Source, config: TrainConfig, rank: int, size: int, pin: bool) -> DataLoader[Any] | None:
    """Every `size`-th test image, in order; None where nothing is held out."""
    if source.test is None:
        return None
    keys = [(0, index) for index in range(rank, len(source.test), size)]
    return loader(source.test, config.workers, pin, sampler=keys, batch_size=config.batch_size // size)


def loader(dataset: ImageSet, workers: int, pin: bool, **which: Any) -> DataLoader[Any]:
    """Batches of a data set; `which` says of which keys."""
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator("cpu"),  # else every epoch draws from torch's own, and a resumed one draws once more
        **which,
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and schedulers send signals to workers too; these end with the run, which takes its step to the end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(read: Any) -> Batch:
    """What `ImageSet.__getitems__` gave, side by side."""
    samples, seconds = read
    images, labels, errors = zip(*samples, strict=True)
    named = [error for error in errors if error is not None]
    return Batch(torch.stack(images), torch.tensor(labels, device="cpu"), named, seconds)


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


def _folder(config: TrainConfig) -> Source:
    data, val_data = Path(config.data), config.val_data
    found = halves(data) if data.is_dir() else None
    if found is not None:
        data, val_data = found[0], val_data or str(found[1])
    classes, paths, labels, notes = scan(data, "data")
    if val_data is None:
        train, test = _parts(paths, labels, config.val_split)
    else:
        test_classes, test_paths, test_labels, test_notes = scan(val_data, "val_data")
        train, test = (paths, labels), (test_paths, test_labels)
        notes += test_notes
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"train: argument 'val_data' got {str(val_data)!r}, whose classes are not those of {str(data)!r}; "
                f"needs the same class folders ({', '.join(odd[:5])} in one alone)"
            )
    return _source(config, classes, train, test, notes)


def _stored(config: TrainConfig) -> Source | None:
    """A data set that a library stored, or None."""
    found = stored.find(config.data, "data")
    if found is None:
        return None
    if "train" not in found:
        raise ValueError(f"train: argument 'data' got {config.data!r} with {', '.join(found)}; needs 'train'")
    name, held_out = stored.held_out(found)
    if config.val_data is not None:
        other = stored.find(config.val_data, "val_data")
        if other is None:
            raise ValueError(
                f"train: argument 'val_data' got {config.val_data!r}; needs a data set stored as that of 'data' is"
            )
        name, held_out = "", stored.held_out(other)[1]
    train: Any = found["train"]
    if name == "train":
        indices = split(train.labels, config.val_split)
        train, held_out = (train.part(each) for each in indices)
    elif held_out.classes != train.classes[: len(held_out.classes)]:
        raise ValueError("train: argument 'val_data' has other classes than 'data'; needs the same")
    pairs = [(each.images, each.labels) for each in (train, held_out)]
    return _source(config, train.classes, pairs[0], pairs[1], [])


def _parts(images: list[str], labels: list[int], share: float) -> list[tuple[list[str], list[int]]]:
    return [([images[i] for i in part], [labels[i] for i in part]) for part in split(labels, share)]


def _source(config: TrainConfig, classes: list[str], train: Any, test: Any, notes: list[str]) -> Source:
    """From images and labels, twice."""
    size = config.image_size
    if config.aug is None:
        training: View = functools.partial(augment.random_crop, size=size)
    else:
        training = augment.TimmView(config.aug, size)
    make: Any = functools.partial(ImageSet, shape=(3, size, size), seed=config.seed)
    return Source(
        name=Path(config.data).resolve().name,
        classes=classes,
        channels=3,
        # pixels as ImageNet's models have them
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        train=make(*train, training),
        test=make(*test, functools.partial(augment.centre_crop, size=size)) if len(test[0]) else None,
        notes=notes,
    )


def _digits(config: TrainConfig) -> Source:
    """scikit-learn's 1,797 scans of handwritten digits: 8 x 8 pixels of 0 to 16, scaled up bicubically."""
    require_packages({"sklearn": "scikit-learn"})
    from PIL import Image
    from sklearn.datasets import load_digits

    for name in ("val_data", "aug"):
        if getattr(config, name) is not None:
            raise ValueError(f"train: argument '{name}' is given with data='digits'; needs a folder of images")
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
