"""The Triton backend: one page of kernels per op, under the op's own name.

Each page offers `forward` and `backward` (launchers that take the op's schema), `why_not` (a sentence for what it
cannot serve) and `variants` (every kernel at every config row, for `make audit`). Nothing here imports triton until a
call asks for this backend.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vitkernels import dispatch
from vitkernels.kernels.device import Device, current, interpreting

# op: (page, suffix of its functions there)
PAGES: dict[str, tuple[str, str]] = {
    "attention": ("attention", ""),
    "attention_qkv": ("attention", "_qkv"),
    "attention_rel_pos": ("attention_rel_pos", ""),
    "attention_varlen": ("attention_varlen", ""),
    "add_layer_norm": ("add_layer_norm", ""),
    "add_rms_norm": ("add_layer_norm", "_rms"),
    "glu_mlp": ("glu_mlp", ""),
    "linear": ("linear", ""),
    "mlp": ("mlp", ""),
    "patch_embed": ("patch_embed", ""),
    "rotary": ("rotary", ""),
    "rotary_qkv": ("rotary_qkv", ""),
}
__all__ = ["PAGES", "capability", "interpreting", "register", "why_not"]
OLDEST, NEWEST = (3, 6), (3, 9)
LOWEST_CAPABILITY = (8, 0)


def why_not() -> str | None:
    """A sentence that says why no kernel can run in this process, or None."""
    return _why_not(current())


@functools.cache
def _why_not(device: Device) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton did not import ({error})"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if not OLDEST <= version <= NEWEST:
        return f"triton is {triton.__version__}; needs 3.6 to 3.9"
    return device.why_not()


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device that launches are for."""
    return current().capability(device)


def _page(op: str) -> ModuleType:
    return importlib.import_module(f"vitkernels.kernels.{PAGES[op][0]}")


def _call_why_not(op: str, direction: str, call: Any) -> str | None:
    found = current()
    for arg in call:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != found.kind:
            return f"the kernels run on {found.title}, not on {arg.device}"
        if found.capability(arg.device) < LOWEST_CAPABILITY:
            major, minor = found.capability(arg.device)
            return f"the kernels need compute capability 8.0 or later, and {arg.device} has {major}.{minor}"
        if arg.dtype == torch.float64:
            return "the kernels have no float64"
    reason: str | None = getattr(_page(op), f"why_not{PAGES[op][1]}")(direction, call)
    return reason


def _launcher(op: str, direction: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        with current().launching(device):
            return getattr(_page(op), f"{direction}{PAGES[op][1]}")(*args)

    launch.in_python = True  # type: ignore[attr-defined]
    return launch


def register() -> None:
    """Make the Triton backend known, and give it to every op."""
    dispatch.add_backend(dispatch.Backend("triton", ("cuda",), lambda: why_not()))
    for op in PAGES:
        dispatch.OPS[op].register(
            "triton", _launcher(op, "forward"), _launcher(op, "backward"), functools.partial(_call_why_not, op)
        )
