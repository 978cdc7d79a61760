"""Compile a kernel without a GPU and read what the compiler made of it.

`triton.compile` needs a target, not a device, and the disassembler ships inside the triton package.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import registers, wgmma
from bench.listing import Listing, parse
from vitkernels.kernels.variants import Variant

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = re.compile(r"^(HGMMA|HMMA|UTC\w*MMA)\b")
_LOAD = re.compile(r"^(?:LDG|LDGSTS)\.(\S+)")


@dataclass(frozen=True)
class Reading:
    """What the compiler made of one variant.

    Attributes:
        threads: in a program.
        registers: of a thread at entry.
        spilled: bytes of local memory of a thread.
        shared: bytes of shared memory of a program.
        matrix: number of matrix instructions by kind: HGMMA (sm_90), HMMA, UTCHMMA (sm_100).
        widest: bits of the widest load from global memory; 0 without one, -1 where the copy engine (TMA) loads.
        scratch: bytes of global memory that a launch would have to bring.
        waits: waits for matrix instructions and for copies in an iteration of the main loop; None without a loop.
        overwritten: instructions that write what an HGMMA in flight still reads.
        unfenced: HGMMAs that may read what cp.async wrote with no proxy fence between.
        undefined: instructions that read a register which nothing can have written.
        layouts: addresses that products read in two layouts; empty where the PTX was not at hand.
    """

    threads: int
    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    widest: int
    scratch: int
    waits: tuple[int, int] | None
    overwritten: tuple[str, ...] = ()
    unfenced: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()


def read(variant: Variant, capability: int) -> Reading:
    """Compile a variant for a compute capability (90 for 9.0) and read registers, memory and instructions.

    Raises:
        Exception: whatever triton or ptxas raise for a kernel that does not compile.
    """
    found = compiled(variant, capability)
    threads = _number(r"\.(?:reqntid|maxntid)\s+(\d+)", found.asm["ptx"])
    made = reading(found.asm["cubin"], threads, found.metadata.shared, found.metadata.global_scratch_size)
    return dataclasses.replace(made, layouts=tuple(wgmma.layouts(found.asm["ptx"])))


def reading(cubin: bytes, threads: int, shared: int, scratch: int) -> Reading:
    """Read registers, memory and instructions of a kernel's binary; the others are as the compiler told them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        listing = parse(_tool("nvdisasm", "-c", path))
    return Reading(
        threads=threads,
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared=shared,
        matrix=_count_matrix(listing.instructions),
        widest=_widest_load(listing.instructions),
        scratch=scratch,
        waits=_waits(_main_loop(listing)),
        overwritten=tuple(wgmma.overwritten(listing)),
        unfenced=tuple(wgmma.unfenced(listing)),
        undefined=tuple(registers.undefined(listing)),
    )


def compiled(variant: Variant, capability: int) -> Any:
    """The compiled kernel, Triton's own object."""
    names: list[str] = variant.kernel.arg_names
    unmatched = set(names) ^ (variant.signature.keys() | variant.constants.keys())
    if unmatched:
        raise ValueError(f"signature and constants do not fit the kernel's arguments: {sorted(unmatched)}")
    types = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if types[name] != "constexpr" and (types[name][0][0] == "*" or name in variant.divisible)
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    if variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str, *arguments: str | Path) -> str:
    command = [str(_TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler printed")
    return int(found.group(1))


def _count_matrix(instructions: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for instruction in instructions:
        if found := _MATRIX.match(instruction):
            counts[found.group(1)] = counts.get(found.group(1), 0) + 1
    return counts


def _widest_load(instructions: Sequence[str]) -> int:
    widest = 0
    for instruction in instructions:
        if instruction.startswith("UTMALDG"):
            return -1
        if found := _LOAD.match(instruction):
            flags = found.group(1).split(".")
            widths = [int(flag.lstrip("US")) for flag in flags if re.fullmatch(r"[US]?(8|16|64|128|256)", flag)]
            widest = max(widest, *widths) if widths else max(widest, 32)
    return widest


def _main_loop(listing: Listing) -> Sequence[str]:
    """The innermost loop with the most matrix instructions, or the longest one; empty without a loop."""
    loops = [(begin, end) for end in range(len(listing.instructions)) if (begin := listing.jump_back(end)) is not None]
    innermost = [
        listing.instructions[begin : end + 1]
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]
    return max(innermost, key=lambda body: (sum(_count_matrix(body).values()), len(body)), default=())


def _waits(body: Sequence[str]) -> tuple[int, int] | None:
    if not body:
        return None
    matrix = sum(instruction.startswith("WARPGROUP.DEPBAR") for instruction in body)
    copies = sum(instruction.startswith(("LDGDEPBAR", "SYNCS.PHASECHK")) for instruction in body)
    return matrix, copies
