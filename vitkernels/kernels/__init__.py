"""The Triton backend: one page of kernels per op, under the op's own name.

Each page offers `forward` and `backward` (launchers that take the op's schema), `why_not` (a sentence for what it
cannot serve) and `variants` (every kernel at every config row, for `make audit`). Nothing here imports triton until a
call asks for this backend.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vitkernels import dispatch

# op: (page, suffix of its functions there)
PAGES: dict[str, tuple[str, str]] = {
    "attention": ("attention", ""),
    "attention_qkv": ("attention", "_qkv"),
    "add_layer_norm": ("add_layer_norm", ""),
    "linear": ("linear", ""),
    "mlp": ("mlp", ""),
    "patch_embed": ("patch_embed", ""),
    "rotary": ("rotary", ""),
}
OLDEST, NEWEST = (3, 6), (3, 9)
LOWEST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests; read when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def why_not() -> str | None:
    """A sentence that says why no kernel can run in this process, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton did not import ({error})"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if not OLDEST <= version <= NEWEST:
        return f"triton is {triton.__version__}; needs 3.6 to 3.9"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter poses as an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _page(op: str) -> ModuleType:
    return importlib.import_module(f"vitkernels.kernels.{PAGES[op][0]}")


def _call_why_not(op: str, direction: str, args: tuple[Any, ...]) -> str | None:
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != ("cpu" if interpreting() else "cuda"):
            return f"the kernels run on {'the CPU (interpreting)' if interpreting() else 'CUDA'}, not on {arg.device}"
        if capability(arg.device) < LOWEST_CAPABILITY:
            major, minor = capability(arg.device)
            return f"the kernels need compute capability 8.0 or later, and {arg.device} has {major}.{minor}"
        if arg.dtype == torch.float64:
            return "the kernels have no float64"
    reason: str | None = getattr(_page(op), f"why_not{PAGES[op][1]}")(direction, args)
    return reason


def _launcher(op: str, direction: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        run = getattr(_page(op), f"{direction}{PAGES[op][1]}")
        if device.type != "cuda":
            return run(*args)
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its tensors are on
            return run(*args)

    return launch


def register() -> None:
    """Give every op its Triton backend."""
    for op in PAGES:
        dispatch.OPS[op].register(
            "triton", _launcher(op, "forward"), _launcher(op, "backward"), functools.partial(_call_why_not, op)
        )
