"""Data sets that a library stored: Hugging Face's `datasets` on a disk, and webdataset's tar shards.

Both are read by index, so that order, augmentation and resuming are those of folders: a data set of Hugging Face's by
its library, a shard by where its files lie in the archive.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkernels.libraries import needed
from vitkernels.train import augment
from vitkernels.train.folders import HELD_OUT, SUFFIXES

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Stored:
    """One split: its images, read one at a time, their labels, and the names of the classes."""

    images: Sequence[Image.Image]
    labels: list[int]
    classes: list[str]

    def part(self, indices: list[int]) -> Stored:
        """Those of these indices."""
        return Stored(Some(self.images, indices), [self.labels[index] for index in indices], self.classes)


class Some(Sequence[Any]):
    """Some of a sequence, by their indices."""

    def __init__(self, whole: Sequence[Any], indices: list[int]) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[self.indices[index]]


class Column(Sequence[Any]):
    """The images of a data set that answers `data[index]` with a dictionary."""

    def __init__(self, data: Any, key: str) -> None:
        self.data, self.key = data, key

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return augment.upright(self.data[index][self.key])


class Places(Sequence[Any]):
    """Images by the files, offsets and sizes at which they lie in archives."""

    def __init__(self, places: list[tuple[str, int, int]]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        path, offset, size = self.places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return augment.read(io.BytesIO(file.read(size)))


def find(path: str, argument: str) -> dict[str, Stored] | None:
    """The splits of a stored data set by their names, "train" where it has no parts; None for any other folder.

    Raises:
        ModuleNotFoundError: its library is not installed.
        ValueError: it has no images with labels, or cannot be read.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _hugging_face(folder, argument)
    if folder.is_dir() and any(folder.glob("*.tar")):
        return {"train": _shards(sorted(folder.glob("*.tar")), argument)}
    splits = {name: sorted((folder / name).glob("*.tar")) for name in ("train", *HELD_OUT)}
    return {name: _shards(shards, argument) for name, shards in splits.items() if shards} or None


def held_out(splits: Mapping[str, Stored]) -> tuple[str, Stored]:
    """The name and the images of the split to test on: the first of those that folders may have, or of all."""
    return next((name, splits[name]) for name in (*HELD_OUT, *splits) if name in splits)


def _hugging_face(folder: Path, argument: str) -> dict[str, Stored]:
    datasets = needed("datasets", f"argument '{argument}', a data set of Hugging Face's,")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # a file that is missing or damaged raises a dozen types
        raise ValueError(
            f"train: argument '{argument}' got {str(folder)!r}, which `datasets` cannot load: {error}"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    found = {}
    for name, data in splits.items():
        image = [key for key, feature in data.features.items() if isinstance(feature, datasets.Image)]
        label = [key for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        if not image or not label:
            raise ValueError(
                f"train: argument '{argument}' got {str(folder)!r} with the columns {', '.join(data.features)}; needs "
                "one of type Image and one of type ClassLabel"
            )
        found[name] = Stored(Column(data, image[0]), list(data[label[0]]), list(data.features[label[0]].names))
    return found


def _shards(paths: list[Path], argument: str) -> Stored:
    """Shards of files that go together by name: an image, and its label's number in a .cls."""
    places: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for path in paths:
        images: dict[str, tuple[str, int, int]] = {}
        numbers: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as archive:  # not compressed: files are read by where they lie
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if kind == "cls":
                        numbers[f"{folder}/{stem}"] = int(archive.extractfile(member).read())  # type: ignore[union-attr]
                    elif f".{kind.lower()}" in SUFFIXES:
                        images[f"{folder}/{stem}"] = (str(path.resolve()), member.offset_data, member.size)
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(
                f"train: argument '{argument}' got the shard {str(path)!r}, which cannot be read: {error}; needs a tar "
                "archive that is not compressed, and whole numbers as labels"
            ) from error
        whole = [key for key in images if key in numbers]
        places += [images[key] for key in whole]
        labels += [numbers[key] for key in whole]
    if not labels:
        raise ValueError(
            f"train: argument '{argument}' got shards without labels; needs a number in a .cls file beside each image"
        )
    return Stored(Places(places), labels, [str(label) for label in range(max(labels) + 1)])
