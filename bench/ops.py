"""Each op against its peers, forward and backward, interleaved in one run: `python -m bench.ops`.

Inputs are random and rotate among several sets, so that nothing is timed out of the cache of the round before. Before
a case is timed, its results and gradients are compared with the reference in float64; where ours are wrong the case
gets no figure, where a peer's are that is said beside its figure. A peer that fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitkernels as vk
from vitkernels.train import machine

RESULTS = Path(__file__).parent / "results"
OURS = "vitkernels"
Run = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """One shape of an op, ours and its peers."""

    op: str
    shape: str
    tensors: Callable[[], list[Tensor]]
    ours: Run
    peers: dict[str, Run] = field(default_factory=dict)


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    def draw(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * gain).to(dtype).requires_grad_()

    return draw


def cases(device: torch.device, dtype: torch.dtype, batch: int, width: int, heads: int, tokens: int) -> Iterator[Case]:
    """The ops of one ViT at one image size."""
    draw = _drawn(device, dtype)
    shape = f"B={batch} N={tokens} D={width} H={heads}"

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def sdpa(backend: SDPBackend | None) -> Run:
        def run(qkv: Tensor) -> Tensor:
            if backend is None:
                out = F.scaled_dot_product_attention(*split(qkv))
            else:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(*split(qkv))
            return out.transpose(1, 2).reshape(batch, tokens, width)

        return run

    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    yield Case(
        "attention_qkv",
        shape,
        lambda: [draw(batch, tokens, 3 * width)],
        lambda qkv: vk.ops.attention_qkv(qkv, heads),
        {"sdpa": sdpa(None), **{f"sdpa {name}": sdpa(backend) for name, backend in backends.items()}},
    )

    def add_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch
        return total, F.layer_norm(total, (width,), weight, bias, 1e-6)

    yield Case(
        "add_layer_norm",
        shape,
        lambda: [draw(batch, tokens, width), draw(batch, tokens, width), draw(width), draw(width)],
        lambda x, branch, weight, bias: vk.ops.add_layer_norm(x, branch, weight, bias),
        {"eager": add_norm, "compile": torch.compile(add_norm)},
    )

    def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    yield Case(
        "mlp",
        shape,
        lambda: [
            draw(batch, tokens, width),
            draw(4 * width, width, gain=0.02),
            draw(4 * width),
            draw(width, 4 * width, gain=0.02),
            draw(width),
        ],
        vk.ops.mlp,
        {"eager": feed_forward, "compile": torch.compile(feed_forward)},
    )
    yield Case(
        "linear",
        f"{shape}, qkv",
        lambda: [draw(batch, tokens, width), draw(3 * width, width, gain=0.02), draw(3 * width)],
        vk.ops.linear,
        {"eager": F.linear},
    )

    side = int((tokens - 1) ** 0.5) * 16

    def unfold(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.unfold(image, 16, stride=16).transpose(1, 2), weight.flatten(1), bias)

    yield Case(
        "patch_embed",
        f"B={batch} {side} px, D={width}",
        lambda: [draw(batch, 3, side, side).requires_grad_(False), draw(width, 3, 16, 16, gain=0.02), draw(width)],
        lambda image, weight, bias: vk.ops.patch_embed(image, weight, bias),
        {
            "conv2d": lambda image, weight, bias: F.conv2d(image, weight, bias, stride=16).flatten(2).transpose(1, 2),
            "unfold": unfold,
        },
    )


# ---------------------------------------------------------------------------------------------------------- measuring


def _step(run: Run, tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """Results; with `backward`, gradients of all that take one, of a fixed sum of the results."""
    if not backward:
        with torch.no_grad():
            out = run(*tensors)
        return list(out) if isinstance(out, tuple) else [out]
    out = run(*tensors)
    outputs = out if isinstance(out, tuple) else (out,)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs]))


def _wrong(got: list[Tensor], expected: list[Tensor]) -> str | None:
    """A sentence where results are further apart than rounding in their dtype can put them."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        scale = b.abs().max().item()
        error = (a.double() - b).abs().max().item()
        allowed = (1e-3 if a.dtype == torch.float32 else 4e-2) * scale
        if not error <= allowed:
            return f"tensor {i} is off by {error:.2g}, allowed {allowed:.2g}"
    return None


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def measure(case: Case, device: torch.device, backward: bool, rounds: int, sets: int = 3) -> list[dict[str, Any]]:
    """Rows {op, shape, direction, name, seconds, spread} or {..., failed}; medians over interleaved rounds."""
    inputs = [case.tensors() for _ in range(sets)]
    row = {"op": case.op, "shape": case.shape, "direction": "forward + backward" if backward else "forward"}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    with vk.use("reference"):
        expected = _step(
            case.ours, [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs[0]], backward
        )
    for name, run in [*case.peers.items(), (OURS, case.ours)]:
        try:
            wrong = _wrong(_step(run, inputs[0], backward), expected)
        except Exception as error:  # a peer may fail in any way of its own
            rows.append({**row, "name": name, "failed": " ".join(str(error).split())[:200]})
            continue
        if wrong is not None and name == OURS:
            rows.append({**row, "name": name, "failed": f"not timed, wrong: {wrong}"})
            continue
        runs[name] = run
        if wrong is not None:
            notes[name] = wrong
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        tensors = inputs[i % sets]
        for name, run in runs.items():
            step = functools.partial(_step, run, tensors, backward)
            seconds[name].append(_seconds(step, device, repeats=5 if device.type == "cuda" else 1))
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        rows.append({**row, "name": name, "seconds": middle, "spread": (high - low) / middle, "wrong": notes.get(name)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each case, a column for each peer's time and for how much longer it takes."""
    lines = [
        "| op | shape | direction | vitkernels | peers (how many times as long) |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for key in dict.fromkeys((row["op"], row["shape"], row["direction"]) for row in rows):
        of_case = {row["name"]: row for row in rows if (row["op"], row["shape"], row["direction"]) == key}
        ours = of_case.pop(OURS)
        own = f"{ours['seconds'] * 1e3:.3f} ms" if "seconds" in ours else ours["failed"]
        peers = "; ".join(
            f"{name}: {row['failed']}"
            if "failed" in row
            else f"{name} {row['seconds'] / ours['seconds']:.2f}" + (" (inexact)" if row["wrong"] else "")
            if "seconds" in ours
            else name
            for name, row in of_case.items()
        )
        lines.append(f"| {' | '.join(key)} | {own} | {peers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/ops-<device>.json)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # (dtype, batch, width, heads, tokens)
    shapes: list[tuple[torch.dtype, int, int, int, int]] = [
        (torch.float32, 8, 384, 6, 197),
        (torch.bfloat16, 8, 384, 6, 197),
    ]
    if device.type == "cuda":
        shapes = [
            (torch.bfloat16, 256, width, heads, tokens)
            for width, heads in ((384, 6), (768, 12), (1024, 16))
            for tokens in (197, 257)
        ]
        shapes += [(torch.bfloat16, 64, 768, 12, 577), (torch.bfloat16, 32, 1024, 16, 1370)]
    if arguments.quick:
        shapes = [(torch.float32, 2, 192, 3, 65)]
    name = machine.device_name(device)
    out = arguments.out or RESULTS / f"ops-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    rows: list[dict[str, Any]] = []
    for dtype, *sizes in shapes:
        for case in cases(device, dtype, *sizes):
            for backward in (False, True):
                measured = measure(case, device, backward, arguments.rounds)
                rows += [{**row, "dtype": str(dtype).removeprefix("torch.")} for row in measured]
            # after every case: a run that is stopped keeps what it has
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        print(f"\n{name}, {dtype}\n\n{table([row for row in rows if row['dtype'] == dtype])}")


if __name__ == "__main__":
    main()
