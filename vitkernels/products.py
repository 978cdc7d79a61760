"""Which library multiplies the extension's matrices on this CPU: the extension's own kernel, oneDNN, or torch's (MKL in
most builds).

None is the fastest one everywhere, but of a few rows, which the extension always multiplies. A Linear's three products
read their operands in different directions, so one library may be the fastest forward and the slowest for the gradient
of weights: each is timed, once on a machine, and the answer is kept in the user's cache folder. A choice made anew in
each process would make two runs of the same training differ in their last bits. Where nothing can be kept, the
extension multiplies float32 and oneDNN bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vitkernels.ops._amp import CODES

DTYPES = ("float32", "bfloat16")
PRODUCTS, INPUTS, WEIGHTS = "products", "input gradients", "weight gradients"  # forward, and the two backward
KINDS = tuple(f"{dtype} {product}" for product in (PRODUCTS, INPUTS, WEIGHTS) for dtype in DTYPES)
LIBRARIES = ("torch", "oneDNN", "vitkernels")
Choice = dict[str, str]  # a library for each kind

_ROWS, _INPUTS, _HIDDEN = 512, 768, 3072  # of a training step; few rows are multiplied otherwise in any case
_ROUNDS, _FEWEST, _SECONDS = 8, 3, 0.3  # of a kind; on a machine that is busy or slow, as few rounds as that takes
_GAIN = 1.05  # less than this much faster is noise: the extension's own products stay
_GENERATION = 5  # of the extension's own kernels: one that is younger than the choice kept is timed anew


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def encode(choice: Choice) -> int:
    """What `configure("products", ...)` takes: two bits for each kind (csrc/cpu/gemm.h)."""
    return sum(LIBRARIES.index(choice[kind]) << 2 * i for i, kind in enumerate(KINDS))


def decode(code: int) -> Choice:
    return {kind: LIBRARIES[code >> 2 * i & 3] for i, kind in enumerate(KINDS)}


def candidates(kind: str) -> list[str]:
    """The libraries that have this kind of product here, the one preferred among equals first."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if kind.startswith("float32"):  # torch's reads weights that lie apart, oneDNN's does not
        return ["vitkernels", "torch", "oneDNN"] if onednn else ["vitkernels", "torch"]
    onednn = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ["vitkernels", "oneDNN", "torch"] if onednn else ["vitkernels", "torch"]


def default() -> Choice:
    """The choice where none can be kept."""
    return {kind: candidates(kind)[0 if kind.startswith("float32") else 1] for kind in KINDS}


def choose(configure: Callable[[str, int], int]) -> Choice:
    """Who multiplies what here, as kept from the first time or measured now.

    Args:
        configure: the extension's own; it is left as it was.
    """
    # the first call of a process may stand under anybody's modes
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.autocast("cpu", enabled=False):
        return _kept_or_measured(configure)


def _kept_or_measured(configure: Callable[[str, int], int]) -> Choice:
    path = _path()
    if path is None:
        return default()
    kept = _read(path)
    if kept is not None:
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):  # asked before the time is spent
            return default()
        _keep(_measure(configure), path)
    except OSError:
        return default()
    return _read(path) or default()


def describe(chosen: Choice) -> str:
    """The choice in words: "float32 products by torch (MKL), their weight gradients by vitkernels, ..."."""
    mkl = {"float32": "torch (MKL)" if torch.backends.mkl.is_available() else "torch"}
    words = []
    for dtype in DTYPES:
        names = {"torch": mkl.get(dtype, "torch")}
        forward, *backward = (chosen[f"{dtype} {product}"] for product in (PRODUCTS, INPUTS, WEIGHTS))
        words.append(f"{dtype} {PRODUCTS} by {names.get(forward, forward)}")
        words += [
            f"their {product} by {names.get(library, library)}"
            for product, library in zip((INPUTS, WEIGHTS), backward, strict=True)
            if library != forward
        ]
    return ", ".join(words)


def _path() -> Path | None:
    """Where the choice is kept; None where the user has no home: HOME is not set, and the system does not know them."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    libraries = [candidates(kind) for kind in KINDS]
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {libraries}, {_GENERATION}"
    return cache / "vitkernels" / f"products-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> Choice | None:
    """The choice that is kept; None where there is none, or what is there cannot be read."""
    try:
        kept = json.loads(path.read_text())
        known = all(kept[kind] in candidates(kind) for kind in KINDS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {kind: kept[kind] for kind in KINDS} if known else None


def _keep(chosen: Choice, path: Path) -> None:
    """Write a choice whole or not at all; the first process decides for those that measured beside it."""
    own = path.with_suffix(f".{secrets.token_hex(8)}")  # a folder may be shared by machines, where a pid is no name
    try:
        own.write_text(json.dumps(chosen))
        try:
            os.link(own, path)
        except OSError:  # it is there, or there are no hard links here
            if _read(path) is None:
                os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def _measure(configure: Callable[[str, int], int]) -> Choice:
    """Time each kind by each library in turns, on a ViT's shape; about a second in all on a quiet machine."""
    before = configure("products", -1)
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = decode(0)
    try:
        for kind in KINDS:
            run = _work(kind, generator)
            seconds: dict[str, list[float]] = {library: [] for library in candidates(kind)}
            begin = time.perf_counter()
            for number in range(_ROUNDS):
                if number >= _FEWEST and time.perf_counter() - begin > _SECONDS:
                    break
                for library, times in seconds.items():
                    configure("products", encode(chosen | {kind: library}))
                    start = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - start)
            best = {library: min(times) for library, times in seconds.items()}  # what others run beside only adds
            bound = _GAIN * min(best.values())
            chosen[kind] = next(library for library, time_ in best.items() if time_ <= bound)
    finally:
        configure("products", before)
    return chosen


def _work(kind: str, generator: torch.Generator) -> Callable[[], object]:
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    x, w1, w2 = draw(_ROWS, _INPUTS), draw(_HIDDEN, _INPUTS), draw(_INPUTS, _HIDDEN)
    dy, pre = draw(_ROWS, _INPUTS), draw(_ROWS, _HIDDEN)
    needs = [False] * 5
    # two products with the activation, or its derivative, between them, which only the extension's own takes along
    if kind.endswith(PRODUCTS):
        return lambda: torch.ops.vitkernels_ext.mlp(x, w1, None, w2, None, "gelu", True)
    if kind.endswith(INPUTS):
        needs[0] = needs[2] = True  # with the first bias's, which is summed on the way
        return lambda: torch.ops.vitkernels_ext.mlp_backward(dy, x, pre, w1, w2, "gelu", needs)
    # in float32, as autocast's optimizers have it
    return lambda: torch.ops.vitkernels_ext.linear_backward(pre, x, w1, [False, True, False], CODES[torch.float32])
