"""Which library multiplies the extension's matrices on this CPU: oneDNN, or torch's own choice (MKL in most builds).

Neither is the faster one everywhere. They are timed once on a machine and the answer is kept in the user's cache
folder: a choice made anew in each process would make two runs of the same training differ in their last bits. Where
nothing can be kept, oneDNN multiplies all that it has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# bits of `configure("onednn", ...)` (csrc/cpu/gemm.h)
KINDS = {
    "float32 products": 1,
    "bfloat16 products": 2,
    "float32 weight gradients": 4,
    "bfloat16 weight gradients": 8,
}
_ROWS, _INPUTS, _OUTPUTS, _ROUNDS = 1024, 384, 1152, 7
_GAIN = 1.03  # less than this much faster is noise: oneDNN stays


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def served() -> int:
    """The kinds that oneDNN has on this machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    bf16 = KINDS["bfloat16 products"] | KINDS["bfloat16 weight gradients"]
    return sum(KINDS.values()) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else sum(KINDS.values()) - bf16


def choose(configure: Callable[[str, int], int]) -> int:
    """The kinds that oneDNN multiplies here, as kept from the first time or measured now.

    Args:
        configure: the extension's own; it is left as it was.
    """
    candidates = served()
    path = _path()
    kept = _read(path)
    if kept is not None or candidates == 0:
        return candidates & kept if kept is not None else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = _measure(configure, candidates)
        # the first process to write decides for those that measured beside it
        with contextlib.suppress(FileExistsError):
            own = path.with_suffix(f".{os.getpid()}")
            own.write_text(json.dumps({"onednn": chosen}))
            try:
                os.link(own, path)
            finally:
                own.unlink()
    except OSError:
        return candidates
    kept = _read(path)
    return candidates if kept is None else candidates & kept


def describe(chosen: int) -> str:
    """The choice in words: "float32 products by oneDNN, float32 weight gradients by torch (MKL), ..."."""
    other = {"float32": "torch (MKL)" if torch.backends.mkl.is_available() else "torch", "bfloat16": "torch"}
    return ", ".join(f"{kind} by {'oneDNN' if chosen & bit else other[kind.split()[0]]}" for kind, bit in KINDS.items())


def _path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return cache / "vitkernels" / f"products-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> int | None:
    try:
        kept = json.loads(path.read_text())["onednn"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if isinstance(kept, int) else None


def _measure(configure: Callable[[str, int], int], candidates: int) -> int:
    """Time each kind both ways in turns, on a ViT's shape; about a fifth of a second in all."""
    before = configure("onednn", -1)
    generator = torch.Generator().manual_seed(0)
    chosen = 0
    try:
        with _disable_current_modes():
            for kind, bit in KINDS.items():
                if candidates & bit:
                    run = _work(kind, generator)
                    seconds: dict[int, list[float]] = {bit: [], 0: []}
                    for _ in range(_ROUNDS):
                        for onednn, times in seconds.items():
                            configure("onednn", onednn)
                            start = time.perf_counter()
                            run()
                            times.append(time.perf_counter() - start)
                    ours, other = (statistics.median(times[1:]) for times in seconds.values())
                    chosen |= bit if ours < _GAIN * other else 0
    finally:
        configure("onednn", before)
    return chosen


def _work(kind: str, generator: torch.Generator) -> Callable[[], object]:
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight = draw(_ROWS, _INPUTS), draw(_OUTPUTS, _INPUTS)
    if kind.endswith("products"):
        return lambda: torch.ops.vitkernels_ext.linear(x, weight, None)
    dy = draw(_ROWS, _OUTPUTS)
    return lambda: torch.ops.vitkernels_ext.linear_backward(dy, x, weight, [False, True, False])
