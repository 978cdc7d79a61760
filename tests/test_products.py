"""Which library multiplies: measured once on a machine, kept, and the same for every process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import skip_without

import vitkernels as vk
from vitkernels import products

ALL = sum(products.KINDS.values())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vitkernels"


@pytest.fixture
def configure() -> Iterator[object]:
    skip_without("ext")
    real = torch.ops.vitkernels_ext.configure
    before = real("onednn", -1)
    yield real
    assert real("onednn", -1) == before, "the choice is left as it was"


def kept(cache: Path) -> list[int]:
    return [json.loads(path.read_text())["onednn"] for path in cache.iterdir()]


def test_the_first_choice_is_kept(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = products.choose(configure)
    assert kept(cache) == [first]
    assert first & ~products.served() == 0
    monkeypatch.setattr(products, "_measure", lambda *args: pytest.fail("measured again"))
    assert products.choose(configure) == first


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_library_is_chosen(cache: Path, configure, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    clock = {"now": 0.0, "onednn": 0}

    def turn(name: str, value: int) -> int:
        clock["onednn"] = clock["onednn"] if value < 0 else value
        return clock["onednn"]

    def work(*args: object) -> object:
        def run() -> None:
            clock["now"] += 1.0 if bool(clock["onednn"]) == faster else 2.0

        return run

    monkeypatch.setattr(products, "_work", work)
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(products, "served", lambda: ALL)
    assert products.choose(turn) == (ALL if faster else 0)


def test_processes_that_measure_side_by_side_agree(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(*args: object) -> int:
        products._path().write_text(json.dumps({"onednn": 1}))  # another process was faster
        return 2

    monkeypatch.setattr(products, "_measure", beaten)
    monkeypatch.setattr(products, "served", lambda: ALL)
    assert products.choose(configure) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"onednn": "all"}', "{}"])
def test_a_spoilt_file_is_passed_over(cache: Path, configure, content: str) -> None:
    cache.mkdir()
    products._path().write_text(content)
    assert products.choose(configure) == products.served()


def test_without_a_cache_folder_onednn_multiplies_all_it_has(
    tmp_path: Path, configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert products.choose(configure) == products.served()


def test_the_random_state_is_not_touched(cache: Path, configure) -> None:
    state = torch.get_rng_state()
    products.choose(configure)
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_say_which_library_multiplies() -> None:
    skip_without("ext")
    assert "float32 products by " in str(vk.backends())
    assert vk.backends()["ext"] == "available"


@pytest.mark.parametrize("onednn", [0, *products.KINDS.values()])
def test_every_choice_gives_the_same_numbers(configure, onednn: int) -> None:
    x, weight = torch.randn(256, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    before = configure("onednn", -1)
    configure("onednn", onednn)
    try:
        with vk.use("ext"):
            vk.ops.linear(x, weight).square().sum().backward()
    finally:
        configure("onednn", before)
    exact = 2 * (x.double() @ weight.double().T)
    torch.testing.assert_close(x.grad.double(), exact @ weight.double(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(weight.grad.double(), exact.T @ x.double(), rtol=1e-4, atol=1e-2)
