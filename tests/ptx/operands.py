"""What an instruction is made of: its opcode with modifiers, a guard, operands, and where it stands."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that the machine does not define."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware: %tid.x, %laneid."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable's address."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant as 64 bits (two's complement), or as a float where the text gave one."""

    bits: int
    number: float | None = None

    def of(self, dtype: str) -> float | int | bool:
        """Its value as a numpy dtype."""
        if dtype == "b1":
            return bool(self.bits)
        size = int(dtype[1])
        if dtype[0] == "f":
            if self.number is not None:
                return self.number
            code = {2: "<e", 4: "<f", 8: "<d"}[size]
            return float(struct.unpack(code, (self.bits & (2 ** (8 * size) - 1)).to_bytes(size, "little"))[0])
        bits = self.bits & (2 ** (8 * size) - 1)
        return bits - 2 ** (8 * size) if dtype[0] == "i" and bits >> (8 * size - 1) else bits


@dataclass(frozen=True)
class Vector:
    """{a, b, c, d}; also the two results of `d|p`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Negated:
    """!p: a predicate's opposite as an operand."""

    register: Register


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


Operand = Register | Special | Symbol | Immediate | Vector | Negated | Address


@dataclass(frozen=True)
class Guard:
    """@p or @!p before an instruction."""

    register: Register
    negated: bool


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        opcode: the whole of it, "ld.global.v4.b32".
        operands: in the order of the text, destinations first.
        guard: the predicate that switches it on, thread by thread.
        text: as it was written.
        line: number of its line in the PTX.
        source: file and line that the compiler says it comes from.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None = None
    text: str = ""
    line: int = 0
    source: str = ""
    target: str = ""  # label of a branch
    _modifiers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, *self._modifiers = self.opcode.split(".")

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" + (f"  ({self.source})" if self.source else "")

    # A definition takes the modifiers that it knows, one by one; what is left at the end is unknown, and raises.

    def begin(self) -> None:
        """Make all modifiers untaken."""
        _, *self._modifiers = self.opcode.split(".")

    def flag(self, *names: str) -> bool:
        """Take modifiers that may be there; whether any was."""
        there = [name for name in names if name in self._modifiers]
        for name in there:
            self._modifiers.remove(name)
        return bool(there)

    def one_of(self, names: str, default: str | None = None) -> str:
        """Take the first modifier that is one of `names`.

        Raises:
            Unsupported: none is there, and there is no default.
        """
        choices = names.split()
        for modifier in self._modifiers:
            if modifier in choices:
                self._modifiers.remove(modifier)
                return modifier
        if default is None:
            raise Unsupported(f"needs one of {', '.join(choices)}: {self}")
        return default

    def cached(self) -> None:
        """Take hints about caches, which change no value."""
        self._modifiers = [m for m in self._modifiers if not re.match(r"(L[12]::|nc$|ca$|cg$|cs$|lu$|cv$|wb$|wt$)", m)]

    def done(self) -> None:
        """Raise `Unsupported` where a modifier was not taken."""
        if self._modifiers:
            raise Unsupported(f"modifier {', '.join(self._modifiers)}: {self}")

    def refuse(self, why: str) -> Unsupported:
        return Unsupported(f"{why}: {self}")
