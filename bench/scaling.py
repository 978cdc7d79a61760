"""How cost grows: exponents fitted to a scaling run, and on paper what many devices would spend on talking."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping

import torch

from bench.measure import OURS, Key, Row
from bench.store import seconds
from bench.tables import NOT_MEASURED, Content, duration, grid, of_kind, title
from vitkernels.nn import PRESETS, VisionTransformer

DEVICES = 8
NOT_GROWN = "Growth: not yet measured.\n"
# bytes a second that a device sends at best: what a data sheet says, not what we measured
LINKS = {
    "cpu": {"10 Gbit/s Ethernet": 1.25e9, "100 Gbit/s Ethernet": 12.5e9},
    "cuda": {"NVLink, 450 GB/s": 450e9, "InfiniBand, 400 Gbit/s": 50e9},
}


def exponent(points: Mapping[int, float]) -> float:
    """k in seconds = c * size^k, by least squares on logarithms.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(points) < 2:
        raise ValueError(f"exponent: argument 'points' has {len(points)} sizes; needs 2 or more")
    xs, ys = zip(*((math.log(size), math.log(value)) for size, value in points.items()), strict=True)
    return statistics.linear_regression(xs, ys).slope


def curves(content: Content) -> dict[tuple[str, str], dict[str, dict[int, Row]]]:
    """(sweep, case) -> lane -> size -> row."""
    found: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for key, lanes in of_kind(content, "op", "block", "model", sweep=True).items():
        for lane, row in lanes.items():
            found.setdefault((key.sweep, key.name), {}).setdefault(lane, {})[key.at] = row
    return found


def growth(content: Content) -> str:
    """A table for each sweep: the time at each size, what it is of ours, and the exponent."""
    parts = []
    for (sweep, name), lanes in curves(content).items():
        sizes = sorted({size for points in lanes.values() for size in points})
        rows = [
            (lane, *(_cell(points.get(size), lanes.get(OURS, {}).get(size)) for size in sizes), _fitted(points))
            for lane, points in lanes.items()
        ]
        table = grid((f"{name}, {sweep}", *map(str, sizes), "exponent"), rows, numbers=len(sizes) + 1)
        parts.append(f"{table}\n")
    return "\n".join(parts)


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "not measured"
    if "seconds" not in row:
        return row["failed"].replace("|", "/")
    text = duration(seconds(row))
    if ours is None or "seconds" not in ours or ours is row:
        return text
    return f"{text} ({seconds(row) / seconds(ours):.2f})"


def _fitted(points: dict[int, Row]) -> str:
    times = {size: seconds(row) for size, row in points.items() if "seconds" in row}
    return f"{exponent(times):.2f}" if len(times) > 1 else ""


# --------------------------------------------------------------------------------------------------- many devices


@functools.cache
def parameters(preset: str) -> int:
    """Weights of a preset at 224 pixels, head for 1000 classes included."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in VisionTransformer(**PRESETS[preset]).parameters())


def traffic(weights: int, devices: int = DEVICES) -> float:
    """Bytes that each device sends in a step, in rings: 8 a weight, less its own part.

    DDP all-reduces float32 gradients, which is a scatter of sums and a gather: 2 * 4 bytes. FSDP2 with bfloat16 weights
    and float32 gradients gathers the weights forward and again backward, 2 * 2, and scatters sums of gradients, 4.
    """
    return 8.0 * weights * (devices - 1) / devices


def bound_batch(sent: float, link: float, seconds_per_image: float) -> float:
    """Images a device below which talking takes longer than the backward pass that hides it, two thirds of a step."""
    return sent / link / (seconds_per_image * 2 / 3)


def many_devices(content: Content) -> str:
    """Where a step becomes bound by communication, from the steps that were measured on one device."""
    links = LINKS[content["kind"]]
    header = ("model", "lane", "weights", "sent a step", "measured a sample", *(f"batch at {link}" for link in links))
    rows = list(_bounds(content, links))
    return grid(header, rows, numbers=3 + len(links)) if rows else "Steps of whole models: not yet measured."


def _bounds(content: Content, links: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    for key, lanes in of_kind(content, "model").items():
        if key.name not in PRESETS:
            continue
        weights = parameters(key.name)
        sent = traffic(weights)
        for name in (OURS, "timm"):
            row = lanes.get(name, {})
            if "seconds" not in row:
                continue
            each = seconds(row) / _batch(key)
            bounds = (f"{bound_batch(sent, link, each):,.1f}" for link in links.values())
            yield (
                f"{key.name}, {key.dtype}",
                name,
                f"{weights / 1e6:.0f} M",
                f"{sent / 1e6:,.0f} MB",
                duration(each),
                *bounds,
            )


def _batch(key: Key) -> int:
    return int(key.shape.split()[0].removeprefix("B="))


def page(contents: list[Content]) -> str:
    """The figures of docs/scaling.md."""
    parts = [
        f"### {title(content)}\n\n{growth(content) or NOT_GROWN}\n{many_devices(content)}\n" for content in contents
    ]
    if all(content["kind"] != "cuda" for content in contents):
        parts.append(f"### GPU\n\n{NOT_MEASURED}\n")
    return "\n".join(parts)
