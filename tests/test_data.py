"""Images on their way to the model: every kind of file, every view, batches that depend on their key alone."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from train_setup import COLOURS, make_images, tiny

from vitkernels.train import augment
from vitkernels.train.data import IGNORED, Batch, held_out_loader, open_source, split, train_loader

ORANGE = (250, 120, 10)


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def _rotated(path: Path) -> Path:
    """Left half orange, right half black, stored turned: EXIF says to turn it back by 90 degrees."""
    image = Image.new("RGB", (32, 16), ORANGE)
    image.paste((0, 0, 0), (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it 90 degrees clockwise
    return _save(path, image, exif=exif, quality=95)


def _palette(path: Path) -> Path:
    """One colour of the palette is transparent."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    image.paste(0, (0, 0, 8, 16))
    return _save(path, image, transparency=0)


# file name -> how it is made, the colour of its left and of its right half once upright
KINDS = {
    "rgb.jpg": (lambda path: _save(path, Image.new("RGB", (16, 16), ORANGE), quality=95), ORANGE, ORANGE),
    "rgb.png": (lambda path: _save(path, Image.new("RGB", (16, 16), ORANGE)), ORANGE, ORANGE),
    "rgb.webp": (lambda path: _save(path, Image.new("RGB", (16, 16), ORANGE), lossless=True), ORANGE, ORANGE),
    "grey.png": (lambda path: _save(path, Image.new("L", (16, 16), 90)), (90,) * 3, (90,) * 3),
    "grey.jpg": (lambda path: _save(path, Image.new("L", (16, 16), 90)), (90,) * 3, (90,) * 3),
    "grey16.png": (lambda path: _save(path, Image.new("I;16", (16, 16), 90 * 256)), (90,) * 3, (90,) * 3),
    "bits.png": (lambda path: _save(path, Image.new("1", (16, 16), 1)), (255,) * 3, (255,) * 3),
    "grey_alpha.png": (lambda path: _save(path, Image.new("LA", (16, 16), (90, 0))), (255,) * 3, (255,) * 3),
    "alpha.png": (lambda path: _save(path, Image.new("RGBA", (16, 16), (0, 0, 0, 0))), (255,) * 3, (255,) * 3),
    "alpha.webp": (
        lambda path: _save(path, Image.new("RGBA", (16, 16), (*ORANGE, 255)), lossless=True),
        ORANGE,
        ORANGE,
    ),
    "palette.png": (_palette, (255,) * 3, ORANGE),
    "cmyk.jpg": (lambda path: _save(path, Image.new("CMYK", (16, 16), (0, 255, 255, 0))), (254, 0, 0), (254, 0, 0)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_upright_rgb(name: str, tmp_path: Path) -> None:
    make, left, right = KINDS[name]
    with Image.open(make(tmp_path / name)) as file:
        image = augment.upright(file)
    assert image.mode == "RGB"
    for place, colour in (((2, 8), left), ((13, 8), right)):
        assert image.getpixel(place) == pytest.approx(colour, abs=3), f"{name} at {place}"


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    with Image.open(_rotated(tmp_path / "turned.jpg")) as file:
        image = augment.upright(file)
    assert image.size == (16, 32)
    assert image.getpixel((8, 4)) == pytest.approx(ORANGE, abs=6)
    assert image.getpixel((8, 28)) == pytest.approx((0, 0, 0), abs=6)


def _noise(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), Random(0).randbytes(width * height * 3))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (31, 20)], ids=str)
@pytest.mark.parametrize("view", [augment.random_crop, augment.centre_crop])
def test_views_of_any_shape_are_squares(view, size: tuple[int, int]) -> None:
    for seed in range(5):
        assert view(_noise(*size), Random(seed), size=16).size == (16, 16)


def test_random_crop_varies_and_repeats() -> None:
    image = _noise(40, 30)
    views = [augment.random_crop(image, Random(seed), size=8).tobytes() for seed in (1, 2, 1)]
    assert views[0] == views[2] != views[1]


def test_random_crop_flips_half_of_the_time() -> None:
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # darker to the right or to the left, never even
    first, last = zip(
        *(
            (view.getpixel((0, 4))[0], view.getpixel((7, 4))[0])
            for view in (augment.random_crop(ramp, Random(seed), size=8) for seed in range(200))
        ),
        strict=True,
    )
    rising = sum(a < b for a, b in zip(first, last, strict=True))
    assert 70 < rising < 130


def test_centre_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (48, 32), (0, 0, 0))
    image.paste(ORANGE, (10, 2, 38, 30))
    view = augment.centre_crop(image, Random(0), size=16)
    for corner in ((0, 0), (15, 0), (0, 15), (15, 15)):  # bicubic looks a little past the edge
        assert view.getpixel(corner) == pytest.approx(ORANGE, abs=40)
    assert {view.getpixel((x, y)) for x in range(3, 13) for y in range(3, 13)} == {ORANGE}


def test_shake_of_nothing_is_the_image_and_a_shift_moves_it() -> None:
    image = _noise(16, 16).convert("L")
    assert augment.shake(image, Random(0), degrees=0, zoom=0, shift=0).tobytes() == image.tobytes()

    dot = Image.new("L", (33, 33))
    dot.paste(255, (14, 14, 19, 19))

    class Highest(Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    moved = augment.shake(dot, Highest(), degrees=0, zoom=0, shift=0.25)
    left, top, right, bottom = moved.getbbox()
    assert (left + right) / 2 == pytest.approx(16.5 + 0.25 * 33, abs=1)
    assert (top + bottom) / 2 == pytest.approx(16.5 + 0.25 * 33, abs=1)
    larger = augment.shake(dot, Highest(), degrees=0, zoom=0.6, shift=0).getbbox()
    assert larger[2] - larger[0] > 5


def test_to_tensor_is_channels_first() -> None:
    image = _noise(5, 3)
    tensor = augment.to_tensor(image)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 3, 5)
    assert tuple(tensor[:, 2, 4].tolist()) == image.getpixel((4, 2))
    assert augment.to_tensor(image.convert("L")).shape == (1, 3, 5)


def test_split_is_even_over_classes_and_has_no_overlap() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 3 + [3]
    train, test = split(labels, 0.2)
    assert sorted(train + test) == list(range(len(labels)))
    assert [sum(labels[index] == label for index in test) for label in range(4)] == [8, 4, 1, 0]
    assert split(labels, 0.2) == (train, test)
    assert split(labels, 0.0) == (list(range(len(labels))), [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def test_a_folder_becomes_classes_and_labels(folder: Path, tmp_path: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("not a class")
    (folder / "red" / "notes.txt").write_text("not an image")
    source = open_source(tiny(folder, tmp_path))
    assert source.classes == sorted(COLOURS)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (18, 6)
    for path, label in zip(source.train.images, source.train.labels, strict=True):
        assert Path(str(path)).parent.name == source.classes[label]
    image, label, error = source.test[0, 0]
    assert (image.shape, image.dtype, error) == ((3, 16, 16), torch.uint8, None)
    assert tuple(image[:, 8, 8].tolist()) == pytest.approx(COLOURS[source.classes[label]], abs=45)


def test_a_folder_of_its_own_for_tests(folder: Path, tmp_path: Path) -> None:
    source = open_source(tiny(folder, tmp_path, val_data=str(make_images(tmp_path / "held_out", each=2))))
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (24, 6)


def _epoch(config, epoch: int = 0, start: int = 0, rank: int = 0, size: int = 1) -> list[Batch]:
    batches, loader = train_loader(open_source(config), config, rank, size, pin=False)
    batches.epoch, batches.start = epoch, start
    return list(loader)


def _same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(ours, theirs, strict=True)
    )


def test_batches_depend_on_their_key_alone(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path)
    first = _epoch(config)
    torch.manual_seed(123)
    assert len(first) == 18 // 4
    assert first[0].images.shape == (4, 3, 16, 16)
    assert _same(first, _epoch(config)), "the state of torch's generator must not matter"
    assert _same(first[2:], _epoch(config, start=2)), "nor where the epoch is taken up"
    assert not _same(first, _epoch(config, epoch=1))
    assert not _same(first, _epoch(tiny(folder, tmp_path, seed=1)))


def test_workers_make_the_same_batches(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, workers=2)
    before = torch.get_rng_state()
    assert _same(_epoch(config, epoch=3, start=1), _epoch(tiny(folder, tmp_path), epoch=3, start=1))
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw from torch's own generator"


def test_two_processes_share_the_batch_of_one(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path)
    alone = _epoch(config)
    shares = [_epoch(config, rank=rank, size=2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(map(bytes, whole.images.flatten(1).tolist())) == sorted(
            bytes(image) for part in parts for image in part.images.flatten(1).tolist()
        )
    source = open_source(config)
    held_out = [held_out_loader(source, config, rank, 2, pin=False) for rank in range(2)]
    assert sum(len(batch.labels) for loader in held_out if loader for batch in loader) == len(source.test or ())


@pytest.mark.parametrize("damage", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
def test_a_corrupt_image_is_black_ignored_and_named(damage: bytes | None, folder: Path, tmp_path: Path) -> None:
    bad = folder / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60] if damage is None else damage)
    errors = []
    for batch in _epoch(tiny(folder, tmp_path, val_split=0.0)):
        errors += batch.errors
        assert (batch.labels == IGNORED).sum() == len(batch.errors)
        assert not batch.images[batch.labels == IGNORED].any()
    assert len(errors) == 1
    assert str(bad) in errors[0]


def test_digits_are_scaled_up(tmp_path: Path) -> None:
    source = open_source(tiny("digits", tmp_path, image_size=32, val_split=0.2))
    assert source.classes == list("0123456789")
    assert source.test is not None
    assert len(source.train) + len(source.test) == 1797
    assert len(source.test) == pytest.approx(0.2 * 1797, abs=5)
    image, _, _ = source.test[0, 0]
    assert (image.shape, image.dtype) == ((1, 32, 32), torch.uint8)
    assert image.min() == 0
    assert image.max() > 200
