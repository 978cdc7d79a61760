"""PTX text to one kernel's instructions: scopes resolved, variables placed, calls put where they are called."""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

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
    Unsupported,
    Vector,
)

SIZES = {
    "pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip
SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|nwarpid|smid|nsmid|clock|clock64|dynamic_smem_size)|%lanemask_\w+"
)
_FUNCTION = re.compile(
    r"(?:\.(?:visible|weak|extern|noreturn)\s+)*\.(entry|func)\s+(?:\(([^)]*)\)\s*)?([$\w]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([$%\w]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.(?:global|const|shared|local))?(?:\s+\.align\s+\d+)?)?"
    r"\s+([$\w]+)(?:\[(\d+)\])?"
)
_BRACKET = re.compile(r"[\[({]")
_GUARD = re.compile(r"@(!?)\s*([%$\w]+)\s+(.*)")
_ADDRESS = re.compile(r"\s*([%$\w.]+?)\s*(?:\+\s*(-?\w+))?\s*")
_LOC = re.compile(r"\s*\.loc\s")
_ITEM = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+)\s*:(?!:)|(?P<statement>[^;]+);)")


@dataclass
class Variable:
    """A variable of a state space; `contents` where it begins with values, size 0 where the launch says how large."""

    space: str
    name: str
    size: int
    align: int
    contents: bytes | None = None


@dataclass
class Kernel:
    """One kernel, ready to be cut into blocks.

    Attributes:
        body: instructions, and labels as plain text.
        parameters: of the launch, in order.
        registers: type of each register.
        variables: of shared, local, global and constant memory; `.param` variables of calls are local.
        threads: (x, y, z) of a block, where the text demands them.
        target: "sm_90a".
    """

    name: str
    target: str
    parameters: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | str] = field(default_factory=list)
    threads: tuple[int, int, int] | None = None


@dataclass
class _Function:
    kind: str
    name: str
    results: list[Variable]
    parameters: list[Variable]
    directives: str
    begin: int  # of the body in the text
    end: int


class Module:
    """A PTX text. `kernel(name)` gives one of its kernels."""

    def __init__(self, text: str) -> None:
        self.sources: list[str] = []
        self.text = without_comments(text, self.sources)
        self.starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        target = re.search(r"\.target\s+(\w+)", self.text)
        self.target = target.group(1) if target else ""
        self.functions: dict[str, _Function] = {}
        self.globals: dict[str, Variable] = {}
        outside = self._functions()
        for statement in outside.split(";"):
            match = _VARIABLE.search(statement.strip())
            if match:
                self.globals[match[4]] = _variable(match)

    def _functions(self) -> str:
        """Find the functions; returns the text outside of them."""
        rest, position = [], 0
        while match := _FUNCTION.search(self.text, position):
            rest.append(self.text[position : match.start()])
            position = match.end()
            if match[6] == "{":
                end = _closing(self.text, match.end())
                results, parameters = (_parameters(match[group] or "") for group in (2, 4))
                self.functions[match[3]] = _Function(
                    match[1], match[3], results, parameters, match[5], match.end(), end
                )
                position = end + 1
        rest.append(self.text[position:])
        return "".join(rest)

    def kernel(self, name: str | None = None) -> Kernel:
        """A kernel by its name; the only one where none is given."""
        entries = [each for each in self.functions.values() if each.kind == "entry"]
        found = [each for each in entries if name in (None, each.name)]
        if len(found) != 1:
            raise ValueError(f"kernel: got {name!r}; needs one of {[each.name for each in entries]}")
        kernel = Kernel(found[0].name, self.target, found[0].parameters)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", found[0].directives)
        if threads:
            sizes = [int(each) for each in threads[1].split(",")]
            kernel.threads = (*sizes, *[1] * (3 - len(sizes)))  # type: ignore[assignment]
        kernel.variables.update(self.globals)
        _Body(self, kernel).read(found[0], {each.name: each.name for each in found[0].parameters}, ())
        return kernel

    def line(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position)


def without_comments(text: str, sources: list[str]) -> str:
    """The text without comments and debug sections; `sources` gets the source line of each line."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    lines, source = [], ""
    debug = False
    for line in text.split("\n"):
        code, _, note = line.partition("//")
        debug = debug or code.strip().startswith(".section")
        if _LOC.match(code):
            source, code = note.strip() or code.strip(), ""
        elif code.strip().startswith((".file", ".pragma")) or debug:
            code = ""
        sources.append(source)
        lines.append(code)
    return "\n".join(lines)


def _closing(text: str, position: int) -> int:
    depth = 1
    for match in re.compile("[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise Unsupported("a body that does not end")


def _parameters(text: str) -> list[Variable]:
    found = []
    for align, kind, name, count in _PARAMETER.findall(text):
        size = SIZES[kind] * int(count or 1)
        found.append(Variable("param", name, size, int(align or SIZES[kind])))
    return found


def _variable(match: re.Match[str]) -> Variable:
    space, align, kind, name, dimensions, values = match.groups()
    count = 1
    for size in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(size or 0)
    contents = None
    if values is not None:
        numbers = [_immediate(each) for each in re.findall(r"[-+.\w]+", values)]
        code = {"f32": "<f", "f64": "<d"}.get(kind)
        contents = b"".join(
            struct.pack(code, each.of(f"f{SIZES[kind]}")) if code
            else (each.bits & (2 ** (8 * SIZES[kind]) - 1)).to_bytes(SIZES[kind], "little") for each in numbers
        ).ljust(SIZES[kind] * count, b"\0")  # fmt: skip
    return Variable(space, name, SIZES[kind] * count, int(align or SIZES[kind]), contents)


class _Body:
    """Reads function bodies into a kernel. Every scope's names get a number, so that they stay apart."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.module, self.kernel = module, kernel
        self.scopes = 0

    def read(self, function: _Function, names: dict[str, str], callers: tuple[str, ...], after: str = "") -> None:
        """Append a function's instructions.

        Args:
            function: whose.
            names: what its parameters are called in the kernel.
            callers: functions that wait for this one to return.
            after: the label where a called function returns to; "" for the kernel itself.
        """
        if function.name in callers:
            raise Unsupported(f"{function.name} calls itself")
        scopes = [names | self._declared(function.begin, function.end, top=not callers)]
        position = function.begin
        while position < function.end:
            match = _ITEM.match(self.module.text, position)
            if match is None:
                break
            start, position = match.start(match.lastgroup or 0), match.end()
            if match["open"]:
                scopes.append(self._declared(position, _closing(self.module.text, position)))
            elif match["close"]:
                scopes.pop()
                if not scopes:
                    break
            elif match["label"]:
                self.kernel.body.append(_lookup(scopes, match["label"]))
            elif match["statement"].startswith("."):
                self._declare(match["statement"], scopes)
            else:
                self._instruction(match["statement"], start, scopes, (*callers, function.name), after)

    def _declared(self, begin: int, end: int, top: bool = False) -> dict[str, str]:
        """New names for what is declared in a scope, but not in scopes inside of it."""
        self.scopes += 1
        found: dict[str, str] = {}
        position = begin
        while position < end:
            match = _ITEM.match(self.module.text, position)
            if match is None:
                break
            position = match.end()
            if match["open"]:
                position = _closing(self.module.text, position) + 1
            elif match["label"]:
                found[match["label"]] = f"{match['label']}@{self.scopes}"
            elif match["statement"] and match["statement"].startswith("."):
                for name, _ in _registers(match["statement"]):
                    found[name] = name if top else f"{name}@{self.scopes}"
                variable = _VARIABLE.match(match["statement"])
                if variable:
                    found[variable[4]] = f"{variable[4]}@{self.scopes}"
        return found

    def _declare(self, statement: str, scopes: list[dict[str, str]]) -> None:
        for name, kind in _registers(statement):
            self.kernel.registers[_lookup(scopes, name)] = kind
        match = _VARIABLE.match(statement)
        if match:
            variable = _variable(match)
            variable.name = _lookup(scopes, variable.name)
            variable.space = "local" if variable.space == "param" else variable.space
            self.kernel.variables[variable.name] = variable

    def _instruction(
        self, statement: str, position: int, scopes: list[dict[str, str]], callers: tuple[str, ...], after: str
    ) -> None:
        line = self.module.line(position)
        text = " ".join(statement.split())
        guard, rest = None, text
        match = _GUARD.match(text)
        if match:
            guard, rest = Guard(Register(_lookup(scopes, match[2])), bool(match[1])), match[3]
        opcode, _, operands = rest.partition(" ")
        instruction = Instruction(opcode, (), guard, text, line, self.module.sources[line - 1])
        if instruction.name == "call":
            if guard is not None:
                raise instruction.refuse("a call under a guard")
            return self._call(instruction, operands, scopes, callers)
        if instruction.name in ("ret", "exit") and after and instruction.name == "ret":
            instruction = Instruction("bra", (), guard, text, line, instruction.source, target=after)
        elif instruction.name == "bra":
            instruction.target = _lookup(scopes, operands.strip())
        else:
            items = tuple(self._operand(each, scopes, instruction) for each in _split(operands))
            if "param" in opcode.split(".") and any(self._is_local(each) for each in items):
                opcode = opcode.replace(".param", ".local")
            instruction = Instruction(opcode, items, guard, text, line, instruction.source)
        self.kernel.body.append(instruction)
        return None

    def _is_local(self, operand: Operand) -> bool:
        """Whether it is the address of a variable that hands an argument or a result of a call over."""
        return (
            isinstance(operand, Address)
            and isinstance(operand.base, Symbol)
            and operand.base.name in self.kernel.variables
        )

    def _call(
        self, instruction: Instruction, operands: str, scopes: list[dict[str, str]], callers: tuple[str, ...]
    ) -> None:
        parts = _split(operands)
        results = parts.pop(0) if parts[0].startswith("(") else "()"
        function = self.module.functions.get(parts[0])
        if function is None:
            raise instruction.refuse(f"no body of the function {parts[0]}")
        given = [
            _lookup(scopes, each.strip())
            for each in ((results[1:-1] + "," + (parts[1][1:-1] if len(parts) > 1 else "")).split(","))
            if each.strip()
        ]
        names = {each.name: name for each, name in zip((*function.results, *function.parameters), given, strict=True)}
        self.scopes += 1
        after = f"after@{self.scopes}"
        self.read(function, names, callers, after)
        self.kernel.body.append(after)

    def _operand(self, text: str, scopes: list[dict[str, str]], instruction: Instruction) -> Operand:
        text = text.strip()
        if text[0] == "%":  # mostly
            name = _lookup(scopes, text)
            if name in self.kernel.registers:
                return Register(name)
        if text.startswith("{"):
            return Vector(tuple(self._operand(each, scopes, instruction) for each in _split(text[1:-1])))
        if text.startswith("["):
            base, *coordinates = _split(text[1:-1])
            match = _ADDRESS.fullmatch(base)
            if match is None:
                raise instruction.refuse(f"address {text}")
            items = self._operand(coordinates[0], scopes, instruction) if coordinates else Vector(())
            if not isinstance(items, Vector):
                raise instruction.refuse(f"address {text}")
            return Address(self._operand(match[1], scopes, instruction), int(match[2] or "0", 0), items.items)
        if "|" in text:
            return Vector(tuple(self._operand(each, scopes, instruction) for each in text.split("|")))
        if text.startswith("!"):
            return Negated(Register(_lookup(scopes, text[1:].strip())))
        if SPECIAL.fullmatch(text):
            return Special(text)
        if text[0] in "-+0123456789":
            return _immediate(text)
        name = _lookup(scopes, text)
        if name in self.kernel.registers or text == "_":
            return Register(name)
        if name in self.kernel.variables or any(each.name == name for each in self.kernel.parameters):
            return Symbol(name)
        raise instruction.refuse(f"{text} was not declared")


def _lookup(scopes: list[dict[str, str]], name: str) -> str:
    return next((each[name] for each in reversed(scopes) if name in each), name)


def _registers(statement: str) -> Iterator[tuple[str, str]]:
    """(name, type) of the registers that a statement declares."""
    match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", statement, re.S)
    if match is None:
        return
    for declared in match[2].split(","):
        several = re.match(r"\s*([%$\w]+)<(\d+)>", declared)
        if several:
            for number in range(int(several[2])):
                yield f"{several[1]}{number}", match[1]
        else:
            yield declared.strip(), match[1]


def _immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Immediate(int(text[2:], 16))
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?", text):
        return Immediate(0, float(text))
    digits = text.rstrip("U")
    octal = re.fullmatch(r"-?0[0-7]+", digits)
    return Immediate(int(digits, 8 if octal else 0))


def _split(text: str) -> list[str]:
    """Operands between commas that stand in no bracket."""
    if not _BRACKET.search(text):
        return [each.strip() for each in text.split(",") if each.strip()]
    pieces, depth, begin = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "{[(") - (char in ")]}")
        if char == "," and depth == 0:
            pieces.append(text[begin:position].strip())
            begin = position + 1
    pieces.append(text[begin:].strip())
    return [each for each in pieces if each]
