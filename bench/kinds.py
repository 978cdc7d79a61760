"""Host time of every kind of block that `vk.fuse` knows: `python -m bench.kinds`.

`bench.host` looks closely at a few blocks; here each block of timm and each layer of a tower of transformers that the
tests have a small one of runs forward and backward on some sixteen tokens, stock and fused, in turn: which kinds cost
the processor more fused, and by how much. As there, no kernel of Triton's is launched.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import vitkernels as vk
from bench import host, machine
from bench.store import RESULTS
from vitkernels.text import table
from vitkernels.train.checkpoint import write_json

FILE = RESULTS / "kinds.json"
WARM = 6  # turns until what is read is kept, and tapes are made
_SHOWN = 12  # of a table


@dataclass(frozen=True)
class Row:
    """A kind of block: its library, its name, and what the stock one takes; ratios to that, by backend."""

    library: str
    block: str
    microseconds: float
    ratios: dict[str, float]


@dataclass
class _Kind:
    library: str
    block: str
    stock: nn.Module
    call: Callable[[nn.Module], Any]


def _kinds() -> Iterator[_Kind]:
    import peers  # of the tests, as the lists

    peers.import_timm()
    import hf_towers
    import timm_blocks

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == 2 else value

    for name, (build, size, keywords, _) in timm_blocks.BLOCKS.items():
        x, given = torch.randn(1, *size[1:]), tree_map(first, keywords)
        yield _Kind("timm", name, build().train(), lambda block, x=x, given=given: block(x, **given))
    for name in hf_towers.TOWERS:
        tower = hf_towers.tower(name)
        twin = vk.fuse(copy.deepcopy(tower))
        paths = {id(module): path for path, module in twin.named_modules()}
        for cls, layer in hf_towers.layers(twin).items():
            (x,), given = hf_towers.call_of(layer)
            stock = tower.get_submodule(paths[id(layer)])
            yield _Kind("transformers", f"{name} {cls}", stock, lambda block, x=x, given=given: block(x, **given))


def _step(block: nn.Module, call: Callable[[nn.Module], Any]) -> float:
    """Seconds of this thread that a forward and backward pass take."""
    for each in block.parameters():
        each.grad = None
    start = time.thread_time()
    found = [each for each in tree_leaves(call(block)) if isinstance(each, Tensor) and each.requires_grad]
    torch.autograd.backward(found, [torch.ones_like(each) for each in found])
    return time.thread_time() - start


def _measure(kind: _Kind, rounds: int) -> Row:
    lanes = {"stock": kind.stock}
    lanes |= {backend: vk.fuse(copy.deepcopy(kind.stock)) for backend in host.BACKENDS[1:]}
    names = list(lanes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn, order in enumerate(host.turns(rounds + WARM, len(names))):
        for name in (names[index] for index in order):
            with vk.use(name if name != "stock" else "ext"):
                taken = _step(lanes[name], kind.call)
            if turn >= WARM:
                seconds[name].append(taken)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    stock = medians.pop("stock")
    ratios = {name: round(each / stock, 2) for name, each in medians.items()}
    return Row(kind.library, kind.block, round(stock * 1e6, 1), ratios)


def report(content: dict[str, Any]) -> str:
    """How many kinds cost less fused, and those that cost most, for the docs."""
    rows = content["rows"]
    parts = []
    for backend in host.BACKENDS[1:]:
        ratios = sorted(row["ratios"][backend] for row in rows)
        below = sum(ratio < 1 for ratio in ratios)
        quartiles = statistics.quantiles(ratios, n=4)
        spread = f"half of them from {quartiles[0]:.2f} to {quartiles[2]:.2f}"
        parts.append(f"{backend}: {below} of {len(ratios)} kinds take less than stock, {spread} of its time")
    backends = " | ".join(host.BACKENDS[1:])
    lines = [f"{'; '.join(parts)}. The dearest:", "", f"| block | stock | {backends} |", "| --- | ---: | ---: | ---: |"]
    dearest = sorted(rows, key=lambda row: -max(row["ratios"].values()))[:_SHOWN]
    for row in dearest:
        figures = " | ".join(f"{row['ratios'][backend]:.2f}" for backend in host.BACKENDS[1:])
        lines.append(f"| {row['library']}: {row['block']} | {row['microseconds']:.0f} us | {figures} |")
    where = f"On one core of {content['device']}, float32, some 16 tokens of width 48"
    return "\n".join([*lines, "", f"{where}, measured at {content['revision']}.", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="turns of each lane")
    parser.add_argument("--only", default="", metavar="TEXT", help="blocks whose name has this in it")
    parser.add_argument("--out", type=Path, default=FILE, help="results file")
    known = parser.parse_args(arguments)
    from ptx.driver import Gpu, Nothing, activate

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    try:
        with activate(Gpu(processors_=host.PROCESSORS), Nothing):
            for kind in _kinds():
                if known.only in kind.block:
                    torch.manual_seed(0)
                    rows.append(asdict(_measure(kind, known.rounds)))
    finally:
        torch.set_flush_denormal(False)
    if not rows:
        print(f"--only: no block is called so: {known.only!r}")
        return 2
    content = {**machine.describe(torch.device("cpu")), "revision": machine.revision(), "rows": rows}
    known.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(known.out, content)
    cells = [
        (
            row["library"],
            row["block"],
            f"{row['microseconds']:.0f}",
            *(f"{each:.2f}" for each in row["ratios"].values()),
        )
        for row in sorted(rows, key=lambda row: -max(row["ratios"].values()))
    ]
    print(table([("library", "block", "stock, us", *host.BACKENDS[1:]), *cells]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
