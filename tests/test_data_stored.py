"""Layouts and stores of images that others made: train/ and val/, tar shards, data sets of Hugging Face's."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from train_setup import COLOURS, make_images, silent, tiny

from vitkernels.train import augment, train
from vitkernels.train.data import open_source
from vitkernels.train.folders import halves


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", each=4)


# ----------------------------------------------------------------------------------------------------- train/ and val/


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_folder_of_train_and_val_is_two_halves(name: str, tmp_path: Path) -> None:
    make_images(tmp_path / "data/train", each=4)
    make_images(tmp_path / f"data/{name}", each=2)
    source = open_source(tiny(tmp_path / "data", tmp_path))
    assert source.classes == sorted(COLOURS), "not train and val"
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (12, 6)
    assert {Path(str(path)).parts[-3] for path in source.test.images} == {name}


def test_of_val_and_test_the_first_is_tested_on(tmp_path: Path) -> None:
    for name, each in (("train", 4), ("val", 2), ("test", 1)):
        make_images(tmp_path / "data" / name, each=each)
    config = tiny(tmp_path / "data", tmp_path)
    assert len(open_source(config).test or ()) == 6
    named = tiny(tmp_path / "data", tmp_path, val_data=str(tmp_path / "data/test"))
    assert len(open_source(named).test or ()) == 3, "what is named goes over it"


def test_classes_that_are_called_so_stay_classes(tmp_path: Path) -> None:
    for name in ("train", "val", "bus"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    assert halves(tmp_path / "data") is None
    assert open_source(tiny(tmp_path / "data", tmp_path, batch_size=3, val_split=0.0)).classes == [
        "bus",
        "train",
        "val",
    ]


# ------------------------------------------------------------------------------------------------------- odd files


def test_a_damaged_exif_block_does_not_lose_the_picture(folder: Path, tmp_path: Path) -> None:
    for place, kind in (("red/0.png", "PNG"), ("blue/1.jpg", "JPEG"), ("green/2.webp", "WEBP")):
        Image.new("RGB", (16, 16), COLOURS[place.split("/")[0]]).save(
            folder / place, kind, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xffdamaged"
        )
    source = open_source(tiny(folder, tmp_path, val_split=0.0))
    samples = [source.train[0, index] for index in range(len(source.train))]
    assert [error for _, _, error in samples if error] == []


def test_the_first_frame_of_several_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in COLOURS.values()]
    for name in ("a.gif", "a.tiff", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / name) as file:
            pixel = augment.upright(file).getpixel((4, 4))
        assert pixel == pytest.approx(COLOURS["blue"], abs=12), name


# ----------------------------------------------------------------------------------------------------------- shards


def _shards(folder: Path, out: Path) -> Path:
    """Two shards as webdataset writes them."""
    out.mkdir()
    samples = [
        (path, label) for label, name in enumerate(sorted(COLOURS)) for path in sorted((folder / name).iterdir())
    ]
    for shard in range(2):
        with tarfile.open(out / f"{shard:06}.tar", "w") as archive:
            for number, (path, label) in list(enumerate(samples))[shard::2]:
                for name, content in (
                    (f"{number:04}.cls", str(label).encode()),
                    (f"{number:04}{path.suffix}", path.read_bytes()),
                    (f"{number:04}.json", b"{}"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return out


def _pixels(source: Any) -> list[tuple[str, list[int]]]:
    samples = [source.train[0, index] for index in range(len(source.train))]
    assert not [error for _, _, error in samples if error]
    return [(source.classes[label], image[:, 8, 8].tolist()) for image, label, _ in samples]


def test_shards_are_read_by_index(folder: Path, tmp_path: Path) -> None:
    source = open_source(tiny(_shards(folder, tmp_path / "shards"), tmp_path, val_split=0.25))
    assert source.classes == ["0", "1", "2"]
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (9, 3)
    for name, pixel in _pixels(source):
        assert pixel == pytest.approx(COLOURS[sorted(COLOURS)[int(name)]], abs=60)
    for path in (tmp_path / "shards").iterdir():
        tarfile.open(path, "w").close()
    with pytest.raises(ValueError, match=r"needs a number in a \.cls file beside each image"):
        open_source(tiny(tmp_path / "shards", tmp_path))


def test_shards_that_webdataset_wrote(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    (tmp_path / "train").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "train/%03d.tar"), maxcount=5, verbose=0) as writer:
        for label, name in enumerate(sorted(COLOURS)):
            for path in sorted((folder / name).glob("*.jpg")) + sorted((folder / name).glob("*.png")):
                writer.write({"__key__": f"{name}/{path.stem}", path.suffix[1:]: path.read_bytes(), "cls": label})
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    source = open_source(tiny(tmp_path, tmp_path))
    assert source.test is not None
    assert len(source.train) == len(source.test) == 9
    result = train(tiny(tmp_path, tmp_path / "run", epochs=1, warmup_epochs=0.0, workers=2), silent())
    assert (result["test_images"], result["skipped"]) == (9, [])


# ---------------------------------------------------------------------------------------------- Hugging Face's datasets


def _stand_in(folder: Path, splits: tuple[str, ...]) -> ModuleType:
    """What the trainer uses of the library `datasets`: features by type, columns, and rows by index."""
    library = ModuleType("datasets")

    class Feature:
        def __init__(self, names: list[str] | None = None) -> None:
            self.names = names

    library.Image, library.ClassLabel = type("Image", (Feature,), {}), type("ClassLabel", (Feature,), {})

    rows = [(path, label) for label, name in enumerate(sorted(COLOURS)) for path in sorted((folder / name).iterdir())]

    class Data:
        def __init__(self) -> None:
            self.features = {"picture": library.Image(), "kind": library.ClassLabel(sorted(COLOURS)), "id": Feature()}

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, key: Any) -> Any:
            if key == "kind":
                return [label for _, label in rows]
            path, label = rows[key]
            return {"picture": Image.open(path), "kind": label, "id": key}

    library.load_from_disk = lambda path: {name: Data() for name in splits} if splits else Data()
    return library


@pytest.mark.parametrize(
    ("splits", "file", "counts"),
    [((), "state.json", (9, 3)), (("train", "validation"), "dataset_dict.json", (12, 12))],
    ids=["one split", "two"],
)
def test_a_data_set_of_hugging_faces(
    splits: tuple[str, ...],
    file: str,
    counts: tuple[int, int],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / file).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", _with_spec(_stand_in(folder, splits)))
    source = open_source(tiny(tmp_path / "stored", tmp_path))
    assert source.classes == sorted(COLOURS)
    assert (len(source.train), len(source.test or ())) == counts
    for name, pixel in _pixels(source):
        assert pixel == pytest.approx(COLOURS[name], abs=60)


def _with_spec(library: ModuleType) -> ModuleType:
    from importlib.machinery import ModuleSpec

    library.__spec__ = ModuleSpec(library.__name__, None)
    return library


def test_its_library_is_asked_for_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkernels import libraries

    (tmp_path / "stored").mkdir()
    (tmp_path / "stored/state.json").write_text("{}")
    find = libraries.importlib.util.find_spec
    monkeypatch.setattr(
        libraries.importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest)
    )
    with pytest.raises(
        ModuleNotFoundError, match="'data', a data set of Hugging Face's, needs datasets: pip install datasets"
    ):
        open_source(tiny(tmp_path / "stored", tmp_path))


def test_decoding_has_a_figure(folder: Path, tmp_path: Path) -> None:
    result = train(tiny(folder, tmp_path / "run", epochs=1, warmup_epochs=0.0, workers=1), silent())
    assert 0 < result["decoded_per_second"] < 1e6
    loaded = open_source(tiny(folder, tmp_path)).train.__getitems__([(0, 0), (0, 1)])
    assert len(loaded[0]) == 2
    assert 0 < loaded[1] < 10
    assert isinstance(loaded[0][0][0], torch.Tensor)
