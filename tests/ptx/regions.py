"""Global memory: tensors of the host, each under addresses of its own, so that nothing lies beside it.

An address tells its state space by its upper bits, as generic addresses do: 0 in `WINDOWS` for global memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from ptx.findings import ALIGNMENT, BOUNDS, PROGRAMS
from ptx.operands import Instruction, Unsupported

WINDOWS = {"global": 0, "const": 0, "param": 0, "shared": 1 << 56, "local": 1 << 57}
ACCESS = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("i4"), 8: np.dtype("i8")}
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
_EACH = 44  # bits of a region's addresses


class Several(Unsupported):
    """One instruction reaches several tensors."""


ATOMIC = -1  # stands for a CTA's number where atomics wrote


class Region:
    """Memory that a kernel may touch.

    Args:
        number: which one it is, the upper bits of its addresses.
        name: as findings name it.
        address: on the host. The alignment to 16 bytes is kept.
        nbytes: how much of it may be touched.
        item: bytes of an element, the grain in which writers are told apart.
        owner: what keeps the memory alive.
    """

    def __init__(self, number: int, name: str, address: int, nbytes: int, item: int, owner: Any = None) -> None:
        self.name, self.item, self.owner = name, item, owner
        begin = address & ~15
        self.low, self.high = address - begin, address - begin + nbytes
        self.base = (number << _EACH) + (1 << (_EACH - 1))
        self.size = -(-self.high // 16) * 16 if nbytes else 0
        self.arrays: dict[int, Any] = {}
        if nbytes:
            whole = np.frombuffer((ctypes.c_uint8 * self.size).from_address(begin), "u1")
            self.arrays = {size: whole.view(dtype) for size, dtype in ACCESS.items()}
        self.stamps: Any = None  # when it was written, where the kernel publishes
        self.writers: Any = None  # CTA number + 1 of each element's writer in this launch, -1 for atomics

    @property
    def address(self) -> int:
        return self.base + self.low

    def note_atomic(self, elements: Any, steps: int) -> None:
        """Elements that atomics change belong to no CTA, unless one has written them before."""
        if self.writers is None:
            self.writers = np.zeros(max(1, self.size // self.item), "i4")
        touched = np.unique(elements[..., None] + np.arange(steps))
        fresh = touched[self.writers[touched] == 0]
        self.writers[fresh] = ATOMIC


class Memory:
    """The regions of a launch.

    A program may read what another one wrote if that one has published it by a fence for the whole GPU, and it has
    learnt of it by an atomic since.
    """

    def __init__(self, programs: int) -> None:
        self.regions: dict[int, Region] = {}
        self.now = 1
        self.published, self.learnt = np.zeros((2, programs + 1), "i8")  # by number of the CTA + 1

    def publish(self, numbers: Any) -> None:
        self.published[numbers] = self.now
        self.now += 1

    def learn(self, numbers: Any) -> None:
        self.learnt[numbers] = self.now
        self.now += 1

    def add(self, name: str, address: int, nbytes: int, item: int, owner: Any = None) -> int:
        """Make host memory reachable; gives its address for the kernel."""
        number = len(self.regions) + 1
        self.regions[number] = Region(number, name, address, nbytes, item, owner)
        return self.regions[number].address

    def add_array(self, name: str, array: np.ndarray) -> int:
        return self.add(name, array.ctypes.data, array.nbytes, array.itemsize, array)

    def place(self, strand: Any, address: Any, mask: Any, nbytes: int, instruction: Instruction) -> tuple[Region, Any]:
        """The region that an access goes to, and its offsets there; those of idle threads are in bounds too.

        Raises:
            Fault: an address is outside of every region, or is no multiple of the access's size.
            Several: all is well, but for the regions being several.
        """
        if mask is None:
            first = int(address.flat[0])
        else:
            address = np.broadcast_to(address, mask.shape)
            first = int(address[mask][0])
        region = self.regions.get(first >> _EACH)
        if region is not None:
            offset = address - region.base
            if mask is not None:
                offset = np.where(mask, offset, first - region.base)
            misaligned = (offset & (nbytes - 1)).any()
            if not misaligned and offset.min() >= region.low and offset.max() + nbytes <= region.high:
                return region, offset
        raise self._explain(strand, address, mask, nbytes, instruction)

    def _explain(self, strand: Any, address: Any, mask: Any, nbytes: int, instruction: Instruction) -> Exception:
        shape = (strand.group.count, strand.group.threads)
        address = np.broadcast_to(address, shape)
        mask = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
        findings = strand.group.launch.findings
        for cta, thread in zip(*np.nonzero(mask), strict=True):
            at = int(address[cta, thread])
            who = f"{nbytes} bytes by thread {int(thread)} of program {int(strand.group.ctas[cta])}"
            region = self.regions.get(at >> _EACH)
            if region is None:
                return findings.fail(BOUNDS, instruction, f"{who} at {at:#x}, which is no argument's memory")
            offset = at - region.base
            if offset < region.low or offset + nbytes > region.high:
                size = region.high - region.low
                note = f"{who} at byte {offset - region.low} of {region.name}, which has {size}"
                return findings.fail(BOUNDS, instruction, note)
            if offset & (nbytes - 1):
                return findings.fail(ALIGNMENT, instruction, f"{who} at byte {offset - region.low} of {region.name}")
        return Several(f"one access to several tensors: {instruction}")

    @staticmethod
    def _parts(strand: Any, address: Any, mask: Any) -> Iterator[Any]:
        """Masks of the threads that reach one region each."""
        shape = (strand.group.count, strand.group.threads)
        address = np.broadcast_to(address, shape)
        mask = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
        numbers = address >> _EACH
        for number in np.unique(numbers[mask]):
            yield mask & (numbers == number)

    def load(self, strand: Any, address: Any, size: int, count: int, mask: Any, instruction: Instruction) -> list[Any]:
        """`count` elements of `size` bytes for each thread; those of idle threads are arbitrary."""
        try:
            region, offset = self.place(strand, address, mask, size * count, instruction)
        except Several:
            values = [np.zeros((1, 1), ACCESS[size])] * count
            for part in self._parts(strand, address, mask):
                found = self.load(strand, address, size, count, part, instruction)
                values = [np.where(part, new, old) for new, old in zip(found, values, strict=True)]
            return values
        index = offset >> _SHIFT[size]
        if region.writers is not None:
            self._trace(strand, region, offset, size * count, mask, instruction, writes=False)
        array = region.arrays[size]
        return [array.take(index + n if n else index) for n in range(count)]

    def store(
        self, strand: Any, address: Any, size: int, values: list[Any], mask: Any, instruction: Instruction
    ) -> None:
        try:
            region, offset = self.place(strand, address, mask, size * len(values), instruction)
        except Several:
            for part in self._parts(strand, address, mask):
                self.store(strand, address, size, values, part, instruction)
            return
        shape = (strand.group.count, strand.group.threads)
        index = np.broadcast_to(offset >> _SHIFT[size], shape)
        array = region.arrays[size]
        if mask is not None:
            mask = np.broadcast_to(mask, shape)
            index = index[mask]
        for n, value in enumerate(values):
            value = np.broadcast_to(value, shape)
            array[index + n] = value if mask is None else value[mask]
        self._trace(strand, region, offset, size * len(values), mask, instruction, writes=True)

    def _trace(
        self, strand: Any, region: Region, offset: Any, nbytes: int, mask: Any, instruction: Instruction, writes: bool
    ) -> None:
        """Find what one CTA reads or writes of another's writes in this launch."""
        if region.writers is None:
            region.writers = np.zeros(max(1, region.size // region.item), "i4")
        steps = max(1, nbytes // region.item)
        group = strand.group
        me = np.broadcast_to(group.numbers, (group.count, offset.shape[1] if mask is None else mask.shape[1]))
        elements = np.broadcast_to(offset // region.item, me.shape)
        if mask is not None:
            mask = np.broadcast_to(mask, me.shape)
            elements, me = elements[mask], me[mask]
        if steps > 1:
            elements = elements[..., None] + np.arange(steps)
            me = me[..., None]
        before = region.writers[elements]
        bad = (before > 0) & (before != me)
        if bad.any() and not writes and region.stamps is not None:
            seen = (region.stamps[elements] <= self.published[before]) & (self.published[before] <= self.learnt[me])
            bad &= ~seen
        if writes:
            region.writers[elements] = me
            bad |= region.writers[elements] != me
            if region.stamps is None:
                region.stamps = np.zeros(len(region.writers), "i8")
            region.stamps[elements] = self.now
        if bad.any():
            word = "writes" if writes else "reads"
            note = f"{word} element {int(elements[bad].flat[0])} of {region.name}"
            group.launch.findings.add(PROGRAMS, instruction, note)

    def read_bytes(self, strand: Any, addresses: Any, size: int, instruction: Instruction) -> Any:
        """Elements at addresses of one region, for a bulk copy."""
        region, offset = self._row(strand, addresses, size, instruction)
        return region.arrays[size].take(offset >> _SHIFT[size])

    def write_bytes(
        self, strand: Any, line: int, addresses: Any, values: Any, size: int, instruction: Instruction
    ) -> None:
        region, offset = self._row(strand, addresses, size, instruction)
        region.arrays[size][offset >> _SHIFT[size]] = values
        if region.writers is None:
            region.writers = np.zeros(max(1, region.size // region.item), "i4")
        elements = np.unique(offset // region.item)
        me = int(strand.group.numbers[line, 0])
        if ((region.writers[elements] != 0) & (region.writers[elements] != me)).any():
            strand.group.launch.findings.add(PROGRAMS, instruction, f"writes to {region.name}")
        region.writers[elements] = me

    def _row(self, strand: Any, addresses: Any, size: int, instruction: Instruction) -> tuple[Region, Any]:
        region = self.regions.get(int(addresses[0]) >> _EACH)
        if region is not None:
            offset = addresses - region.base
            if offset.min() >= region.low and offset.max() + size <= region.high:
                return region, offset
        note = f"a bulk copy of {len(addresses) * size} bytes at {int(addresses[0]):#x}"
        raise strand.group.launch.findings.fail(BOUNDS, instruction, note)
