"""Which library multiplies the extension's matrices on this CPU: the extension's own kernel, oneDNN, or torch's (MKL in
most builds).

None is the fastest one everywhere. They are timed once on a machine and the answer is kept in the user's cache folder:
a choice made anew in each process would make two runs of the same training differ in their last bits. Where nothing
can be kept, the extension multiplies float32 and oneDNN, which knows of matrix units, bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

KINDS = ("float32 products", "bfloat16 products", "float32 weight gradients", "bfloat16 weight gradients")
LIBRARIES = ("torch", "oneDNN", "vitkernels")
Choice = dict[str, str]  # a library for each kind

_ROWS, _INPUTS, _HIDDEN, _ROUNDS = 1024, 384, 1536, 9
_GAIN = 1.05  # less than this much faster is noise: the extension's own products stay


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
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
    if kind.startswith("bfloat16"):
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
    path = _path()
    kept = _read(path)
    if kept is not None:
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = _measure(configure)
        # the first process to write decides for those that measured beside it
        with contextlib.suppress(FileExistsError):
            own = path.with_suffix(f".{os.getpid()}")
            own.write_text(json.dumps(chosen))
            try:
                os.link(own, path)
            finally:
                own.unlink()
    except OSError:
        return default()
    return _read(path) or default()


def describe(chosen: Choice) -> str:
    """The choice in words: "float32 products by vitkernels, bfloat16 products by oneDNN, ..."."""
    mkl = {"float32": "torch (MKL)" if torch.backends.mkl.is_available() else "torch"}
    names = {
        kind: mkl.get(kind.split()[0], "torch") if library == "torch" else library for kind, library in chosen.items()
    }
    return ", ".join(f"{kind} by {name}" for kind, name in names.items())


def _path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, 3 libraries"
    return cache / "vitkernels" / f"products-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> Choice | None:
    try:
        kept = json.loads(path.read_text())
        known = all(kept[kind] in candidates(kind) for kind in KINDS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {kind: kept[kind] for kind in KINDS} if known else None


def _measure(configure: Callable[[str, int], int]) -> Choice:
    """Time each kind by each library in turns, on a ViT's shape; about a third of a second in all."""
    before = configure("products", -1)
    generator = torch.Generator().manual_seed(0)
    chosen = decode(0)
    try:
        with _disable_current_modes():
            for kind in KINDS:
                run = _work(kind, generator)
                seconds: dict[str, list[float]] = {library: [] for library in candidates(kind)}
                for _ in range(_ROUNDS):
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
        return torch.randn(*shape, generator=generator).to(dtype)

    x, w1, w2 = draw(_ROWS, _INPUTS), draw(_HIDDEN, _INPUTS), draw(_INPUTS, _HIDDEN)
    if kind.endswith("products"):  # with the activation between them, which only the extension's own takes along
        return lambda: torch.ops.vitkernels_ext.mlp(x, w1, None, w2, None, "gelu", True)
    dy = draw(_ROWS, _HIDDEN)
    return lambda: torch.ops.vitkernels_ext.linear_backward(dy, x, w1, [False, True, False])
