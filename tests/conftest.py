"""What every test stands on: poisoned memory, fixed seeds, one thread, and the default order of backends."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from case import Loss
from cases import SMALL

from vitkernels import dispatch, ext, products, tape

# read when cuBLAS makes its first handle; without it, its products are not deterministic, and torch warns
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor keeps compiled code by graph: what another version of an op left on the machine would assert its shapes
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that starts them
    _inductor = tempfile.TemporaryDirectory(prefix="vitkernels-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name

tape.FROM_CALL = 1  # tests call a thing twice at most: the first call is taped, the second one replayed

BACKENDS = ("reference", "ext")  # a new backend is one more name
ISAS = ext.ISAS
DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitkernels")
    group.addoption("--limit", type=float, default=float("inf"), help="start no test after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEADLINE] = time.monotonic() + config.getoption("limit")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("not run: out of time")


def skip_without(backend: str) -> None:
    """Skip the test, with the backend's own sentence, where the backend is not there."""
    reason = dispatch.why_not(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    skip_without(request.param)
    return request.param


@pytest.fixture(params=SMALL, ids=lambda case: case.op)
def loss(request: pytest.FixtureRequest) -> Loss:
    """One case of each op as a function of its tensors."""
    return Loss(request.param)


@pytest.fixture
def force_isa() -> Iterator[Callable[[str], None]]:
    """A function that switches the extension's instruction set; what it was before comes back after the test."""
    skip_without("ext")
    before = ext.isa()

    def force(name: str) -> None:
        try:
            ext.isa(name)
        except ValueError as reason:
            pytest.skip(str(reason))

    yield force
    ext.isa(before)


@pytest.fixture
def force_library() -> Iterator[Callable[[str], None]]:
    """A function that lets one library multiply all of the extension's matrices, until the test ends."""
    skip_without("ext")
    configure = torch.ops.vitkernels_ext.configure
    before = configure("products", -1)

    def force(name: str) -> None:
        configure("products", products.encode(dict.fromkeys(products.KINDS, name)))

    yield force
    configure("products", before)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over gloo."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> None:
    """Memory that nobody wrote is NaN, or the largest integer.

    The switch acts inside aten's empty functions, which the extension reaches through the dispatcher when told to
    (`test_ops_contract.py` shows that it does), so an element that a kernel leaves out is seen when compared.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    if ext.why_not() is None:
        torch.ops.vitkernels_ext.configure("dispatched_memory", 1)


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default order of backends, a fixed seed, one thread; no launcher that another test's calls have chosen."""
    monkeypatch.setattr(dispatch, "_order", None)
    dispatch.backends_changed()
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What a test compiled is forgotten behind it: the next one's sizes would make shapes dynamic, and take minutes."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
