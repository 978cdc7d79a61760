"""Host time: what a block costs the processor that feeds the device, `python -m bench.host`.

On a GPU a step takes as long as the slower of two: the device, and the Python that launches for it. Here a stack of
narrow blocks runs forward and backward on four tokens, so that little is computed, and Triton's driver is replaced by
one that launches nothing: what is left is the host's work, and the block's matrix products, which every lane runs on
the CPU and a lane of their own shows. timm's blocks run under torch.compile as well, stock and fused; blocks of towers
are called with positions, ends of images or a mask. Lanes take turns, in time of the thread (what others do to the
machine meanwhile counts less), and the figure is the median. Counts beside it: Python calls, launches of kernels, and
what torch's allocator was asked for while a profiler looks on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkernels as vk
from bench import machine
from bench.peers import compile_it
from bench.store import RESULTS
from vitkernels.models import import_torchvision
from vitkernels.text import table
from vitkernels.train.checkpoint import write_json

FILE = RESULTS / "host.json"
DEPTH, HEADS, TOKENS = 4, 3, 4
# Weights of the wide blocks do not stay in cache, and products are most of the time; those of the narrow ones do.
WIDE, NARROW = 192, 48
PRODUCTS = "products alone"  # by torch
DTYPES = ("float32", "bfloat16")  # the second under autocast
BACKENDS = ("stock", "ext", "triton")
PROCESSORS = 132  # of the GPU that is not there, an H100's


@dataclass(frozen=True)
class Row:
    """One lane: a library's block, stock or fused on a backend; figures are of one block, forward and backward.

    Attributes:
        width: of the blocks.
        microseconds: median.
        stock: of the library's own stock block in the same run, and of timm's for what has none.
        calls: of Python functions.
        launches: of kernels; 0 for a stock block, whose ops torch launches.
        allocations: that torch's profiler saw.
    """

    width: int
    library: str
    dtype: str
    backend: str
    microseconds: float
    stock: float
    calls: float
    launches: float
    allocations: float


# ---------------------------------------------------------------------------------------------------------- lanes


def _timm(width: int) -> nn.Module:
    import_torchvision()
    from timm.models.vision_transformer import Block

    return nn.Sequential(*(Block(width, HEADS, qkv_bias=True) for _ in range(DEPTH)))


def _transformers(width: int) -> nn.Module:
    import_torchvision()
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTLayer

    sizes = {"hidden_size": width, "num_attention_heads": HEADS, "intermediate_size": 4 * width}
    config = ViTConfig(**sizes, hidden_dropout_prob=0.0, attn_implementation="sdpa")
    return nn.Sequential(*(ViTLayer(config) for _ in range(DEPTH)))


def _own(width: int) -> nn.Module:
    return nn.Sequential(*(vk.nn.Block(width, HEADS, qkv_bias=True) for _ in range(DEPTH)))


class _Called(nn.Module):
    """Blocks whose calls bring tensors: call(block, tokens) -> tokens."""

    def __init__(self, blocks: list[nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self._call = nn.ModuleList(blocks), call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self._call(block, x)
        return x


def _dinov3(width: int) -> nn.Module:
    import_torchvision()
    from timm.models.eva import EvaBlock

    rope = torch.randn(TOKENS - 1, 2 * width // HEADS)
    blocks = [EvaBlock(width, HEADS, qkv_bias=True, mlp_ratio=4, init_values=1e-5) for _ in range(DEPTH)]
    return _Called(blocks, lambda block, x: block(x, rope=rope))


def _qwen(width: int) -> nn.Module:
    import_torchvision()
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

    config = configuration_qwen2_vl.Qwen2VLVisionConfig(embed_dim=width, num_heads=HEADS, mlp_ratio=4)
    config._attn_implementation = "sdpa"
    ends = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    keywords = {"cu_seqlens": ends, "position_embeddings": tuple(torch.randn(2, TOKENS, width // HEADS))}
    blocks = [modeling_qwen2_vl.Qwen2VLVisionBlock(config) for _ in range(DEPTH)]
    return _Called(blocks, lambda block, x: block(x[0], **keywords)[None])


def _clip_text(width: int) -> nn.Module:
    import_torchvision()
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config = CLIPTextConfig(hidden_size=width, num_attention_heads=HEADS, intermediate_size=4 * width)
    config._attn_implementation = "sdpa"
    later = torch.ones(TOKENS, TOKENS).triu(1).bool()
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(later, torch.finfo(torch.float32).min)
    return _Called([CLIPEncoderLayer(config) for _ in range(DEPTH)], lambda block, x: block(x, attention_mask=mask))


LIBRARIES: dict[str, Callable[[int], nn.Module]] = {"timm": _timm, "transformers": _transformers, "vk.nn": _own}
# whose calls bring positions, where images end, or a mask: each is measured by itself
TOWERS: dict[str, Callable[[int], nn.Module]] = {
    "timm's DINOv3": _dinov3,
    "Qwen2-VL's": _qwen,
    "CLIP's text": _clip_text,
}


@dataclass
class _Lane:
    library: str
    backend: str  # that it runs on, or "stock"
    model: nn.Module
    compiled: bool = False

    @property
    def name(self) -> str:
        """What its rows call it."""
        return f"{self.backend}, compiled" if self.compiled else self.backend

    def step(self, x: Tensor, dtype: str) -> None:
        order: AbstractContextManager[Any] = nullcontext() if self.backend == "stock" else vk.use(self.backend)
        with order:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                out = self.model(x)
            out.backward(torch.ones_like(out))

    def forget(self) -> None:
        """No gradients any more, as before a step."""
        for each in self.model.parameters():
            each.grad = None


class _Products:
    """The blocks' matrix products and nothing else, forward and backward: no lane can be faster."""

    library, backend, name = "torch", "stock", PRODUCTS

    def __init__(self, width: int) -> None:
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * DEPTH
        self._weights = {"float32": [torch.randn(shape) for shape in shapes]}
        self._weights["bfloat16"] = [each.bfloat16() for each in self._weights["float32"]]
        self._grads: list[tuple[Tensor, Tensor]] = []

    def step(self, x: Tensor, dtype: str) -> None:
        weights = self._weights[dtype]
        inputs = [torch.ones(TOKENS, each.shape[1], dtype=each.dtype) for each in weights]
        results = [nn.functional.linear(*each) for each in zip(inputs, weights, strict=True)]
        self._grads = [(grad @ weight, grad.t() @ x) for grad, weight, x in zip(results, weights, inputs, strict=True)]

    def forget(self) -> None:
        """No gradients any more: given back within a step, their memory would be the system's, and faulted in again."""
        self._grads = []


def lanes(library: str, width: int) -> list[_Lane]:
    """A library's blocks: stock (but for vk.nn's, which are fused as they are), and fused on each backend."""
    torch.manual_seed(0)
    stock = (LIBRARIES | TOWERS)[library](width)
    own = library == "vk.nn"
    found = [] if own else [_Lane(library, "stock", stock)]
    for backend in BACKENDS[1:]:
        twin = copy.deepcopy(stock)
        found.append(_Lane(library, backend, twin if own else vk.fuse(twin)))
    return found


def compiled_lanes(width: int) -> list[_Lane]:
    """timm's blocks under torch.compile, behind the stock one."""
    stock, *fused = lanes("timm", width)
    compiled = [_Lane("timm", each.backend, compile_it(copy.deepcopy(each.model)), True) for each in (stock, *fused)]
    return [stock, *compiled]


# ------------------------------------------------------------------------------------------------------- measuring


def turns(rounds: int, lanes: int) -> Iterator[list[int]]:
    """Orders of the lanes, each of them drawn: who runs twice in a row finds its weights in cache, and after one that
    runs the same code finds that."""
    generator, last = random.Random(0), -1
    for _ in range(rounds):
        order = generator.sample(range(lanes), lanes)
        while lanes > 1 and order[0] == last:
            order = generator.sample(range(lanes), lanes)
        last = order[-1]
        yield order


def measure(rounds: int, width: int, *, compiled: bool = True) -> list[Row]:
    """Every lane of every library, in turn; then each tower's, and those that are compiled, which would drive more out
    of the caches."""
    rows = _measure(
        rounds, width, [_Products(width), *(lane for library in LIBRARIES for lane in lanes(library, width))]
    )
    for tower in TOWERS:
        rows += _measure(rounds, width, lanes(tower, width))
    if compiled:
        rows += [row for row in _measure(rounds, width, compiled_lanes(width)) if row.backend != "stock"]
    return rows


def _measure(rounds: int, width: int, every: Sequence[_Lane | _Products]) -> list[Row]:
    x = torch.randn(1, TOKENS, width, generator=torch.Generator("cpu").manual_seed(0))
    rows = []
    for dtype in DTYPES:
        seconds: dict[int, list[float]] = {index: [] for index in range(len(every))}
        for turn, order in enumerate(turns(rounds + 3, len(every))):
            for index in order:
                every[index].forget()
                start = time.thread_time()
                every[index].step(x, dtype)
                if turn >= 3:  # plans and tapes are made, kernels and graphs compiled
                    seconds[index].append(time.thread_time() - start)
        medians = {index: round(statistics.median(each) * 1e6 / DEPTH, 1) for index, each in seconds.items()}
        names = [(lane.library, lane.name) for lane in every]
        for index, lane in enumerate(every):
            own = (lane.library, "stock")
            stock = medians[names.index(own if own in names else ("timm", "stock"))]
            counts = (_calls(lane, x, dtype), _launches(lane, x, dtype), _allocations(lane, x, dtype))
            figures = medians[index], stock, *(each / DEPTH for each in counts)
            rows.append(Row(width, lane.library, dtype, lane.name, *figures))
    return rows


def _calls(lane: _Lane | _Products, x: Tensor, dtype: str) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        lane.step(x, dtype)
    finally:
        sys.setprofile(None)
    return count


def _launches(lane: _Lane | _Products, x: Tensor, dtype: str) -> int:
    if lane.backend == "stock":
        return 0
    from triton.runtime import driver

    launched = driver.active.record.launches
    before = len(launched)
    with vk.record() as calls:
        lane.step(x, dtype)
    return len(launched) - before if lane.backend == "triton" else len(calls)


def _allocations(lane: _Lane | _Products, x: Tensor, dtype: str) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        lane.step(x, dtype)
    return sum(event.nbytes() > 0 for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


# -------------------------------------------------------------------------------------------------------- reporting


def ratio(row: dict[str, Any]) -> float:
    """A lane's time over that of its stock block of the same width in the same dtype."""
    return row["microseconds"] / row["stock"]  # type: ignore[no-any-return]


def report(content: dict[str, Any]) -> str:
    """The table of a results file, for the README and the report."""
    rows = content["rows"]
    lines = [
        "| width | block | dtype | runs on | time a block | of stock's | Python calls | launches | allocations |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = f"{row['microseconds']:.0f} us | {ratio(row):.2f} | {row['calls']:.0f}"
        launches = f"{row['launches']:.1f}" if row["launches"] else "torch's"
        names = f"{row['width']} | {row['library']} | {row['dtype']} | {row['backend']}"
        lines.append(f"| {names} | {figures} | {launches} | {row['allocations']:.0f} |")
    where = f"On one core of {content['device']}, {DEPTH} blocks on {TOKENS} tokens, forward and backward"
    return "\n".join(
        [*lines, "", f"{where}, measured at {content['revision']}; no kernel of Triton's is launched.", ""]
    )


def summary(rows: list[dict[str, Any]], width: int) -> str:
    """Ratios to stock timm's block of this width."""
    parts = []
    for dtype in DTYPES:
        key = width, "timm", dtype
        found = {row["backend"]: ratio(row) for row in rows if (row["width"], row["library"], row["dtype"]) == key}
        parts.append(f"{dtype} ext {found['ext']:.2f} triton {found['triton']:.2f}")
    return f"host: {', '.join(parts)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="turns of each lane")
    parser.add_argument("--no-compiled", action="store_true", help="leave out blocks under torch.compile")
    parser.add_argument("--out", type=Path, default=FILE, help="results file")
    known = parser.parse_args(arguments)
    from ptx.driver import Gpu, Nothing, activate  # the tests' machine, and triton with it

    found = functools.partial(measure, compiled=not known.no_compiled)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no launch has written is multiplied too, and denormals take longer
    try:
        with activate(Gpu(processors_=PROCESSORS), Nothing):
            rows = [asdict(row) for width in (NARROW, WIDE) for row in found(known.rounds, width)]
    finally:
        torch.set_flush_denormal(False)
    content = {**machine.describe(torch.device("cpu")), "revision": machine.revision(), "rows": rows}
    known.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(known.out, content)
    print(table([("width", "block", "dtype", "runs on", "us", "ratio"), *(_cells(row) for row in rows)]))
    print(f"of width {NARROW}: {summary(rows, NARROW)}")
    print(summary(rows, WIDE))
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = str(row["width"]), row["library"], row["dtype"], row["backend"]
    return *names, f"{row['microseconds']:.0f}", f"{ratio(row):.2f}"


if __name__ == "__main__":
    sys.exit(main())
