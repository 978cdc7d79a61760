"""What runs: a launch, its CTAs a cohort at a time, and strands of threads that are at one instruction together."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.findings import Findings
from ptx.flights import Queue
from ptx.operands import Instruction
from ptx.order import Order
from ptx.regions import Memory

SHARED = 1024  # where shared memory begins; below it the hardware keeps its own
VIEWS = {1: "u1", 2: "u2", 4: "i4", 8: "i8"}


class Launch:
    """What all CTAs of a launch share.

    Attributes:
        program: the translated kernel.
        memory: global memory.
        parameters: bytes of the parameters, and where each begins.
        tensor_maps: TMA descriptors by address.
        partial: lines of global accesses and of branches whose guard was off for some thread, and on for others.
        executed: instructions, counted once for all threads that run them together.
    """

    def __init__(self, program: Any, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int) -> None:
        self.program, self.grid, self.block = program, grid, block
        self.threads = block[0] * block[1] * block[2]
        self.dynamic = shared
        self.shared = program.static_shared + shared
        self.memory = Memory(grid[0] * grid[1] * grid[2])
        self.findings = Findings(program.kernel.name)
        self.constants: dict[str, int] = {}  # address of each parameter and module-wide variable
        self.tensor_maps: dict[int, Any] = {}
        self.partial: set[int] = set()
        self.executed = 0
        self.order: type[Order] = Order


class Cohort:
    """Some CTAs of a launch with their memories; `rows` of arrays are CTAs."""

    def __init__(self, launch: Launch, ctas: np.ndarray) -> None:
        self.launch, self.ctas = launch, ctas
        self.threads, self.warps = launch.threads, -(-launch.threads // 32)
        count = len(ctas)
        self.bytes = max(16, -(-launch.shared // 16) * 16)
        flat = np.full(count * self.bytes + 16, 255, "u1")  # at its end a place where idle threads write
        self.shared = {size: flat.view(dtype) for size, dtype in VIEWS.items()}
        self.nowhere = {size: count * self.bytes // size for size in VIEWS}
        local = max(16, -(-launch.program.local // 16) * 16)
        self.local_bytes = local
        self.local = np.full((count * launch.threads * local if launch.program.local else 16) + 16, 255, "u1")
        self.order = launch.order(count, self.warps, self.bytes, launch.program.grain)
        self.copies = Queue(count, self.threads)
        self.products = Queue(count, self.threads)
        self.bulk = Queue(count, self.threads)
        self.mbarriers: dict[int, Any] = {}
        self.barriers: dict[int, Any] = {}  # named barriers
        self.exited = np.zeros((count, self.threads), bool)


class Group:
    """CTAs of a cohort whose threads are run against each other until they end."""

    def __init__(self, cohort: Cohort, rows: np.ndarray) -> None:
        self.cohort, self.rows, self.launch = cohort, rows, cohort.launch
        self.count, self.threads, self.warps = len(rows), cohort.threads, cohort.warps
        self.ctas = cohort.ctas[rows]
        x, y, _ = self.launch.grid
        column = self.ctas[:, None]
        self.numbers = (column + 1).astype("i4")
        self.ctaid = {"x": column % x, "y": column // x % y, "z": column // (x * y)}
        self.base = {size: (rows.astype("i8") * (cohort.bytes // size))[:, None] for size in VIEWS}
        self.lines = rows[:, None]
        self.warp = (np.arange(self.threads, dtype="i8") // 32)[None, :]
        self.strands: list[Strand] = []
        self.events = 0  # segments run while threads are apart: what a waiting strand looks out for


class Strand:
    """Threads that are at the same instruction.

    Attributes:
        group: the CTAs that they belong to.
        at: number of the next instruction.
        mask: [CTAs, threads], who they are; None for all threads of the group's CTAs.
        registers: arrays [CTAs or 1, threads or 1] by number of the register.
    """

    def __init__(self, group: Group, at: int, mask: Any, registers: list[Any]) -> None:
        self.group, self.at, self.mask, self.registers = group, at, mask, registers
        self.parked = -1  # `events` of its group when it began to wait
        self.turns = 0

    def active(self, guard: Any) -> Any:
        """Who of the threads is switched on: a mask, or None for all. A mask that is on for nobody has no True."""
        if self.mask is not None:
            return self.mask if guard is None else self.mask & guard
        if guard is None or guard.all():
            return None
        return np.broadcast_to(guard, (self.group.count, self.group.threads))

    def everywhere(self, guard: Any = None) -> Any:
        """The same for all CTAs of the cohort, [CTAs, threads]."""
        active = self.active(guard)
        full = np.zeros(self.group.cohort.exited.shape, bool)
        full[self.group.rows] = True if active is None else active
        return full

    def full(self, value: Any) -> Any:
        """A value of every thread."""
        return np.broadcast_to(value, (self.group.count, self.group.threads))

    def uniform(self, value: Any, guard: Any, instruction: Instruction) -> Any:
        """A value that the active threads of each CTA have to share, [CTAs]."""
        value = self.full(value)
        active = self.active(guard)
        first = value[:, 0] if active is None else value[np.arange(len(value)), active.argmax(1)]
        same = value == first[:, None]
        if not (same if active is None else same | ~active).all():
            raise instruction.refuse("threads of a block differ")
        return first
