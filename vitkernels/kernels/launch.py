"""Launches: Triton's JIT compiles a kernel for a kind of arguments; a later call of that kind goes straight to it.

The JIT binds arguments, looks at each one and hashes what it saw, at every call: that takes longer than the launch.
What decides about the compiled kernel is known here more cheaply: dtypes and alignment of tensors, integers (which the
JIT looks at for 1 and for multiples of 16) and constants by value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from vitkernels import dispatch, tape
from vitkernels.kernels.device import interpreting

_MOST = 4096  # kinds of launches that are remembered
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # kernel, and the constants behind its arguments


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size` elements; Triton's own, which also serves inside kernels, takes longer."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options).

    Args:
        kernel: a function under `triton.jit`.
        grid: up to three numbers of programs.
        args: tensors, integers, floats and None, in the kernel's order, up to its constants.
        options: the constants by name, and num_warps, num_stages, maxnreg.
    """
    recording = tape.recording()
    if recording is None:
        _launch(kernel, grid, args, options)
        return
    with torch._C.DisableTorchFunction():  # what Triton asks of tensors is no part of a tape
        compiled = _launch(kernel, grid, args, options)
    if compiled is None:
        recording.why_not = "launches go through Triton's JIT"
    else:
        _note(recording, grid, args, *compiled)


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]] | None:
    """Launch; gives the compiled kernel and the constants behind its arguments, None where the JIT launched it."""
    if interpreting() or _hooked(kernel):
        kernel[grid](*args, **options)
        return None
    # in line: a call for each of some thirty arguments would take longer than all else here
    kinds = [
        (arg.dtype, arg.data_ptr() % 16 == 0)
        if isinstance(arg, Tensor)
        else (arg.base.dtype, tuple(arg.block_shape), arg.padding)
        if isinstance(arg, TensorDescriptor)
        else arg
        for arg in args
    ]
    device = next(each.device for arg in args if isinstance(each := getattr(arg, "base", arg), Tensor))
    key = kernel, device, dispatch.generation(), *kinds, *options.items()
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **options)
        if compiled is None:  # another process compiles it, says a hook of Triton's
            return None
        if len(_compiled) == _MOST:
            _compiled.clear()
        defaults = {each.name: each.default for each in kernel.params}
        constants = tuple(options.get(name, defaults[name]) for name in kernel.arg_names[len(args) :])
        known = _compiled[key] = compiled, constants
        return known
    compiled, constants = known
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    programs = (*grid, 1, 1)[:3]
    compiled.run(*programs, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants)
    return known


def _note(
    recording: Any, grid: tuple[int, ...], args: tuple[Any, ...], compiled: Any, constants: tuple[Any, ...]
) -> None:
    """Put the launch of a compiled kernel on a tape."""
    device = driver.active.get_current_device()
    x, y, z = (*grid, 1, 1)[:3]
    space = {
        "run": compiled.run,
        "stream": driver.active.get_current_stream,
        "device": device,
        "function": compiled.function,
        "metadata": compiled.packed_metadata,
    }
    text = f"{{run}}({x}, {y}, {z}, {{stream}}({{device}}), {{function}}, {{metadata}}, None, None, None, {{}})"
    recording.launch(text, (*args, *constants), space, _ready(device))


@functools.cache
def _ready(device: Any) -> Callable[[], bool]:
    """Whether launches on a device may go past the JIT: it is the current one, and nobody asked to be told of them."""
    runtime = knobs.runtime

    def ready() -> bool:
        hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
        return not (hooks or runtime.debug) and driver.active.get_current_device() == device

    return ready


def _hooked(kernel: Any) -> bool:
    """Whether somebody asked Triton to tell of launches: a profiler, or a debugger."""
    runtime = knobs.runtime
    hooks = kernel.pre_run_hooks or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    return bool(hooks or runtime.debug)
