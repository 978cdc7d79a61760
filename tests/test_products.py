"""Which library multiplies: measured once on a machine, kept, and the same for every process."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import skip_without
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels import products

OWN = dict.fromkeys(products.KINDS, "vitkernels")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vitkernels"


@pytest.fixture
def configure() -> Iterator[object]:
    skip_without("ext")
    real = torch.ops.vitkernels_ext.configure
    before = real("products", -1)
    yield real
    assert real("products", -1) == before, "the choice is left as it was"


def kept(cache: Path) -> list[products.Choice]:
    return [json.loads(path.read_text()) for path in cache.iterdir()]


def test_a_choice_goes_to_the_extension_and_back() -> None:
    choices = [
        dict(zip(products.KINDS, names, strict=True)) for names in itertools.product(products.LIBRARIES, repeat=6)
    ]
    assert [products.decode(products.encode(choice)) for choice in choices] == choices
    assert len({products.encode(choice) for choice in choices}) == 3**6


def test_a_choice_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    choice = dict.fromkeys(products.KINDS, "torch")
    assert products.describe(choice) == "float32 products by torch (MKL), bfloat16 products by torch"
    choice |= {"float32 weight gradients": "vitkernels", "bfloat16 products": "oneDNN"}
    assert products.describe(choice) == (
        "float32 products by torch (MKL), their weight gradients by vitkernels, "
        "bfloat16 products by oneDNN, their input gradients by torch, their weight gradients by torch"
    )


def test_the_first_choice_is_kept(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = products.choose(configure)
    assert kept(cache) == [first]
    assert all(first[kind] in products.candidates(kind) for kind in products.KINDS)
    monkeypatch.setattr(products, "_measure", lambda *args: pytest.fail("measured again"))
    assert products.choose(configure) == first


@pytest.mark.parametrize("fastest", products.LIBRARIES)
def test_the_fastest_library_is_chosen(cache: Path, configure, monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    clock = {"now": 0.0, "products": 0}

    def turn(name: str, value: int) -> int:
        clock["products"] = clock["products"] if value < 0 else value
        return clock["products"]

    def work(kind: str, generator: torch.Generator) -> object:
        def run() -> None:
            clock["now"] += 1.0 if products.decode(clock["products"])[kind] == fastest else 1.10

        return run

    monkeypatch.setattr(products, "_work", work)
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(products, "candidates", lambda kind: list(products.LIBRARIES))
    assert products.choose(turn) == dict.fromkeys(products.KINDS, fastest)


def test_a_busy_machine_is_asked_less(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = {"now": 0.0}, []

    def work(kind: str, generator: torch.Generator) -> object:
        def run() -> None:
            ran.append(kind)
            clock["now"] += products._SECONDS

        return run

    monkeypatch.setattr(products, "_work", work)
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock["now"])
    products._measure(configure)
    counts = {kind: ran.count(kind) for kind in products.KINDS}
    assert counts == {kind: products._FEWEST * len(products.candidates(kind)) for kind in products.KINDS}


def test_among_equals_the_extension_multiplies(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.time, "perf_counter", lambda: 0.0)
    assert products.choose(configure) == OWN


def test_processes_that_measure_side_by_side_agree(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(*args: object) -> products.Choice:
        products._path().write_text(json.dumps(OWN))  # another process was faster
        return dict.fromkeys(products.KINDS, "torch")

    monkeypatch.setattr(products, "_measure", beaten)
    assert products.choose(configure) == OWN
    assert len(list(cache.iterdir())) == 1


SPOILT = {
    "empty": b"",
    "cut short": json.dumps(OWN).encode()[:-9],
    "another's": b"[]",
    "a number": b"3",
    "no choice": b"{}",
    "unknown libraries": json.dumps(dict.fromkeys(products.KINDS, "abacus")).encode(),
    "lists": json.dumps({kind: ["torch"] for kind in products.KINDS}).encode(),
    "bytes": bytes(range(256)),
    "brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_file_is_written_anew(cache: Path, configure, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    cache.mkdir()
    products._path().write_bytes(SPOILT[what])
    first = products.choose(configure)
    assert kept(cache) == [first], "and nothing is left beside it"
    monkeypatch.setattr(products, "_measure", lambda *args: pytest.fail("measured again"))
    assert products.choose(configure) == first


def test_a_file_mended_by_another_process_stands(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    products._path().write_text("{")

    def beaten(*args: object) -> products.Choice:
        products._path().write_text(json.dumps(OWN))
        return dict.fromkeys(products.KINDS, "torch")

    monkeypatch.setattr(products, "_measure", beaten)
    assert products.choose(configure) == OWN
    assert kept(cache) == [OWN]


def test_a_file_system_without_hard_links(cache: Path, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = products.choose(configure)
    assert kept(cache) == [first]


def _below_a_file(cache: Path, patch: pytest.MonkeyPatch) -> None:
    cache.write_text("where the folder would be")


def _read_only(cache: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda path, mode: False)


def _a_folder_of_that_name(cache: Path, patch: pytest.MonkeyPatch) -> None:
    products._path().mkdir(parents=True)


def _full_disk(cache: Path, patch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, text: str) -> None:
        path.write_bytes(text[:5].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(Path, "write_text", fill)


def _no_home(cache: Path, patch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("XDG_CACHE_HOME", "HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("why", [_below_a_file, _read_only, _a_folder_of_that_name, _full_disk, _no_home])
def test_where_nothing_can_be_kept_there_is_a_default(
    cache: Path, configure, monkeypatch: pytest.MonkeyPatch, why: Callable[..., None]
) -> None:
    before = sorted(cache.parent.rglob("*"))
    with monkeypatch.context() as patch:
        why(cache, patch)
        known = why in (_below_a_file, _read_only, _no_home)
        if known:  # the time is not spent where it is in vain
            patch.setattr(products, "_measure", lambda *args: pytest.fail("measured"))
        assert products.choose(configure) == products.default()
    left = [path for path in sorted(cache.parent.rglob("*")) if path not in before]
    assert not [path for path in left if path.is_file() and path != cache], "nothing half written is left"


@pytest.mark.parametrize("name", ["default dtype", "autocast", "default device", "inference mode", "a function mode"])
def test_what_is_measured_does_not_depend_on_who_asks(cache: Path, configure, name: str) -> None:
    """Nor does it fail: the first call of a process is anybody's."""

    class Meddling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError("measuring is nobody's business")

    surroundings = {
        "default dtype": _default_dtype(torch.bfloat16),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "default device": torch.device("meta"),
        "inference mode": torch.inference_mode(),
        "a function mode": Meddling(),
    }
    seen: list[tuple[torch.dtype, torch.device]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError("nor is it counted")

    work = products._work

    def watched(kind: str, generator: torch.Generator) -> Callable[[], object]:
        run = work(kind, generator)

        def call() -> object:
            result = run()
            first = next(each for each in torch.utils._pytree.tree_leaves(result) if each.numel())
            seen.append((first.dtype, first.device))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch, Watch(), surroundings[name]:
        patch.setattr(products, "_work", watched)
        patch.setattr(products, "_SECONDS", float("inf"))
        products.choose(configure)
    turns = products._ROUNDS * len(products.candidates("float32 products"))
    # the gradient of a weight comes in float32 whatever is multiplied
    few = products._ROUNDS * len(products.candidates("bfloat16 weight gradients"))
    assert seen.count((torch.float32, torch.device("cpu"))) == 3 * turns + few
    assert {device for _, device in seen} == {torch.device("cpu")}
    assert len(kept(cache)) == 1


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_the_random_state_is_not_touched(cache: Path, configure) -> None:
    state = torch.get_rng_state()
    products.choose(configure)
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_say_which_library_multiplies() -> None:
    skip_without("ext")
    assert "float32 products by " in str(vk.backends())
    assert vk.backends()["ext"] == "available"


@pytest.mark.parametrize("library", products.LIBRARIES)
@pytest.mark.parametrize("kind", products.KINDS)
def test_every_choice_gives_the_same_numbers(configure, kind: str, library: str) -> None:
    x, weight = torch.randn(256, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    before = configure("products", -1)
    configure("products", products.encode(products.default() | {kind: library}))
    try:
        with vk.use("ext"):
            vk.ops.linear(x, weight).square().sum().backward()
    finally:
        configure("products", before)
    exact = 2 * (x.double() @ weight.double().T)
    torch.testing.assert_close(x.grad.double(), exact @ weight.double(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(weight.grad.double(), exact.T @ x.double(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", products.LIBRARIES)
def test_the_chosen_library_is_the_one_that_multiplies(force_library, library: str, dtype: torch.dtype) -> None:
    """Torch's and oneDNN's products have the bits of their own calls, and the extension's are neither's in float32."""
    if library not in products.candidates(f"{str(dtype).removeprefix('torch.')} products"):
        pytest.skip(f"{library} has no {dtype} products on this machine")
    force_library(library)
    x, weight, bias, dy = (torch.randn(*shape).to(dtype) for shape in ((900, 1000), (1100, 1000), (1100,), (900, 1100)))
    y = torch.ops.vitkernels_ext.linear(x, weight, bias)
    dx, dweight, _ = torch.ops.vitkernels_ext.linear_backward(dy, x, weight, [True, True, False])
    theirs = {"torch": (torch.addmm(bias, x, weight.t()), dy @ weight, dy.t() @ x)}
    if "oneDNN" in products.candidates(f"{str(dtype).removeprefix('torch.')} products"):
        transposed = _onednn(x.t().contiguous(), dy.t()).t()
        theirs["oneDNN"] = _onednn(x, weight, bias), _onednn(dy, weight.t()), transposed
    same = {
        name: [torch.equal(*pair) for pair in zip((y, dx, dweight), each, strict=True)] for name, each in theirs.items()
    }
    if library in same:
        assert all(same[library])
    elif dtype == torch.float32:
        assert not any(any(each) for each in same.values())


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@pytest.mark.parametrize("product", [products.PRODUCTS, products.INPUTS, products.WEIGHTS])
def test_each_product_of_a_linear_has_a_library_of_its_own(configure, product: str) -> None:
    """Torch's bits where torch multiplies, and there alone."""
    x, weight, dy = torch.randn(900, 1000), torch.randn(1100, 1000), torch.randn(900, 1100)
    before = configure("products", -1)
    configure("products", products.encode(OWN | {f"float32 {product}": "torch"}))
    try:
        y = torch.ops.vitkernels_ext.linear(x, weight, None)
        dx, dweight, _ = torch.ops.vitkernels_ext.linear_backward(dy, x, weight, [True, True, False])
    finally:
        configure("products", before)
    by_torch = {
        products.PRODUCTS: torch.equal(y, x @ weight.t()),
        products.INPUTS: torch.equal(dx, dy @ weight),
        products.WEIGHTS: torch.equal(dweight, dy.t() @ x),
    }
    assert by_torch == {each: each == product for each in by_torch}


def test_bfloat16_heads_multiply_pairs(force_isa) -> None:
    """Pairs round the weights, so the last bits tell; a learned mask of many keys keeps them exact."""

    def differing(isa: str, keys: int, learned: bool) -> float:
        qkv, mask = torch.randn(2, keys, 96).bfloat16(), torch.randn(1, 1, keys, keys) if learned else None
        found = []
        for each in (isa, "avx512"):
            force_isa(each)
            found.append(torch.ops.vitkernels_ext.attention_qkv(qkv, 2, mask, False, 0.25)[0])
        return (found[0] != found[1]).float().mean().item()

    for isa in ("avx512_bf16", "amx"):
        assert differing(isa, 33, False) > 0.05
        assert differing(isa, 33, True) > 0.05
        assert differing(isa, 520, False) > 0.05
        assert differing(isa, 520, True) < 0.01


@pytest.mark.parametrize("rows", [9, 49, 300])
def test_the_matrix_unit_sums_what_pairs_sum(force_isa, force_library, rows: int) -> None:
    """On sizes that fill no tile, with weights in float32 that are rounded as they are read."""
    force_library("vitkernels")
    x, w1, w2, bias = (torch.randn(*shape) for shape in ((rows, 70), (130, 70), (70, 130), (130,)))
    x, found = x.bfloat16(), []
    for isa in ("avx512_bf16", "amx"):
        force_isa(isa)
        y, pre = torch.ops.vitkernels_ext.mlp(x, w1, bias, w2, None, "gelu", True)
        found.append((y, pre, *torch.ops.vitkernels_ext.mlp_backward(x, x, pre, w1, w2, "gelu", [True] * 4 + [False])))
    for pairs, unit in zip(*found, strict=True):
        assert pairs.dtype == unit.dtype
        assert (pairs.float() - unit.float()).norm() <= 4e-3 * pairs.float().norm()


@pytest.mark.parametrize("rows", [5, 64, 197, 1576])
def test_own_products_do_not_depend_on_the_number_of_threads(force_library, rows: int) -> None:
    force_library("vitkernels")
    x, w1, w2 = torch.randn(rows, 390), torch.randn(400, 390), torch.randn(390, 400)  # narrow ones are a library's
    pre, results = x @ w1.T, []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(torch.ops.vitkernels_ext.mlp_backward(x, x, pre, w1, w2, "gelu", [True] * 5))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
