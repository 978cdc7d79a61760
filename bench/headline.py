"""What the README's first lines show: a model of timm's before `vk.fuse` and after it, as a picture and in a sentence.

The picture is SVG written here: its colours follow the reader's, light or dark, and equal figures give equal files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from bench.store import seconds
from bench.tables import Content, of_kind

FUSED, STOCK = "vk.fuse(timm)", "timm"
FILE = "steps.svg"

_WIDTH, _LABEL, _BAR, _ROW = 780, 330, 165, 24  # pixels; a bar of the longest ratio is _BAR long
_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11.5px; fill: #59636e }
.time { fill: #d2691e } .memory { fill: #2a7fc9 } .one { stroke: #59636e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9198a1 } .one { stroke: #9198a1 } }
</style>"""


@dataclass(frozen=True)
class Gain:
    """One model at one dtype on one device: stock over fused."""

    device: str
    model: str
    shape: str
    dtype: str
    time: float
    memory: float | None


def gains(contents: Iterable[Content]) -> Iterator[Gain]:
    """Of every whole model that was measured both ways."""
    for content in contents:
        for key, lanes in of_kind(content, "model").items():
            stock, fused = lanes.get(STOCK, {}), lanes.get(FUSED, {})
            if "seconds" in stock and "seconds" in fused:
                both = stock.get("memory") and fused.get("memory")
                memory = stock["memory"] / fused["memory"] if both else None
                ratio = seconds(stock) / seconds(fused)
                yield Gain(content["device"], key.name, key.shape, key.dtype, ratio, memory)


def sentence(contents: Iterable[Content]) -> str:
    """The range of all gains, the worst one too, and on what they were measured: GPUs first, then processors."""
    contents = list(contents)
    found = [text for kind in ("cuda", "cpu") if (text := _range([each for each in contents if each["kind"] == kind]))]
    return "\n".join(found) or "Not yet measured.\n"


def _range(contents: list[Content]) -> str:
    found = list(gains(contents))
    if not found:
        return ""
    times = [gain.time for gain in found]
    memory = [gain.memory for gain in found if gain.memory is not None]
    devices = " and ".join(dict.fromkeys(gain.device for gain in found))
    kept = f", and {min(memory):.2f} to {max(memory):.2f} times the memory" if memory else ""
    return (
        f"On {devices}, timm's own model takes {min(times):.2f} to {max(times):.2f} times as long as the same model "
        f"after `vk.fuse`, forward and backward{kept} ({len(found)} models and dtypes).\n"
    )


def picture(contents: Iterable[Content]) -> str:
    """Bars of time and of memory for each model, as SVG."""
    found = list(gains(contents))
    longest = max((value for gain in found for value in (gain.time, gain.memory or 0.0)), default=1.0)
    devices = dict.fromkeys(gain.device for gain in found)
    height = 50 + _ROW * len(found) + 26 * len(devices)
    unit = _BAR / longest
    columns = {"time": _LABEL, "memory": _LABEL + _BAR + 60}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="Time and memory of timm\'s models over those of the same models fused">',
        _STYLE,
        f'<text x="{columns["time"]}" y="16">time, stock over fused</text>',
        f'<text x="{columns["memory"]}" y="16">memory, stock over fused</text>',
    ]
    y = 28
    for device in devices:
        parts.append(f'<text x="0" y="{y + 14}" class="small">{escape(device)}</text>')
        y += 26
        for gain in (each for each in found if each.device == device):
            shape = f'<tspan class="small">{escape(gain.shape)}</tspan>'
            parts.append(f'<text x="0" y="{y + 14}">{escape(gain.model)}, {escape(gain.dtype)}, {shape}</text>')
            for kind, value in (("time", gain.time), ("memory", gain.memory)):
                if value is not None:
                    x, length = columns[kind], value * unit
                    parts.append(f'<rect x="{x}" y="{y + 3}" width="{length:.1f}" height="14" class="{kind}"/>')
                    end = unit if length < unit < length + 30 else length  # no label across the line of 1
                    parts.append(f'<text x="{x + end + 6:.1f}" y="{y + 14}" class="small">{value:.2f}</text>')
            y += _ROW
    ones = (x + unit for x in columns.values())
    parts += [f'<line x1="{x:.1f}" y1="24" x2="{x:.1f}" y2="{y}" class="one"/>' for x in ones]
    return "\n".join([*parts, "</svg>", ""])
