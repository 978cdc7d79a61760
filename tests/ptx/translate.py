"""Blocks to Python functions: a line for each instruction, which calls what its family defines.

    r5 = op12(r3, r4.view(i4))             # add.s32 %r5, %r3, %r4
    r7 = merge(r6, op13(r5, k2), r7)       # @%p6 shl.b32 %r7, %r5, 2

A function takes the strand, reads registers that come from elsewhere out of `R`, puts back those that live on, and
gives the number of the next instruction, or (condition, taken, other) where threads may part. Results of matrix
instructions stay whole matrices until an instruction wants one of their registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.flow import END, Flow
from ptx.operands import (
    Address,
    Guard,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Special,
    Symbol,
)
from ptx.special import SPECIALS
from ptx.step import DTYPES, Layout, Packed, Step
from ptx.text import Kernel

POISON = {"b1": False, "u1": 255, "u2": 0x7FFF, "i4": 0x7FC0DEAD, "f4": np.nan, "i8": 0x7FF0DEADBEEFDEAD, "f8": np.nan}
_INTEGERS = {1: "u1", 2: "u2", 4: "i4", 8: "i8"}


def merge(guard: Any, new: Any, old: Any) -> Any:
    """What a register holds after an instruction under a guard."""
    return new if guard.all() else np.where(guard, new, old)


class Translator:
    """The functions of a kernel, made as they are asked for.

    Args:
        kernel: the kernel.
        addresses: of its variables in shared and local memory.
    """

    def __init__(self, kernel: Kernel, addresses: dict[str, int]) -> None:
        self.kernel, self.flow, self.addresses = kernel, Flow(kernel), addresses
        self.dtypes = self._dtypes()
        self.slots = {name: number for number, name in enumerate(self.dtypes)}
        self.poison = [np.full((1, 1), POISON[dtype], dtype) for dtype in self.dtypes.values()]
        self.space: dict[str, Any] = {"merge": merge, "np": np}
        self.space |= {each: np.dtype(each) for each in ("i1", "i2", "f2", "u4", "u8", *POISON) if each != "b1"}
        self.constants: dict[tuple[Any, ...], str] = {}
        self._made: dict[tuple[int, bool], tuple[Callable[..., Any], int]] = {}

    def _dtypes(self) -> dict[str, str]:
        """The dtype that each register's array has: floats where a definition gives a float."""
        found = {}
        for name, kind in self.kernel.registers.items():
            dtype = DTYPES[kind]
            found[name] = dtype if dtype in ("b1", "f4", "f8") else _INTEGERS[int(dtype[1])]
        for step in self.flow.steps:
            for result in step.results if step else ():
                if isinstance(result, Packed):
                    for each in result.registers:
                        if result.layout.scatter is not None and found[each.name] == "i4":
                            found[each.name] = "f4"
                elif result[0].name != "_" and result[1] in ("f4", "f8") and result[1][1] == found[result[0].name][1]:
                    found[result[0].name] = result[1]
        return found

    def function(self, at: int, whole: bool) -> tuple[Callable[..., Any], int]:
        """The function that runs from an instruction on, and how many instructions it runs.

        Args:
            at: number of the first instruction.
            whole: up to the end of its block; otherwise only up to where threads have to come together.
        """
        key = (at, whole)
        if key not in self._made:
            end = self.flow.block(self.flow.of(at)).stop
            if not whole:
                steps = self.flow.steps
                end = next((n for n in range(at + 1, end) if steps[n] and steps[n].converges), end)
            self._made[key] = (_Segment(self, at, end).make(), end - at)
        return self._made[key]

    def live(self, at: int) -> list[int]:
        """Slots of the registers that live before an instruction."""
        return [self.slots[name] for name in self.flow.before(self.flow.of(at), at)]


class _Segment:
    """One function in the making."""

    def __init__(self, translator: Translator, begin: int, end: int) -> None:
        self.of, self.flow, self.begin, self.end = translator, translator.flow, begin, end
        self.lines: list[str] = []
        self.local: set[str] = set()  # registers that have a variable
        self.changed: set[str] = set()  # registers to put back, if they live on
        self.held: dict[str, tuple[str, int, Layout]] = {}  # registers inside of a matrix
        self.scattered: dict[str, str] = {}
        self.gathered: dict[tuple[Layout, tuple[Register, ...]], str] = {}
        self.used_by: dict[str, set[Any]] = {}
        self.count = 0

    def make(self) -> Callable[..., Any]:
        last = None
        for number in range(self.begin, self.end):
            step = self.flow.steps[number]
            if step is None:
                last = self.flow.code[number]
            else:
                self._step(self.flow.code[number], step)
        answer = self._answer(last)
        block = self.flow.of(self.begin)
        whole = self.end == self.flow.block(block).stop
        for name in sorted(self.flow.live_out[block] if whole else self.flow.before(block, self.end)):
            if name in self.changed:
                self.lines.append(f"R[{self.of.slots[name]}] = {self._variable(name)}")
        name = f"from_{self.begin}_to_{self.end}"
        body = _forget_early([*self.lines, answer])
        source = "\n    ".join([f"def {name}(t):", "R = t.registers", *body])
        exec(compile(source, f"<{self.of.kernel.name}>", "exec"), self.of.space)
        function: Callable[..., Any] = self.of.space.pop(name)
        return function

    def _answer(self, last: Instruction | None) -> str:
        """How the function returns. Values that it needs are read before registers are put back."""
        if last is None:
            return f"return {self.end if self.end < len(self.flow.code) else END}"
        taken = self.flow.target(last) if last.name == "bra" else END
        if last.name in ("trap", "brkpt"):
            raise last.refuse("a trap")
        if last.guard is None:
            return f"return {taken}"
        return f"return {self._guard(last.guard)}, {taken}, {self.end}"

    def _new(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    # ------------------------------------------------------------------------------------------------------ operands

    def _variable(self, name: str) -> str:
        """The variable that holds a register now."""
        variable = f"r{self.of.slots[name]}"
        if name in self.held:
            matrix, index, layout = self.held.pop(name)
            if matrix not in self.scattered:
                self.scattered[matrix] = self._new("s")
                assert layout.scatter is not None
                self.lines.append(f"{self.scattered[matrix]} = {self._named(layout.scatter)}(t, {matrix})")
            view = "" if self.of.dtypes[name] == "f4" else f".view({self.of.dtypes[name]})"
            self.lines.append(f"{variable} = {self.scattered[matrix]}[{index}]{view}")
            self.local.add(name)
        elif name not in self.local:
            self.lines.append(f"{variable} = R[{self.of.slots[name]}]")
            self.local.add(name)
        return variable

    def _named(self, thing: Any) -> str:
        """A name under which the function finds a thing."""
        key = ("thing", id(thing))
        if key not in self.of.constants:
            self.of.constants[key] = f"op{len(self.of.constants)}"
            self.of.space[self.of.constants[key]] = thing
        return self.of.constants[key]

    def _constant(self, value: Any, dtype: str) -> str:
        key = (repr(value), dtype)
        if key not in self.of.constants:
            self.of.constants[key] = f"k{len(self.of.constants)}"
            self.of.space[self.of.constants[key]] = np.full((1, 1), value, dtype)
        return self.of.constants[key]

    def _guard(self, guard: Guard) -> str:
        name = self._variable(guard.register.name)
        return f"~{name}" if guard.negated else name

    def _operand(self, operand: Operand, dtype: str, step: Step, instruction: Instruction) -> str:
        """An operand as an expression of a dtype; of its register's own integer dtype for "at", an address."""
        if isinstance(operand, Address):
            base = self._operand(operand.base, "at", step, instruction)
            if not operand.offset:
                return base
            narrow = isinstance(operand.base, Register) and self.of.dtypes[operand.base.name][1] == "4"
            return f"{base} + {self._constant(operand.offset, 'i4' if narrow else 'i8')}"
        if isinstance(operand, Register):
            have = self.of.dtypes[operand.name]
            want = _INTEGERS[int(have[1])] if dtype == "at" else dtype
            name = self._variable(operand.name)
            if have == want:
                return name
            if have[1] == want[1] and "b1" not in (have, want):
                return f"{name}.view({want})"
            if step.wide and int(have[1]) > int(want[1]) and "b1" not in (have, want):
                return f"{name}.astype({want})"
            raise instruction.refuse(f"{operand.name} read as {want}")
        if isinstance(operand, Negated):
            return f"~{self._operand(operand.register, dtype, step, instruction)}"
        if isinstance(operand, Immediate):
            return self._constant(operand.of("i8" if dtype == "at" else dtype), "i8" if dtype == "at" else dtype)
        if isinstance(operand, Special) and operand.name in SPECIALS:
            value = f"{self._named(SPECIALS[operand.name])}(t)"
            return f"{value}.view({dtype})" if dtype[1] == "4" else f"{value}.astype({dtype})"
        if isinstance(operand, Symbol):
            dtype = "i8" if dtype == "at" else dtype
            if operand.name in self.of.addresses:
                return self._constant(self.of.addresses[operand.name], dtype)
            return f"np.full((1, 1), t.group.launch.constants[{operand.name!r}], {dtype})"
        raise instruction.refuse(f"operand {operand}")

    def _gather(self, packed: Packed, step: Step, instruction: Instruction) -> str:
        """The matrix that registers hold."""
        places = [self.held.get(each.name) for each in packed.registers]
        first = places[0]
        if first and all(each == (first[0], n, packed.layout) for n, each in enumerate(places)):
            return first[0]
        key = (packed.layout, packed.registers)
        if key not in self.gathered:
            values = [self._operand(each, packed.layout.dtype, step, instruction) for each in packed.registers]
            self.gathered[key] = self._new("m")
            self.lines.append(f"{self.gathered[key]} = {self._named(packed.layout.gather)}(t, {', '.join(values)})")
            for each in packed.registers:
                self.used_by.setdefault(each.name, set()).add(key)
        return self.gathered[key]

    # ---------------------------------------------------------------------------------------------------------- steps

    def _step(self, instruction: Instruction, step: Step) -> None:
        values = [
            self._gather(each, step, instruction) if isinstance(each, Packed)
            else self._operand(each[0], each[1], step, instruction) for each in step.sources
        ]  # fmt: skip
        guard = self._guard(instruction.guard) if instruction.guard else None
        if step.machine:
            values = ["t", *values, f"guard={guard}"]
        call = f"{self._named(step.function)}({', '.join(values)})"
        if not step.results:
            if step.machine:
                self.lines.append(call)
            return
        only = step.results[0]
        if isinstance(only, Packed):
            if guard is not None or len(step.results) > 1:
                raise instruction.refuse("a matrix under a guard")
            return self._hold(only, call)
        if len(step.results) == 1:
            return self._assign(only, call, guard, instruction)
        several = self._new("s")
        self.lines.append(f"{several} = {call}")
        for number, result in enumerate(step.results):
            if isinstance(result, Packed):
                raise instruction.refuse("a matrix among results")
            if result[0].name != "_":
                self._assign(result, f"{several}[{number}]", guard, instruction)
        return None

    def _hold(self, packed: Packed, call: str) -> None:
        matrix = self._new("m")
        self.lines.append(f"{matrix} = {call}")
        for number, each in enumerate(packed.registers):
            self._rewritten(each.name)
            self.local.discard(each.name)
            self.held[each.name] = (matrix, number, packed.layout)

    def _assign(self, result: tuple[Register, str], value: str, guard: str | None, instruction: Instruction) -> None:
        name, dtype = result[0].name, result[1]
        if name == "_":
            self.lines.append(value)
            return
        have = self.of.dtypes[name]
        if have != dtype:
            if "b1" in (have, dtype) or int(dtype[1]) > int(have[1]):
                raise instruction.refuse(f"{dtype} into {name}")
            if dtype[1] != have[1]:  # a narrow value in a wide register is extended by its own sign
                dtype = f"{dtype[0]}{have[1]}" if dtype[0] in "iu" else have
                value = f"({value}).astype({dtype})"
            value = value if dtype == have else f"({value}).view({have})"
        if guard is not None:
            value = f"merge({guard}, {value}, {self._variable(name)})"
        self._rewritten(name)
        self.local.add(name)
        self.lines.append(f"r{self.of.slots[name]} = {value}")

    def _rewritten(self, name: str) -> None:
        self.changed.add(name)
        self.held.pop(name, None)
        for key in self.used_by.pop(name, ()):
            self.gathered.pop(key, None)


def _forget_early(lines: list[str]) -> list[str]:
    """Delete each variable after its last use: small arrays then stay in the processor's cache."""
    last: dict[str, int] = {}
    for number, line in enumerate(lines):
        for name in re.findall(r"\b[rms]\d+\b", line):
            last[name] = number
    gone: dict[int, list[str]] = {}
    for name, number in last.items():
        gone.setdefault(number, []).append(name)
    gone.pop(len(lines) - 1, None)  # the return
    return [f"{line}; del {', '.join(gone[number])}" if number in gone else line for number, line in enumerate(lines)]
