"""Registers of SASS: which ones an instruction reads and writes, and which are read that nothing can have written.

A compiler that loses an instruction leaves others to read what an earlier kernel left in its register. PTX, which is
right, does not show it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.listing import Listing

_PREDICATE = re.compile(r"^!?U?P(\d|T|R)$")
_REGISTER = re.compile(r"(?<![\w.])(U?)R(\d+)((?:\.\w+)*)")
_BRACKETS = re.compile(r"(\w*)\[([^\]]*)\]")
# these write no register: the first one that they name they read
_WRITES_NONE = re.compile(r"^(BAR|BPT|BRA|BRXU?|CALL|FCHK|JMXU?|NANOSLEEP|R2P|RET|U?PLOP3|WARPSYNC|\w*SETP2?)$")
_STORES = re.compile(r"^ST(G|L|S|SM|TM)?$")
_DOUBLE = re.compile(r"^(D(ADD|FMA|MMA|MUL|SETP)|F(ADD|FMA|MUL)2)$")  # of 64 bits, or two floats
_KEEPS = re.compile(r"^(PRMT|U?LOP3)$")  # may keep bits of what they write, which nobody has to have written
_CONVERTS = re.compile(r"^(F2F|F2I|I2F)$")
_UNIFORM = 256  # the number of the first uniform register, behind a thread's own


def undefined(listing: Listing) -> list[str]:
    """The instructions that read a register which no path from the kernel's entry writes before them, each once.

    What a predicate may skip counts as written.
    """
    reads, writes = ([_bits(each(text)) for text in listing.instructions] for each in (read, written))
    known: dict[int, int] = {}  # registers that may have been written, where control comes to an instruction
    pending = [(0, 0)]
    while pending:
        index, before = pending.pop()
        if index not in known or before & ~known[index]:
            known[index] = before = before | known.get(index, 0)
            pending += [(after, before | writes[index]) for after in listing.followers(index)]
    return [listing.instructions[index] for index in sorted(known) if reads[index] & ~known[index]]


def written(instruction: str) -> set[int]:
    """The numbers of the registers that an instruction writes; those of uniform ones are from 256 on."""
    name, flags, targets, _ = _parts(instruction)
    return {number for each in targets for number in _run(each, _width(name, flags))}


def read(instruction: str) -> set[int]:
    """The numbers of the registers that an instruction reads; where its form is not known here, the first ones."""
    name, flags, _, sources = _parts(instruction)
    if name == "STL":  # spills a register whether or not something is in it
        sources = sources[:1]
    found: set[int] = set()
    for place, source in enumerate(sources):
        brackets = _BRACKETS.findall(source)
        for kind, inside in brackets:
            if kind == "gdesc" and name == "HGMMA":  # A's descriptor, if A is no register, then B's
                found |= _run(inside, 4) - (_run(inside, 2) if place else set())
            else:
                found |= _run(inside, 2 if kind in ("gdesc", "desc", "cx") else 1)
        if not brackets:
            found |= _run(source, _source_width(name, flags, place, len(sources)))
    return found - (written(instruction) if _KEEPS.match(name) else set())


def _parts(instruction: str) -> tuple[str, list[str], list[str], list[str]]:
    """Name, flags, operands that are written and operands that are read, without predicates."""
    opcode, _, rest = instruction.partition(" ")
    name, *flags = opcode.split(".")
    operands = [each.strip() for each in rest.split(",")]
    operands = [each for each in operands if not _PREDICATE.match(each)]
    count = 0 if _WRITES_NONE.match(name) else 2 if "ENL2" in flags and name.startswith("LD") else 1
    if not re.match(r"^U?R(\d+|Z)\b", operands[0] if operands else ""):
        count = 0
    return name, flags, operands[:count], operands[count:]


def _width(name: str, flags: Sequence[str]) -> int:
    """How many registers an instruction writes from the first one on; a store, how many it reads."""
    halves = 2 if "F16" in flags else 1
    if name == "HGMMA":  # 64 rows of a product over the 128 threads of a warpgroup
        return int(flags[0].split("x")[1]) // 2 // halves
    if name == "HMMA":
        return 4 // halves
    if name in ("LDSM", "STSM"):
        return int(flags[-1]) if flags[-1].isdigit() else 1
    if name in ("LDTM", "STTM"):
        return next((int(flag[1:]) for flag in flags if re.match(r"^x\d+$", flag)), 1)
    if "128" in flags or "256" in flags:
        return 4
    if _CONVERTS.match(name) and any(flag.endswith("64") for flag in flags):
        return 2
    return 2 if "64" in flags or "WIDE" in flags or _DOUBLE.match(name) or (name == "CS2R" and "32" not in flags) else 1


def _source_width(name: str, flags: Sequence[str], place: int, count: int) -> int:
    """How many registers the operand at a place has, at the least."""
    if name == "HGMMA":  # A: 64 rows of 32 bytes; else what is added to
        return 4 if place == 0 else _width(name, flags)
    if name == "HMMA":
        return (4 if "16816" in flags else 2, 2 if "16816" in flags else 1, _width(name, flags))[place]
    if "WIDE" in flags:
        return 2 if place == count - 1 else 1
    if _STORES.match(name):
        return _width(name, flags)
    return 2 if _DOUBLE.match(name) or (name == "UIADD3" and "64" in flags) else 1


def _run(operand: str, width: int) -> set[int]:
    """The registers that an operand names, each the first of so many, or of two where it says 64."""
    found: set[int] = set()
    for uniform, number, flags in _REGISTER.findall(operand):
        begin = int(number) + (_UNIFORM if uniform else 0)
        found.update(range(begin, begin + max(width, 2 if ".64" in flags else 1)))
    return found


def _bits(numbers: set[int]) -> int:
    return sum(1 << number for number in numbers)
