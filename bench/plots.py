"""Results as pictures: speed-up bars, a roofline, time against tokens, memory bars."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import OURS, Row
from bench.scaling import curves, exponent
from bench.store import seconds
from bench.tables import Content, of_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # models in one picture
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}  # a label over a line


def draw(content: Content, folder: Path, name: str) -> dict[str, Path]:
    """Write the pictures that a results file has figures for: {what it shows: file}."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = {}
    for title, (kind, make) in PICTURES.items():
        figure = make(content)
        if figure is not None:
            path = folder / f"{name}-{kind}.png"
            FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
            written[title] = path
    return written


def _figure(content: Content, title: str, height: float = 4.5) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}\n{content['device']}")
    axes.grid(alpha=0.3)
    return figure, axes


def _colours(lanes: Iterable[str]) -> dict[str, str]:
    """A colour for each lane, the same in every picture for those that are in most, and no two alike in one."""
    known = (OURS, "naive", "timm", "timm, compiled", "transformers", "torchvision", "vk.fuse(timm)", "naive, conv2d")
    rest = [lane for lane in dict.fromkeys(lanes) if lane not in known]
    palette = [*(f"C{number}" for number in range(10)), "black", "gold", "navy", "deeppink", "lime", "indigo"]
    return {lane: palette[place % len(palette)] for place, lane in enumerate([*known, *rest])}


def _bars(content: Content, title: str, label: str, figure_of: Callable[[Row, Row], float | None]) -> Figure | None:
    """A group of bars for each model, a bar for each peer."""
    bars: dict[str, dict[int, float]] = {}  # lane -> place -> length
    groups: dict[float, str] = {}  # place -> name
    place = 0
    for key, lanes in of_kind(content, "model", "block").items():
        ours = lanes.get(OURS, {})
        found = {lane: figure_of(row, ours) for lane, row in lanes.items() if "seconds" in row and "seconds" in ours}
        lengths = {lane: length for lane, length in found.items() if length is not None}
        if not lengths or len(groups) == SHOWN:
            continue
        groups[place + (len(lengths) - 1) / 2] = f"{key.name}, {key.dtype}\n{textwrap.fill(key.shape, 34)}"
        for lane, length in lengths.items():
            bars.setdefault(lane, {})[place] = length
            place += 1
        place += 1  # a gap
    if not bars:
        return None
    figure, axes = _figure(content, title, 2 + 0.28 * place)
    colours = _colours(bars)
    for lane, values in bars.items():
        drawn = axes.barh(list(values), list(values.values()), 0.9, color=colours[lane])
        axes.bar_label(
            drawn, [f"{lane}: {length:.2f}" for length in values.values()], padding=3, fontsize=8, bbox=BEHIND
        )
    axes.margins(x=0.3, y=0.01)  # room for the names
    axes.set(xlabel=f"{label} ({OURS}: 1)", yticks=list(groups), yticklabels=list(groups.values()))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    return figure


def _speed(content: Content) -> Figure | None:
    def ratio(row: Row, ours: Row) -> float | None:
        return seconds(row) / seconds(ours) if row is not ours else None

    return _bars(content, f"Speed-up of {OURS}: how many times as long the others take", "times as long", ratio)


def _memory(content: Content) -> Figure | None:
    def ratio(row: Row, ours: Row) -> float | None:
        known = row.get("memory") and ours.get("memory") and row is not ours
        return row["memory"] / ours["memory"] if known else None

    return _bars(content, f"Memory of a step, over that of {OURS}", "times as much", ratio)


def _roofline(content: Content) -> Figure | None:
    rows = [
        (key, lane, row)
        for key, lanes in of_kind(content, "op").items()
        for lane, row in lanes.items()
        if "seconds" in row and "gemm" in row
    ]
    if not rows:
        return None
    figure, axes = _figure(content, "Roofline: the ops, and the two ceilings of the same run", 6)
    places = [row["flops"] / row["bytes"] for _, _, row in rows]
    span = [min(places) / 2, max(places) * 2]
    for index, dtype in enumerate(dict.fromkeys(key.dtype for key, _, _ in rows)):
        (gemm, copy) = next((row["gemm"], row["copy"]) for key, _, row in rows if key.dtype == dtype)
        xs = sorted({*span, min(max(gemm / copy, span[0]), span[1])})
        axes.plot(xs, [min(gemm, copy * x) / 1e9 for x in xs], color=f"C{index}", label=f"ceilings, {dtype}")
        for ours in (True, False):
            chosen = [row for key, lane, row in rows if key.dtype == dtype and (lane == OURS) is ours]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in chosen],
                [row["flops"] / seconds(row) / 1e9 for row in chosen],
                color=f"C{index}",
                marker="o" if ours else "x",
                s=40 if ours else 18,
                alpha=1 if ours else 0.5,
                label=f"{OURS if ours else 'peers'}, {dtype}",
            )
    best: dict[str, Row] = {}
    for key, lane, row in rows:
        if lane == OURS and key.direction != "forward":
            best.setdefault(key.name, row)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
    axes.legend(fontsize=8, loc="upper left")
    _name_points(
        axes, {name: (row["flops"] / row["bytes"], row["flops"] / seconds(row) / 1e9) for name, row in best.items()}
    )
    return figure


def _name_points(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """A label at each point, in a column beside the axes, in the order of the points' heights: none lies on another."""
    names = sorted(points, key=lambda name: points[name][1])
    for number, name in enumerate(names):
        axes.annotate(
            name,
            points[name],
            xytext=(1.02, (number + 0.5) / len(names)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.6},
        )


def _tokens(content: Content) -> Figure | None:
    swept = {name: lanes for (sweep, name), lanes in curves(content).items() if sweep == "tokens"}
    if not swept:
        return None
    figure, axes = _figure(content, "Time against tokens, and the exponent", 5)
    colours = _colours(lane for lanes in swept.values() for lane in lanes)
    for line, (name, lanes) in zip(("-", "--", ":"), swept.items(), strict=False):
        for lane, points in lanes.items():
            times = {size: seconds(row) * 1e3 for size, row in sorted(points.items()) if "seconds" in row}
            if len(times) > 1:
                label = f"{name}, {lane}: {exponent(times):.2f}"
                axes.plot(list(times), list(times.values()), line, marker=".", color=colours[lane], label=label)
    sizes = sorted({size for lanes in swept.values() for points in lanes.values() for size in points})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, forward + backward")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


PICTURES: dict[str, tuple[str, Callable[[Content], Figure | None]]] = {
    "Speed-up": ("speedup", _speed),
    "Roofline": ("roofline", _roofline),
    "Time against tokens": ("tokens", _tokens),
    "Memory": ("memory", _memory),
}
