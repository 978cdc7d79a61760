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
from collections import defaultdict
from collections.abc import Iterator

from bench.listing import Listing
from bench.registers import written

_PRODUCT = re.compile(r"^HGMMA\.\S+\s+R\d+,\s+R(\d+)\b")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE\s+gsb0,\s+(\w+)")
_DESCRIPTOR = re.compile(r"(?:or\.b64|add\.s64)\s+%rd\d+, (%rd\d+), (-?\d+);")
_A = 4  # registers of A: 64 rows of 32 bytes over the 128 threads of a warpgroup


def overwritten(listing: Listing) -> list[str]:
    """The instructions that write a register of A while a product that reads it may be in flight, each once."""
    found: dict[int, str] = {}
    groups: list[set[int]] = []  # registers that closed groups read, the oldest first
    group: set[int] = set()
    for index in _walk(listing):
        instruction = listing.instructions[index]
        if wait := _WAIT.match(instruction):
            left = int(wait.group(1), 0)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
        product = instruction.startswith("HGMMA")  # which the tensor cores take in order
        if not product and not group.union(*groups).isdisjoint(written(instruction)):
            found[index] = instruction
        if reads := _PRODUCT.match(instruction):
            group.update(range(int(reads.group(1)), int(reads.group(1)) + _A))
        if product and "gsb0" in instruction:
            groups.append(group)
            group = set()
    return list(found.values())


def unfenced(listing: Listing) -> list[str]:
    """The products before which copies were waited for and not fenced, each once."""
    found: dict[int, str] = {}
    copied = landed = False
    for index in _walk(listing):
        instruction = listing.instructions[index]
        copied = copied or instruction.startswith("LDGSTS")
        landed = landed or (copied and instruction.startswith("DEPBAR.LE SB0"))
        if instruction.startswith("FENCE.VIEW.ASYNC"):
            landed = False
        if landed and instruction.startswith("HGMMA"):
            found[index] = instruction
    return list(found.values())


def _walk(listing: Listing) -> Iterator[int]:
    """Indices in order, each loop gone through twice: behind a jump back comes its body again."""
    for index in range(len(listing.instructions)):
        yield index
        begin = listing.jump_back(index)
        if begin is not None:
            yield from range(begin, index + 1)


def layouts(ptx: str) -> list[str]:
    """The registers with an address that descriptors of two swizzles are made from, in PTX.

    A descriptor is an address and a constant whose highest two bits name the swizzle. ptxas 12.8 mixes up those of one
    address: it took a register that nothing had written, or another one, for the constant of the second.
    """
    swizzles: dict[str, set[int]] = defaultdict(set)
    for address, constant in _DESCRIPTOR.findall(ptx):
        bits = int(constant) % 2**64
        if bits >= 2**61:  # else an offset
            swizzles[address].add(bits >> 62)
    return [address for address, found in swizzles.items() if len(found) > 1]
