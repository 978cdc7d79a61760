"""wgmma's registers between the product and its wait: nobody may touch them, and no run is needed to see it.

The accumulators of a product, and its A operand where that is in registers, belong to the hardware until a
`wgmma.wait_group` has waited for the group that the product was committed to. Only further products may use the same
accumulators.
"""

from __future__ import annotations

from collections.abc import Iterator

from ptx.findings import REGISTERS, Findings
from ptx.flow import END, Flow
from ptx.operands import Instruction, Vector
from ptx.step import number

_DEEPEST = 8  # groups told apart
_Registers = dict[str, str]  # register: "accumulator" or "operand"
_Groups = tuple[tuple[tuple[str, str], ...], ...]  # the open group last


def _is(instruction: Instruction, what: str) -> bool:
    return instruction.opcode.startswith(f"wgmma.{what}")


def _after(groups: list[_Registers], instruction: Instruction) -> list[_Registers]:
    """The groups in flight after an instruction."""
    if _is(instruction, "mma_async"):
        new = dict(groups[-1])
        operand = instruction.operands[1]
        if isinstance(operand, Vector):
            new |= {each.name: "operand" for each in operand.items}  # type: ignore[union-attr]
        new |= {each.name: "accumulator" for each in instruction.operands[0].items}  # type: ignore[union-attr]
        return [*groups[:-1], new]
    if _is(instruction, "commit_group"):
        return [*groups, {}][-_DEEPEST:]
    if _is(instruction, "wait_group"):
        return groups[max(0, len(groups) - 1 - number(instruction, instruction.operands[0])) :]
    return groups


def _joined(a: list[_Registers], b: list[_Registers]) -> list[_Registers]:
    """What may be in flight where two ways meet."""
    depth = max(len(a), len(b))
    a, b = ([{}] * (depth - len(each)) + each for each in (a, b))
    return [x | y for x, y in zip(a, b, strict=True)]


def entering(flow: Flow) -> list[list[_Registers]]:
    """The groups that may be in flight where each block begins."""
    found: list[list[_Registers] | None] = [None] * len(flow.begins)
    found[0] = [{}]
    work = [0]
    while work:
        block = work.pop()
        groups = found[block] or [{}]
        for at in flow.block(block):
            groups = _after(groups, flow.code[at])
        for following in flow.following[block]:
            if following == END:
                continue
            old = found[following]
            new = groups if old is None else _joined(old, groups)
            if new != old:
                found[following] = new
                work.append(following)
    return [each or [{}] for each in found]


def touched(flow: Flow) -> Iterator[tuple[Instruction, str]]:
    """Instructions that touch registers of a product in flight, and how."""
    for block, groups in enumerate(entering(flow)):
        for at in flow.block(block):
            instruction = flow.code[at]
            flying: _Registers = {}
            for group in groups:
                flying |= group
            if flying:
                product = _is(instruction, "mma_async")
                for name in sorted(flow.writes[at] & flying.keys()):
                    if not (product and flying[name] == "accumulator"):
                        yield instruction, f"writes {name}: {flying[name]} of a product in flight"
                for name in sorted(flow.reads[at] & flying.keys()):
                    if flying[name] == "accumulator" and not product:
                        yield instruction, f"reads {name}: accumulator of a product in flight"
            groups = _after(groups, instruction)


def check(flow: Flow, findings: Findings) -> None:
    for instruction, note in touched(flow):
        findings.add(REGISTERS, instruction, note)
