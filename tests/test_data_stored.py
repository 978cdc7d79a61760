"""Layouts and stores of images that others made: train/ and val/, tar shards, data sets of Hugging Face's."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from train_setup import COLOURS, make_images, silent, tiny

from vitkernels.train import augment, train
from vitkernels.train.data import open_source
from vitkernels.train.evaluate import evaluate
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
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        samples = [source.train[0, index] for index in range(len(source.train))]
    assert [error for _, _, error in samples if error] == []
    assert [str(each.message) for each in warned] == []


def test_the_first_frame_of_several_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in COLOURS.values()]
    for name in ("a.gif", "a.tiff", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / name) as file:
            pixel = augment.upright(file).getpixel((4, 4))
        assert pixel == pytest.approx(COLOURS["blue"], abs=12), name


# ----------------------------------------------------------------------------------------------------------- shards


def _shards(folder: Path, out: Path, classes: Sequence[str] = sorted(COLOURS)) -> Path:
    """Two shards as webdataset writes them."""
    out.mkdir()
    samples = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
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


def test_shards_that_lack_the_last_class_are_tested_on(folder: Path, tmp_path: Path) -> None:
    _shards(folder, tmp_path / "train")
    shutil.rmtree(folder / "red")
    _shards(folder, tmp_path / "val", sorted(COLOURS)[:2])
    source = open_source(tiny(tmp_path, tmp_path))
    assert source.classes == ["0", "1", "2"]
    assert sorted(source.test.labels) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("content", "says"), [(b"damaged", "a tar archive that is not comp"), (None, "whole numbers as labels")]
)
def test_a_shard_that_cannot_be_read_is_named(content: bytes | None, says: str, folder: Path, tmp_path: Path) -> None:
    shards = _shards(folder, tmp_path / "shards")
    path = shards / "000001.tar"
    if content is None:
        label = tarfile.TarInfo("0.cls")
        label.size = 4
        with tarfile.open(path, "w") as archive:
            archive.addfile(label, io.BytesIO(b"bird"))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'data' got the shard '{path}', which cannot be read: .*{says}"):
        open_source(tiny(shards, tmp_path))


# ---------------------------------------------------------------------------------------------- Hugging Face's datasets

CLASSES = sorted(COLOURS)
Rows = list[tuple[Path, int]]


def _stand_in(rows: Rows, splits: tuple[str, ...], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """What the trainer uses of the library `datasets`: features by type, columns, and rows by index."""
    library = ModuleType("datasets")
    library.__spec__ = ModuleSpec("datasets", None)

    class Feature:
        def __init__(self, names: list[str] | None = None) -> None:
            self.names = names

    class Data(list[tuple[Path, int]]):
        features: ClassVar[dict[str, Any]] = {}

        def __getitem__(self, key: Any) -> Any:
            if key == "kind":
                return [label for _, label in self]
            path, label = super().__getitem__(key)
            return {"picture": Image.open(path), "kind": label, "id": key}

    library.Image, library.ClassLabel = type("Image", (Feature,), {}), type("ClassLabel", (Feature,), {})
    Data.features = {"picture": library.Image(), "kind": library.ClassLabel(CLASSES), "id": Feature()}
    parts = {name: Data(rows[at::4] if at else rows) for at, name in enumerate(splits)}
    library.load_from_disk = lambda path: parts or Data(rows)
    folder.mkdir()
    (folder / ("dataset_dict.json" if splits else "state.json")).write_text("{}")
    patch.setitem(sys.modules, "datasets", library)


def _stored_by_it(rows: Rows, splits: tuple[str, ...], folder: Path, patch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})

    def made(part: Rows) -> Any:
        pictures, kinds = [str(path) for path, _ in part], [label for _, label in part]
        return datasets.Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features)

    parts = {name: made(rows[at::4] if at else rows) for at, name in enumerate(splits)}
    (datasets.DatasetDict(parts) if parts else made(rows)).save_to_disk(folder)


LIBRARIES = pytest.mark.parametrize("store", [_stand_in, _stored_by_it], ids=["stand-in", "datasets"])


def _rows(folder: Path) -> Rows:
    return [(path, label) for label, name in enumerate(CLASSES) for path in sorted((folder / name).iterdir())]


@LIBRARIES
@pytest.mark.parametrize(
    ("splits", "counts"),
    [((), (9, 3)), (("train",), (9, 3)), (("train", "validation", "test"), (12, 3)), (("train", "test"), (12, 3))],
    ids=["no parts", "train", "three", "train and test"],
)
def test_a_data_set_of_hugging_faces(
    splits: tuple[str, ...],
    counts: tuple[int, int],
    store: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store(_rows(folder), splits, tmp_path / "stored", monkeypatch)
    source = open_source(tiny(tmp_path / "stored", tmp_path))
    assert source.classes == CLASSES
    assert (len(source.train), len(source.test or ())) == counts
    for name, pixel in _pixels(source):
        assert pixel == pytest.approx(COLOURS[name], abs=60)


@LIBRARIES
def test_its_held_out_part_is_tested_on(
    store: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by --val, and by eval, too."""
    stored = tmp_path / "stored"
    store(_rows(folder), ("train", "test"), stored, monkeypatch)
    config = tiny(stored, tmp_path / "run", epochs=1, warmup_epochs=0.0, val_data=str(stored), workers=1)
    assert train(config, silent())["test_images"] == 3
    found = evaluate(tmp_path / "run", stored, workers=0)
    assert (int(found.confusion.sum()), found.data) == (3, f"{stored}/test")


def test_without_a_part_to_train_on_it_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(_rows(folder), ("test",), tmp_path / "stored", monkeypatch)
    with pytest.raises(ValueError, match=r"argument 'data' got '.*stored' with test; needs 'train'"):
        open_source(tiny(tmp_path / "stored", tmp_path))


def test_what_it_cannot_load_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(_rows(folder), (), tmp_path / "stored", monkeypatch)
    monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", lambda path: {}["_data_files"])
    with pytest.raises(ValueError, match="stored', which `datasets` cannot load: '_data_files'"):
        open_source(tiny(tmp_path / "stored", tmp_path))


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
