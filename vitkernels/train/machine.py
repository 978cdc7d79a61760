"""What this machine and this installation are, for reports and for `vitkernels info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from vitkernels import __version__, ext
from vitkernels.products import cpu_name

PACKAGES = ("numpy", "triton", "timm", "pillow", "safetensors", "scikit-learn", "matplotlib", "rich")


def device_name(device: torch.device) -> str:
    """The name of what a run ran on, with its threads or memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    threads = torch.get_num_threads()
    return f"{cpu_name()} ({threads} thread{'s' if threads > 1 else ''})"


def versions() -> dict[str, str]:
    """Python's, torch's, this package's, and those of what else may be used."""
    found = {"vitkernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> dict[str, str]:
    """The processor and every GPU that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cpu_name()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()} in torch"}
    found["cpu threads"] = f"{torch.get_num_threads()}"
    found["extension"] = ext.why_not() or f"loaded, {ext.describe()}"
    if not torch.cuda.is_available():
        found["cuda"] = "torch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{device_name(torch.device('cuda', index))}, compute capability {major}.{minor}"
    return found
