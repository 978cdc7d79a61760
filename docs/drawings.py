"""The directive `{drawing} OP`: an op's panels, what is read, held and written, as SVG within the page.

What is drawn stands in `panels.py`. The colours are the page's own (static/drawings.css), light and dark.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

WIDTH = 720
LINE = 17
LABEL = 32  # two lines over a tensor
PROGRAM = (235, 260)  # left edge and width of the box in the middle
WRITTEN = 575  # left edge of what is written
LETTERS = {"title": 92, "does": 40}  # of a line, in the widest font that a browser takes


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory, and the part of it that one program touches.

    Args:
        name: written over it, with its shape below.
        shape: "[B, N, D]".
        size: width and height in pixels.
        tile: left, top, width and height of the part, as shares of the whole.
        times: so often the part stands in the whole, side by side at equal distances: 3 in q, k and v packed.
    """

    name: str
    shape: str
    size: tuple[int, int] = (96, 44)
    tile: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    times: int = 1

    def svg(self, x: float, y: float, kind: str) -> str:
        width, height = self.size
        left, top, part_width, part_height = self.tile
        parts = (
            f'<rect x="{x + (left + i / self.times) * width:g}" y="{y + LABEL + top * height:g}" '
            f'width="{part_width * width:g}" height="{part_height * height:g}" class="tile {kind}"/>'
            for i in range(self.times)
        )
        return (
            f'<text x="{x}" y="{y + 11}" class="name">{escape(self.name)}</text>'
            f'<text x="{x}" y="{y + 26}" class="shape">{escape(self.shape)}</text>'
            f'<rect x="{x}" y="{y + LABEL}" width="{width}" height="{height}" class="whole {kind}"/>{"".join(parts)}'
        )

    @property
    def height(self) -> int:
        return LABEL + self.size[1] + 12

    def middle(self, y: float) -> float:
        return y + LABEL + (self.tile[1] + self.tile[3] / 2) * self.size[1]


@dataclass(frozen=True)
class Panel:
    """One kernel: what a program reads, what it does with it, and what it writes.

    Args:
        title: the kernel, and what one program is.
        does: lines of text.
        held: what is never in memory whole, with the part that the program holds.
    """

    title: str
    reads: tuple[Tensor, ...]
    does: tuple[str, ...]
    writes: tuple[Tensor, ...]
    held: Tensor | None = None

    def __post_init__(self) -> None:
        for name, lines in (("title", (self.title,)), ("does", self.does)):
            for line in lines:
                if len(line) > LETTERS[name]:
                    raise ValueError(f"Panel: argument {name!r} has {line!r}; needs {LETTERS[name]} letters or less")

    def svg(self) -> str:
        columns = [sum(each.height for each in tensors) for tensors in (self.reads, self.writes)]
        program = LINE * len(self.does) + 20 + (self.held.height if self.held else 0)
        tall = max(*columns, program)
        left, width = PROGRAM
        top = 34 + (tall - program) / 2
        parts = [
            f'<svg class="drawing" viewBox="0 0 {WIDTH} {tall + 44}" role="img" aria-label="{escape(self.title)}">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" class="head"/></marker></defs>',
            f'<text x="10" y="18" class="title">{escape(self.title)}</text>',
            f'<rect x="{left}" y="{top:g}" width="{width}" height="{program}" rx="6" class="program"/>',
        ]
        for index, line in enumerate(self.does):
            parts.append(f'<text x="{left + 12}" y="{top + 22 + LINE * index:g}" class="does">{escape(line)}</text>')
        if self.held:
            parts.append(self.held.svg(left + 12, top + 16 + LINE * len(self.does), "held"))
        for tensors, x, kind, tall_column in (
            (self.reads, 10, "read", columns[0]),
            (self.writes, WRITTEN, "written", columns[1]),
        ):
            y = 34 + (tall - tall_column) / 2
            for tensor in tensors:
                parts.append(tensor.svg(x, y, kind))
                at = tensor.middle(y)
                inside = min(max(at, top + 10), top + program - 10)  # where the arrow meets the box
                ends = (x + tensor.size[0] + 3, at, left - 2, inside)
                if kind == "written":
                    ends = (left + width + 2, inside, x - 3, at)
                parts.append('<line x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}" marker-end="url(#head)"/>'.format(*ends))
                y += tensor.height
        return "".join([*parts, "</svg>"])


LEGEND = (
    '<p class="drawing-legend"><span class="read"></span>read <span class="held"></span>held by a program, never in '
    'memory whole <span class="written"></span>written; filled: the part of one program</p>'
)


class Drawing(SphinxDirective):
    """The panels of an op, one below the other."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        import panels

        name = self.arguments[0]
        if name not in panels.PANELS:
            raise self.error(f"drawing: got {name!r}; needs one of {', '.join(panels.PANELS)}")
        self.env.note_dependency(panels.__file__)
        drawn = "".join(panel.svg() for panel in panels.PANELS[name])
        return [nodes.raw("", f'<div class="drawings">{drawn}{LEGEND}</div>', format="html")]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True}
