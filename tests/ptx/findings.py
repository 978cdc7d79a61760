"""What a run finds: acts that a GPU leaves undefined, or does without a word."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptx.operands import Instruction

# kinds
BOUNDS = "out of bounds"
ALIGNMENT = "misaligned"
RACE = "race between warps"
FLIGHT = "touched while in flight"
PROGRAMS = "what another program wrote"
PROXY = "no fence.proxy.async"
REGISTERS = "wgmma registers touched while in flight"
HANG = "hang"
UNDEFINED = "undefined"


class Fault(RuntimeError):
    """A finding after which the kernel cannot go on."""


@dataclass
class Finding:
    """One kind of finding at one instruction.

    Attributes:
        kind: one of the constants above.
        kernel: its name.
        instruction: where.
        note: what was touched, and by whom, the first time.
        times: how often.
    """

    kind: str
    kernel: str
    instruction: Instruction
    note: str
    times: int = 1

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind} ({self.times}x): {self.note}\n    {self.instruction}"


@dataclass
class Findings:
    """The findings of a launch, by kind and instruction."""

    kernel: str
    found: dict[tuple[str, int], Finding] = field(default_factory=dict)

    def add(self, kind: str, instruction: Instruction, note: str) -> None:
        key = (kind, id(instruction))
        if key in self.found:
            self.found[key].times += 1
        else:
            self.found[key] = Finding(kind, self.kernel, instruction, note)

    def fail(self, kind: str, instruction: Instruction, note: str) -> Fault:
        """Add a finding; gives the error to raise."""
        self.add(kind, instruction, note)
        return Fault(str(self.found[(kind, id(instruction))]))

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.found.values())

    def __len__(self) -> int:
        return len(self.found)
