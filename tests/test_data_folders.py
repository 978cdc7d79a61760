"""Which files of a folder are its images: every format, behind links, each once; and what is said of the others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_setup import COLOURS, make_images, silent, tiny

from vitkernels.train import augment, train
from vitkernels.train.data import open_source
from vitkernels.train.folders import SUFFIXES, scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", each=3)


def _images_of(folder: Path, name: str) -> list[str]:
    """The images of a class, by their paths below the folder."""
    classes, paths, labels, _ = scan(folder, "data")
    return [
        str(Path(path).relative_to(folder))
        for path, label in zip(paths, labels, strict=True)
        if label == classes.index(name)
    ]


def _note(folder: Path) -> str:
    (note,) = scan(folder, "data")[3]
    return note


@pytest.mark.parametrize("suffix", [*sorted(SUFFIXES - {".apng", ".psd"}), ".TIF"])  # those Pillow writes by name
def test_every_format_is_found_and_read(suffix: str, folder: Path, tmp_path: Path) -> None:
    Image.new("L" if suffix == ".pgm" else "RGB", (9, 7), 200).save(folder / "red" / f"more{suffix}")
    source = open_source(tiny(folder, tmp_path, val_split=0.0))
    assert len(source.train) == 10
    assert not source.notes
    (index,) = (index for index, path in enumerate(source.train.images) if str(path).endswith(f"more{suffix}"))
    image, label, error = source.train[0, index]
    assert (error, source.classes[label]) == (None, "red")
    assert image.any()


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_either_byte_order(order: str, tmp_path: Path) -> None:
    pixels = torch.full((64,), 90 * 256, dtype=torch.int16).numpy().astype(f"{order}u2").tobytes()
    Image.frombytes("I;16" if order == "<" else "I;16B", (8, 8), pixels).save(tmp_path / "grey.tif")
    with Image.open(tmp_path / "grey.tif") as file:
        assert augment.upright(file).getpixel((4, 4)) == (90, 90, 90)


def test_pixels_in_floating_point_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(folder / "red" / "depth.tif")
    source = open_source(tiny(folder, tmp_path, val_split=0.0))
    errors = [error for _, _, error in (source.train[0, index] for index in range(len(source.train))) if error]
    assert len(errors) == 1
    assert "depth.tif (its pixels are floating-point numbers; needs 8 or 16 bits)" in errors[0]


# ------------------------------------------------------------------------------------------------------------ links


def test_images_behind_links_at_any_depth(folder: Path, tmp_path: Path) -> None:
    for place in ("disk2/a", "disk3/b/c"):
        shutil.copytree(folder / "red", tmp_path / place)
    (folder / "red/deep").mkdir()
    os.symlink(tmp_path / "disk2", folder / "red/deep/more")
    os.symlink(tmp_path / "disk3", tmp_path / "disk2/a/further")
    os.symlink(folder / "blue/0.png", folder / "red/file.png")
    names = _images_of(folder, "red")
    own = ["0.png", "1.jpg", "2.webp"]
    assert names == [
        *(f"red/{name}" for name in own),
        *(f"red/deep/more/a/{name}" for name in own),
        *(f"red/deep/more/a/further/b/c/{name}" for name in own),
        "red/file.png",
    ]
    assert len(_images_of(folder, "blue")) == 3


def test_all_images_of_a_class_behind_links(folder: Path, tmp_path: Path) -> None:
    (folder / "red").rename(tmp_path / "disk2")
    (folder / "red").mkdir()
    os.symlink(tmp_path / "disk2", folder / "red" / "more")
    assert _images_of(folder, "red") == ["red/more/0.png", "red/more/1.jpg", "red/more/2.webp"]


def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "red/deep").mkdir()
    shutil.copy(folder / "red/0.png", folder / "red/deep/3.png")
    without = _images_of(folder, "red")
    for target, link in (
        ("red", "red/itself"),
        ("red", "red/deep/back"),
        ("red/deep", "red/a_name_that_sorts_before_deep"),
        (".", "red/all_classes"),
        ("..", "red/deep/further_up"),
    ):
        os.symlink(folder / target, folder / link)
    assert _images_of(folder, "red") == without, "each image once, under the name that it has without links"
    os.symlink(folder / "red/link", folder / "red/link")
    assert _images_of(folder, "red") == without


def test_a_class_that_is_a_link_does_not_lead_to_the_others(folder: Path, tmp_path: Path) -> None:
    (folder / "red").rename(tmp_path / "red")
    os.symlink(tmp_path / "red", folder / "red")
    os.symlink(folder, tmp_path / "red" / "all_classes")
    assert len(_images_of(folder, "red")) == 3


def test_the_order_without_links_is_that_of_the_paths(folder: Path) -> None:
    """A run that is resumed finds its images by their numbers."""
    for name in ("a.b/1.png", "a/2.png", "a-b/3.png", "B/4.png"):
        (folder / "red" / name).parent.mkdir()
        shutil.copy(folder / "red/0.png", folder / "red" / name)
    paths = [folder / name for name in _images_of(folder, "red")]
    assert paths == sorted(path for path in (folder / "red").rglob("*") if path.is_file())
    assert len(paths) == 7


# ------------------------------------------------------------------------------------------------ what is left out


def test_what_is_left_out_is_counted(folder: Path) -> None:
    for name in ("red/a.svg", "blue/b.svg", "blue/deep/c.SVG", "green/notes.txt", "green/README"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("something")
    (folder / "notes.txt").write_text("no class has it")
    shutil.copy(folder / "red/0.png", folder / "lost.png")
    os.symlink(folder / "nowhere.png", folder / "red/gone.png")
    assert _note(folder) == (
        f"left out of {folder}: 3 x .svg, 1 x .txt, 1 x file without a suffix, 1 x image in no class folder, "
        "1 x link to nothing; needs files that Pillow reads, such as .jpg or .png"
    )
    assert len(scan(folder, "data")[1]) == 9


def test_many_kinds_are_summed_up(folder: Path) -> None:
    for number in range(20):
        (folder / "red" / f"scan.{number:03}").write_text("something")
    assert "14 of other kinds; needs " in _note(folder)


def test_a_folder_that_cannot_be_read_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "red/locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "1 x folder that cannot be read; needs " in _note(folder)


def test_a_run_says_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    held_out = make_images(tmp_path / "held_out", each=1)
    (folder / "red/a.svg").write_text("something")
    (held_out / "blue/notes.txt").write_text("something")
    console = silent()
    train(tiny(folder, tmp_path / "run", epochs=1, warmup_epochs=0.0, val_data=str(held_out)), console)
    shown = console.file.getvalue()
    assert f"left out of {folder}: 1 x .svg; needs files that Pillow reads" in shown
    assert f"left out of {held_out}: 1 x .txt; needs files that Pillow reads" in shown


def test_a_folder_of_images_alone_is_not_talked_about(folder: Path) -> None:
    assert scan(folder, "data")[3] == []
    assert scan(folder, "data")[0] == sorted(COLOURS)
