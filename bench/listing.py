"""What `nvdisasm` prints of a kernel: its instructions, and where control goes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"^([.$\w]+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*)")
_TARGET = re.compile(r"`\(([^)]+)\)")
_LEAVES = re.compile(r"^(BRA\S*\s+`|EXIT|KILL|RET|BRX|JMX)")  # BRA with a condition among its operands may go on
_INDIRECT = re.compile(r"^(RET|BRX|JMX)")


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, its entry the first.

    Attributes:
        instructions: without their predicates.
        labels: the index of the instruction behind each label.
        predicated: the indices of those that a predicate may skip.
    """

    instructions: Sequence[str]
    labels: Mapping[str, int]
    predicated: frozenset[int]

    def jump(self, index: int) -> int | None:
        """The index that an instruction may jump to by its label, or None."""
        target = _TARGET.search(self.instructions[index])
        return self.labels.get(target.group(1)) if target else None

    def jump_back(self, index: int) -> int | None:
        """The index that a branch goes back to, or None."""
        target = self.jump(index) if self.instructions[index].startswith("BRA") else None
        return target if target is not None and target < index else None

    def followers(self, index: int) -> set[int]:
        """The indices that control may go to from an instruction; a jump to an address may go to any label."""
        instruction, target = self.instructions[index], self.jump(index)
        found = set() if target is None else {target}
        if _INDIRECT.match(instruction):
            calls = (number + 1 for number, each in enumerate(self.instructions) if each.startswith("CALL"))
            found.update(self.labels.values(), calls)
        if index in self.predicated or not _LEAVES.match(instruction):
            found.add(index + 1)
        return {each for each in found if each < len(self.instructions)}


def parse(listing: str) -> Listing:
    """Read what `nvdisasm -c` prints of a kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    predicated: set[int] = set()
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            if instruction.group(1):
                predicated.add(len(instructions))
            instructions.append(instruction.group(2).rstrip(" ;"))
    return Listing(instructions, labels, frozenset(predicated))
