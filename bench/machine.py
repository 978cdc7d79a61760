"""What is measured, and what the machine says: a clock that synchronises, peak memory, the cache, two ceilings."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import vitkernels as vk
from vitkernels import tape
from vitkernels.train import machine as host

ROOT = Path(__file__).parent.parent
CODE = ("vitkernels", "csrc", "bench", ":!bench/results", ":!*.md")  # what a figure depends on
PACKAGES = ("torchvision", "transformers", "pytest-benchmark")


def device() -> torch.device:
    """The GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def slug(device: torch.device) -> str:
    """The device's name, threads and all, as a file is named."""
    return re.sub("[^a-z0-9]+", "-", host.device_name(device).lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """The head of a results file: what was measured, with what."""
    versions = host.versions()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": host.device_name(device),
        "kind": device.type,
        "backends": dict(vk.backends()),
        "versions": versions,
    }


def revision() -> str:
    """The commit that is measured, "-dirty" where code differs from it; outside a checkout the version."""
    try:
        commit = _git("describe", "--always", "--abbrev=10")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", *CODE) else commit
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return f"version {vk.__version__}"


def _git(*words: str) -> str:
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # a checkout around ours is another's
    done = subprocess.run(["git", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def clock(device: torch.device) -> float:
    """Seconds; all that was launched has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_seconds(step: Callable[[Any], Any], sets: Sequence[Any], calls: int = 10, repeats: int = 5) -> float:
    """Seconds that one call keeps the GPU busy, between CUDA events.

    A spinning kernel holds the GPU back until all calls are in its queue: what launching them takes is not counted.
    """
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)  # clock ticks, about 20 ms
        start.record()
        for index in range(calls):
            step(sets[index % len(sets)])
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(taken)


def kernel_seconds(step: Callable[[Any], Any], sets: Sequence[Any], most: int = 24) -> dict[str, float]:
    """Seconds of each kernel that a call runs on the GPU, the longest first; the rest of them together."""
    step(sets[0])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for inputs in sets:
            step(inputs)
        torch.cuda.synchronize()
    assert profiled.profiler is not None
    taken: dict[str, float] = {}
    for event in profiled.profiler.kineto_results.events():
        if event.device_type() == torch.profiler.DeviceType.CUDA:
            taken[event.name()] = taken.get(event.name(), 0.0) + event.duration_ns() / 1e9 / len(sets)
    ranked = sorted(taken.items(), key=lambda each: -each[1])
    rest = ranked[most:]
    return dict(ranked[:most]) | ({f"{len(rest)} others": sum(took for _, took in rest)} if rest else {})


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * 2**20)


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step takes of torch's allocator at its peak, on top of what is there before it.

    A GPU's allocator counts; on a CPU a profile of the step holds every allocation, ours as the peers', and is the same
    at every run, which the process's resident memory is not: that depends on what malloc kept of earlier steps. It is
    a step as training repeats it: its tapes are written, and replayed under the profile as well.
    """
    for _ in range(tape.FROM_CALL):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        mock.patch("torch.autograd._profiler_enabled", return_value=False),  # ours would call ops one by one for it
    ):
        step()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=_start) if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def _start(event: Any) -> int:
    return event.start_ns()


# ------------------------------------------------------------------------------------------------------------ ceilings


def gemm_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several, by torch or by our own backend."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_best(lambda: a @ b, device), _best(lambda: vk.ops.linear(a, b), device))


def copy_ceiling(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy much larger than the cache, the best of several."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _best(call: Callable[[], Any], device: torch.device, rounds: int = 7) -> float:
    call()
    taken = []
    for _ in range(rounds):
        start = clock(device)
        call()
        taken.append(clock(device) - start)
    return min(taken)
