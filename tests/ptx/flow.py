"""The kernel as steps in basic blocks, and which registers live on where."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from ptx.operands import Address, Instruction, Negated, Operand, Register, Unsupported, Vector
from ptx.step import Packed, Step, step_of
from ptx.text import Kernel

END = -1


def registers_in(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Negated):
        yield operand.register.name
    elif isinstance(operand, Address):
        yield from registers_in(operand.base)
        for each in operand.coordinates:
            yield from registers_in(each)
    elif isinstance(operand, Vector):
        for each in operand.items:
            yield from registers_in(each)


def reads(instruction: Instruction, step: Step | None) -> set[str]:
    found = {instruction.guard.register.name} if instruction.guard else set()
    for source in step.sources if step else ():
        if isinstance(source, Packed):
            found.update(each.name for each in source.registers)
        else:
            found.update(registers_in(source[0]))
    return found


def writes(step: Step | None) -> set[str]:
    found: set[str] = set()
    for result in step.results if step else ():
        if isinstance(result, Packed):
            found.update(each.name for each in result.registers)
        else:
            found.add(result[0].name)
    found.discard("_")
    return found


class Flow:
    """A kernel's instructions with their steps, cut into blocks.

    Attributes:
        code: all instructions in order.
        steps: what each does; None for a branch or an end.
        begins: number of the first instruction of each block; a block goes on to the next one's begin.
        following: of each block, the blocks that may come next; END for the end.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for item in kernel.body:
            if isinstance(item, str):
                self.labels[item] = len(self.code)
            else:
                self.code.append(item)
        if not self.code or self.code[-1].name not in ("ret", "exit") or self.code[-1].guard:
            self.code.append(Instruction("ret", ()))
        self.steps = [None if self.ends(each) else step_of(each) for each in self.code]
        self.reads = [reads(each, step) for each, step in zip(self.code, self.steps, strict=True)]
        self.writes = [writes(step) for step in self.steps]
        targets = {self.target(each) for each in self.code if each.name == "bra"}
        targets |= {number + 1 for number, each in enumerate(self.code) if self.ends(each)}
        self.begins = sorted({0, *(each for each in targets if each < len(self.code))})
        self.block_at = {begin: number for number, begin in enumerate(self.begins)}
        self.following = [self._following(number) for number in range(len(self.begins))]
        self.live_out = self._live()

    @staticmethod
    def ends(instruction: Instruction) -> bool:
        return instruction.name in ("bra", "ret", "exit", "trap", "brkpt")

    def target(self, branch: Instruction) -> int:
        branch.begin()
        branch.flag("uni")
        branch.done()
        if branch.target not in self.labels:
            raise Unsupported(f"no label {branch.target}: {branch}")
        return self.labels[branch.target]

    def block(self, number: int) -> range:
        """Numbers of a block's instructions."""
        end = self.begins[number + 1] if number + 1 < len(self.begins) else len(self.code)
        return range(self.begins[number], end)

    def of(self, at: int) -> int:
        """The block that holds an instruction."""
        return bisect.bisect_right(self.begins, at) - 1

    def _following(self, number: int) -> tuple[int, ...]:
        last = self.block(number)[-1]
        instruction = self.code[last]
        following = (self.block_at[last + 1],) if last + 1 in self.block_at else (END,)
        if instruction.name == "bra":
            target = self.target(instruction)
            aim = (self.block_at[target],) if target in self.block_at else (END,)
            return aim + (following if instruction.guard else ())
        if self.ends(instruction):
            return (END,) + (following if instruction.guard else ())
        return following

    def _live(self) -> list[set[str]]:
        """Registers that live after each block."""
        count = len(self.begins)
        # what a block needs is what it reads before it writes, and what it leaves alone of what comes after
        needs = [self.before(number, self.begins[number], set()) for number in range(count)]
        sure = [
            set().union(*(self.writes[at] for at in self.block(number) if self.code[at].guard is None))
            for number in range(count)
        ]
        into: list[set[str]] = [set() for _ in range(count)]
        out: list[set[str]] = [set() for _ in range(count)]
        changed = True
        while changed:
            changed = False
            for number in reversed(range(count)):
                out[number] = set().union(*(into[each] for each in self.following[number] if each != END))
                live = needs[number] | (out[number] - sure[number])
                if len(live) != len(into[number]):
                    into[number], changed = live, True
        return out

    def before(self, block: int, at: int, live_out: set[str] | None = None) -> set[str]:
        """Registers that live before an instruction of a block."""
        live = set(self.live_out[block] if live_out is None else live_out)
        for number in reversed(range(at, self.block(block).stop)):
            if self.code[number].guard is None:
                live -= self.writes[number]
            else:
                live |= self.writes[number]  # what the guard switches off stays as it was
            live |= self.reads[number]
        return live
