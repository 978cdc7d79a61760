"""What SASS does to a WGMMA's operands: registers must stay until it is waited for, shared memory must be fenced.

`HGMMA D, A, B, D` with A in registers reads them after it was issued. `gsb0` closes a group of products, and
`WARPGROUP.DEPBAR.LE gsb0, n` waits until n groups are left. A write to A before that is undefined in PTX; a loop that
is pipelined writes the next step's operand there across its back edge.

Out of shared memory a product reads through the asynchronous proxy. `LDGSTS` (cp.async) writes there through the
generic one, so between `DEPBAR.LE SB0`, which waits for it, and the product there has to be `FENCE.VIEW.ASYNC`
(fence.proxy.async).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_PRODUCT = re.compile(r"^HGMMA\.\S+\s+R\d+,\s+R(\d+)\b")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE\s+gsb0,\s+(\w+)")
_JUMP = re.compile(r"^BRA\b.*`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^!?U?P(\d|T)$")
_REGISTER = re.compile(r"^R(\d+)(\.\w+)*$")
# the first register behind these is none that they write
_READS = re.compile(r"^(WARPSYNC|RET|BRX|JMX|BAR|NANOSLEEP|HGMMA|\w*SETP2?|FCHK|R2P|PLOP3)$")
_A = 4  # registers of A: 64 rows of 32 bytes over the 128 threads of a warpgroup


def overwritten(instructions: Sequence[str], labels: Mapping[str, int]) -> list[str]:
    """The instructions that write a register of A while a product that reads it may be in flight, each once.

    Args:
        instructions: of a kernel, in order, without predicates.
        labels: the index of the instruction behind each label.
    """
    found: dict[int, str] = {}
    groups: list[set[int]] = []  # registers that closed groups read, the oldest first
    group: set[int] = set()
    for index in _walk(instructions, labels):
        instruction = instructions[index]
        if wait := _WAIT.match(instruction):
            left = int(wait.group(1), 0)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
        if not group.union(*groups).isdisjoint(written(instruction)):
            found[index] = instruction
        if product := _PRODUCT.match(instruction):
            group.update(range(int(product.group(1)), int(product.group(1)) + _A))
        if instruction.startswith("HGMMA") and "gsb0" in instruction:
            groups.append(group)
            group = set()
    return list(found.values())


def unfenced(instructions: Sequence[str], labels: Mapping[str, int]) -> list[str]:
    """The products before which copies were waited for and not fenced, each once; arguments as above."""
    found: dict[int, str] = {}
    copied = landed = False
    for index in _walk(instructions, labels):
        instruction = instructions[index]
        copied = copied or instruction.startswith("LDGSTS")
        landed = landed or (copied and instruction.startswith("DEPBAR.LE SB0"))
        if instruction.startswith("FENCE.VIEW.ASYNC"):
            landed = False
        if landed and instruction.startswith("HGMMA"):
            found[index] = instruction
    return list(found.values())


def _walk(instructions: Sequence[str], labels: Mapping[str, int]) -> Iterator[int]:
    """Indices in order, each loop gone through twice: behind a jump back comes its body again."""
    for index, instruction in enumerate(instructions):
        yield index
        jump = _JUMP.match(instruction)
        if jump and (begin := labels.get(jump.group(1), index)) < index:
            yield from range(begin, index + 1)


def written(instruction: str) -> range:
    """The numbers of the registers that an instruction writes."""
    opcode, _, operands = instruction.rstrip(" ;").partition(" ")
    name, *flags = opcode.split(".")
    if _READS.match(name):
        return range(0)
    given = (each.strip() for each in operands.split(","))
    first = next((each for each in given if not _PREDICATE.match(each)), "")
    register = _REGISTER.match(first)
    if register is None:
        return range(0)
    begin = int(register.group(1))
    return range(begin, begin + _width(name, flags))


def _width(name: str, flags: Sequence[str]) -> int:
    """How many registers an instruction writes from the first one on."""
    if name == "HMMA" or "128" in flags:
        return 2 if name == "HMMA" and "F16" in flags else 4
    if name == "LDSM":
        return int(flags[-1]) if flags[-1].isdigit() else 1
    return 2 if "64" in flags or "WIDE" in flags or (name == "CS2R" and "32" not in flags) else 1
