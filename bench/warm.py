"""Compile what a call launches, from the call's own arguments and without a GPU: a launch that ends at the driver.

The JIT specialises a kernel for strides, sizes and alignments, so what is compiled from anything but the call's own is
compiled once more by the call. Arguments are on torch's meta device; kernels come into Triton's cache on disk, where
another process that makes the call on a GPU finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ptx.driver import Gpu
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import sass
from bench.sass import Reading
from vitkernels.kernels.device import stand_in


@dataclass
class _Driver:
    """What Triton's JIT asks of a driver. It keeps what it should load, and launches nothing.

    Attributes:
        capability: 90 for 9.0.
        readings: by the kernel's name, the last one of a name.
    """

    capability: int
    readings: dict[str, Callable[[], Reading]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unlimited = {"max_shared_mem": 2**31}  # what does not fit is the audit's to say
        self.utils = SimpleNamespace(get_device_properties=lambda device: unlimited, load_binary=self._load)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._metadata = metadata
        return lambda *launch: None

    def _load(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        threads, scratch = 32 * self._metadata.num_warps, self._metadata.global_scratch_size
        self.readings[name] = lambda: sass.reading(binary, threads, shared, scratch)
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> Any:
        return id(self)  # kernels are kept by device: each driver sees all of its own

    def get_current_stream(self, device: Any) -> int:
        return 0


def read(call: Callable[[], Any], kernel: str, capability: int, processors: int) -> Reading:
    """Compile all that a call launches, and read one of its kernels.

    Args:
        call: of a launcher, with tensors of the meta device.
        kernel: the name of its function.
        capability: 90 for 9.0.
        processors: multiprocessors of the GPU.

    Raises:
        KeyError: the call does not launch the kernel.
        Exception: whatever triton or ptxas raise for a kernel that does not compile.
    """
    try:
        before = driver.active
    except RuntimeError:  # there is no GPU
        before = None
    made = _Driver(capability)
    driver.set_active(made)
    try:
        major, minor = divmod(capability, 10)
        with stand_in(Gpu((major, minor), processors, kind="meta", title="no device")):
            call()
    finally:
        driver.set_active(before)
    return made.readings[kernel]()
