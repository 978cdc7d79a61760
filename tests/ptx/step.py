"""What an instruction is translated to, and the table of definitions that the families fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptx.operands import Immediate, Instruction, Operand, Register, Vector

# PTX type: numpy dtype of its values. A bfloat16 is its 16 bits; a packed pair is its 32.
DTYPES = {
    "pred": "b1", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "i4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "b64": "i8", "u64": "u8",
    "s64": "i8", "f64": "f8",
}  # fmt: skip
INTEGERS = "u16 u32 u64 s16 s32 s64"
BITS = "b16 b32 b64"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a matrix's elements lie in the registers of a warp or warp group.

    Args:
        gather: (strand, arrays of the registers) to matrices [CTAs, warps or groups, rows, columns].
        scatter: (strand, matrices) to the registers' arrays.
        dtype: of each register's array.
    """

    name: str
    gather: Callable[..., Any]
    scatter: Callable[..., Any] | None = None
    dtype: str = "i4"


@dataclass(frozen=True)
class Packed:
    """Registers that hold a matrix together."""

    layout: Layout
    registers: tuple[Register, ...]


Source = tuple[Operand, str] | Packed
Result = tuple[Register, str] | Packed


@dataclass
class Step:
    """One instruction as a call.

    Attributes:
        function: takes the sources' arrays, gives the result's array (a list of them where there are several). Where
            `machine` is set it takes the strand first and `guard=` last: a mask of threads, or None for all.
        sources: operands, each with the dtype to read it as.
        results: registers, each with the dtype of what the function gives.
        converges: the threads of a warp, or of a block, have to come together here.
        wide: sources may be registers wider than their dtype, which are cut (ld, st, cvt).
    """

    function: Callable[..., Any]
    sources: tuple[Source, ...] = ()
    results: tuple[Result, ...] = ()
    machine: bool = False
    converges: str = ""  # "warp", "barrier", "phase"
    wide: bool = False


Definition = Callable[[Instruction], Step]
DEFINITIONS: dict[str, Definition] = {}


def define(*names: str) -> Callable[[Definition], Definition]:
    """Register the definition of opcodes by the part before the first dot."""

    def register(definition: Definition) -> Definition:
        for name in names:
            assert name not in DEFINITIONS, name
            DEFINITIONS[name] = definition
        return definition

    return register


def step_of(instruction: Instruction) -> Step:
    """The step of an instruction.

    Raises:
        Unsupported: the opcode, a modifier or an operand has no definition.
    """
    definition = DEFINITIONS.get(instruction.name)
    if definition is None:
        raise instruction.refuse(f"opcode {instruction.name}")
    instruction.begin()
    try:
        step = definition(instruction)
    except (ValueError, IndexError, AttributeError) as error:
        raise instruction.refuse(f"operands ({error})") from error
    instruction.done()
    return step


def simple(instruction: Instruction, function: Callable[..., Any], result: str, *sources: str) -> Step:
    """A step whose first operand is the result and whose others are the sources."""
    destination, *rest = instruction.operands
    if len(rest) != len(sources):
        raise instruction.refuse(f"got {len(rest)} sources; needs {len(sources)}")
    return Step(function, tuple(zip(rest, sources, strict=True)), ((register(instruction, destination), result),))


def register(instruction: Instruction, operand: Operand) -> Register:
    if not isinstance(operand, Register):
        raise instruction.refuse(f"destination {operand}")
    return operand


def registers(instruction: Instruction, operand: Operand) -> tuple[Register, ...]:
    """The registers of a vector operand, or the single one."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    return tuple(register(instruction, each) for each in items)


def number(instruction: Instruction, operand: Operand) -> int:
    """An operand that has to be a constant."""
    if not isinstance(operand, Immediate):
        raise instruction.refuse(f"{operand} is not a constant")
    return int(operand.of("i8"))


def unsigned(dtype: str) -> str:
    return dtype.replace("i", "u")
