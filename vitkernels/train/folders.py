"""Which files of a folder are its images: by classes, behind links, each once; and what is said of the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# what Pillow reads, of kinds that hold pictures; of several frames the first counts
SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("apng", "avif", "bmp", "dib", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm"),
        *("pcx", "pgm", "png", "pnm", "ppm", "psd", "qoi", "sgi", "tga", "tif", "tiff", "webp"),
    )
)
HELD_OUT = ("val", "valid", "validation", "test")  # folders beside train/, the first that is there


def halves(folder: str | Path) -> tuple[Path, Path] | None:
    """The folders to train on and to test on of one that holds train/ and val/ (or test/); None for any other."""
    folder = Path(folder)
    if not (folder / "train").is_dir():
        return None
    names = {each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")}
    held_out = next((name for name in HELD_OUT if name in names), None)
    if held_out is None or not names <= {"train", *HELD_OUT}:
        return None
    return folder / "train", folder / held_out


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
                f"needs files that Pillow reads, such as .jpg or .png"
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
    return f"left out of {folder}: {', '.join(counts)}; needs files that Pillow reads, such as .jpg or .png"


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
