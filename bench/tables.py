"""Results as Markdown. Every case is in its table, the slow ones too; nobody types a figure.

Ratios say how many times as long another lane takes; bold where it takes less time than ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from bench.measure import OURS, Key, Row
from bench.store import by_case, runs, seconds
from bench.swapped import FUSED, KIND, STOCK

Content = dict[str, Any]
NOT_MEASURED = "GPU: not yet measured."


def grid(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: int = 0) -> str:
    """A Markdown table; its last `numbers` columns are aligned right."""
    header = list(header)
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def duration(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def amount(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f} MiB"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def of_kind(content: Content, *kinds: str, sweep: bool = False) -> dict[Key, dict[str, Row]]:
    """The cases of a results file: ops, blocks, models; those of a scaling run alone, or the others."""
    return {
        key: lanes for key, lanes in by_case(content["rows"]).items() if key.kind in kinds and bool(key.sweep) == sweep
    }


def title(content: Content) -> str:
    return f"{content['device']}, torch {content['versions']['torch']}"


def revisions(content: Content) -> str:
    """The commits that the rows were measured at, as a sentence; nothing of files that do not know."""
    found = dict.fromkeys(row.get("revision", "commits that were not recorded") for row in content["rows"])
    return f"Measured at {', '.join(found)}." if any("revision" in row for row in content["rows"]) else ""


def peers(lanes: dict[str, Row], figure: str = "seconds") -> str:
    """Each peer of a case, over ours: of its time, or of its memory."""
    ours = lanes.get(OURS, {})
    words = []
    for name, row in lanes.items():
        if name == OURS:
            continue
        if "failed" in row:
            words.append(f"{name}: {row['failed']}")
        elif "seconds" not in ours:
            words.append(f"{name} {duration(seconds(row))}")
        elif figure == "memory":
            if ours.get("memory") and row.get("memory"):
                words.append(f"{name} {row['memory'] / ours['memory']:.2f}")
        else:
            ratio = seconds(row) / seconds(ours)
            text = f"{name} {ratio:.2f}" if round(ratio, 2) >= 1 else f"**{name} {ratio:.2f}**"
            words.append(f"{text} (inexact)" if row.get("inexact") else text)
    return "; ".join(words).replace("|", "/")


def _own(lanes: dict[str, Row]) -> str:
    row = lanes.get(OURS, {"failed": "not measured"})
    return duration(seconds(row)) if "seconds" in row else row["failed"].replace("|", "/")


def ops(content: Content) -> str:
    """A table for each dtype: a line for each op, size and direction."""
    return "\n".join(_by_dtype(content, of_kind(content, "op"), _op_table))


def models(content: Content) -> str:
    """A table for each dtype: a line for each block and model; and of which run they are."""
    cases = of_kind(content, "model", "block")
    made = runs(content["rows"])
    counts = sorted({len(made[key]) for key in cases})
    if not counts:
        return ""
    many = " to ".join(str(each) for each in dict.fromkeys((counts[0], counts[-1])))
    which = f": of {many} separate ones, the one where timm's ratio is lowest" if counts[-1] > 1 else ""
    return "\n".join([*_by_dtype(content, cases, _model_table), f"Each row is of one run{which}.\n"])


def memory(content: Content) -> str:
    """A table for each dtype: of each lane its time and its memory, and both over the stock model's."""
    return "\n".join(_by_dtype(content, of_kind(content, "memory"), _memory_table))


def _memory_table(cases: dict[Key, dict[str, Row]]) -> str:
    rows = []
    for key, lanes in cases.items():
        stock = lanes.get("timm", {})
        for name, row in lanes.items():
            case = (key.name, key.shape, name)
            if "seconds" not in row:
                rows.append((*case, row["failed"].replace("|", "/"), "", "", ""))
                continue
            over = ("", "")
            if "seconds" in stock:
                over = f"{seconds(row) / seconds(stock):.2f}", f"{row['memory'] / stock['memory']:.2f}"
            rows.append((*case, duration(seconds(row)), over[0], amount(row["memory"]), over[1]))
    return grid(("", "shape", "", "forward + backward", "of stock's", "memory", "of stock's"), rows, numbers=4)


def towers(content: Content) -> str:
    """A table for each dtype: what stock takes of time and of memory, over the same model fused."""
    return "\n".join(_by_dtype(content, of_kind(content, KIND), _tower_table))


def _tower_table(cases: dict[Key, dict[str, Row]]) -> str:
    return grid(
        ("tower", "shape", "stock", "after `vk.fuse`", "stock over fused", "memory, stock over fused"),
        (_tower_row(key, lanes.get(STOCK, _MISSING), lanes.get(FUSED, _MISSING)) for key, lanes in cases.items()),
        numbers=4,
    )


_MISSING = {"failed": "not measured"}


def _tower_row(key: Key, stock: Row, fused: Row) -> tuple[str, ...]:
    times = (duration(seconds(row)) if "seconds" in row else row["failed"].replace("|", "/") for row in (stock, fused))
    over = ("", "")
    if "seconds" in stock and "seconds" in fused:
        ratio = seconds(stock) / seconds(fused)
        remark = " (inexact)" if "inexact" in stock else ""
        over = (f"{ratio:.2f}" if round(ratio, 2) >= 1 else f"**{ratio:.2f}**") + remark, _over(stock, fused)
    return (key.name, key.shape, *times, *over)


def _over(stock: Row, fused: Row) -> str:
    return f"{stock['memory'] / fused['memory']:.2f}" if fused.get("memory") and stock.get("memory") else ""


def _by_dtype(content: Content, cases: dict[Key, dict[str, Row]], table: Any) -> Iterator[str]:
    for dtype in dict.fromkeys(key.dtype for key in cases):
        yield f"{title(content)}, {dtype}:\n\n{table({k: v for k, v in cases.items() if k.dtype == dtype})}\n"


def _op_table(cases: dict[Key, dict[str, Row]]) -> str:
    return grid(
        ("op", "shape", "direction", "others, how many times as long", "share of the limit", OURS),
        (
            (key.name, key.shape, key.direction, peers(lanes), share(lanes.get(OURS, {}).get("share")), _own(lanes))
            for key, lanes in cases.items()
        ),
        numbers=2,
    )


def _model_table(cases: dict[Key, dict[str, Row]]) -> str:
    return grid(
        ("", "shape", "", "others, how many times as long", "their memory over ours", "MFU", "memory", OURS),
        (
            (
                key.name,
                key.shape,
                key.direction,
                peers(lanes),
                peers(lanes, "memory"),
                share(lanes.get(OURS, {}).get("mfu")),
                amount(lanes.get(OURS, {}).get("memory")),
                _own(lanes),
            )
            for key, lanes in cases.items()
        ),
        numbers=3,
    )


def work(contents: list[Content]) -> str:
    """What each op must do at the least, at the first size that was measured both ways in bfloat16."""
    found: dict[str, tuple[Key, Row]] = {}
    for content in contents:
        for key, lanes in of_kind(content, "op").items():
            if key.dtype == "bfloat16" and key.direction == "forward + backward" and OURS in lanes:
                found.setdefault(key.name, (key, lanes[OURS]))
    if not any("flops" in row for _, row in found.values()):
        return "Not yet measured.\n"
    rows = (
        (name, key.shape, f"{row['flops'] / 1e9:,.2f}", amount(row["bytes"]), f"{row['flops'] / row['bytes']:,.0f}")
        for name, (key, row) in found.items()
    )
    return grid(("op", "shape", "GFLOP", "memory touched", "FLOP a byte"), rows, numbers=3) + "\n"


def kernels(content: Content, most: int = 12) -> str:
    """What kept a GPU busy: for each lane of a model or block its longest kernels, milliseconds and share."""
    parts = []
    for key, lanes in of_kind(content, "model", "block").items():
        for name, row in lanes.items():
            taken = row.get("kernels")
            if not taken:
                continue
            busy = sum(taken.values())
            head = f"{key}: {name}: {duration(busy)} of {duration(row['seconds'])} in kernels"
            rows = ((f"`{each[:90]}`", f"{1e3 * took:.2f}", share(took / busy)) for each, took in taken.items())
            parts.append(f"{head}\n\n{grid(('kernel', 'ms', 'of all'), itertools.islice(rows, most), numbers=2)}\n")
    return "\n".join(parts)


def lanes(content: Content) -> str:
    """Every lane by itself: time and spread, share of the limit, memory."""
    return grid(
        ("case", "lane", "median", "spread", "rounds", "share of the limit", "memory"),
        (
            (str(key), name, row["failed"].replace("|", "/"), "", "", "", "")
            if "failed" in row
            else (
                str(key),
                name,
                duration(seconds(row)),
                share(row["spread"]),
                str(row["rounds"]),
                share(row.get("share")),
                amount(row.get("memory")),
            )
            for key, rows in of_kind(content, "model", "block", KIND, "op").items()
            for name, row in rows.items()
        ),
        numbers=5,
    )


def wrong(content: Content) -> str:
    """What has no figure, and why; what is not what its name promises: inexact peers, ours on the reference."""
    lines = []
    for key, rows in by_case(content["rows"]).items():
        for name, row in rows.items():
            remark = row.get("failed") or (f"inexact, {row['inexact']}" if "inexact" in row else None)
            if remark is None and "reference" in row.get("backends", ()):
                remark = "ran on the plain-torch reference"
            if remark is not None:
                lines.append(f"- {key}: {name}: {remark}")
    return "\n".join(lines) or "None."


def ceilings(content: Content) -> str:
    """What the machine can do, as measured in the same run."""
    gemm = {row["dtype"]: row["gemm"] for row in content["rows"] if "gemm" in row}
    copy = [row["copy"] for row in content["rows"] if "copy" in row]
    rates = [f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in gemm.items()]
    if copy:
        rates.append(f"{copy[-1] / 1e9:,.1f} GB/s copied, read and written")
    return "; ".join(rates) or "not measured"


# ------------------------------------------------------------------------------------------------------ the training


def demo(result: dict[str, Any]) -> str:
    """A run of the demo: every model's accuracy, speed and, where it was kept, time to 97 % on the test images."""
    names = list(result["images_per_second"])

    def row(name: str, form: str, figures: dict[str, Any]) -> tuple[str, ...]:
        return (name, *("not reached" if figures[each] is None else form.format(figures[each]) for each in names))

    slowest = result["images_per_second"]["naive"]
    rows = [
        row("test accuracy", "{:.2%}", result["test_accuracy"]),
        row("step, median", "{:.3f} s", result["step_seconds"]),
        row("images per second", "{:,.0f}", result["images_per_second"]),
        row("ratio", "{:.2f}", {name: rate / slowest for name, rate in result["images_per_second"].items()}),
    ]
    if "seconds_to_97" in result:
        rows.append(row("seconds of training to 97 %", "{:.1f} s", result["seconds_to_97"]))
    table = grid(
        (f"{result['model']}, {result['steps']} steps of {result['batch_size']} images", *names), rows, len(names)
    )
    backends = sorted({op["backend"] for op in result["ops"]})
    commit = f", measured at {result['revision']}" if "revision" in result else ""
    return (
        f"{table}\n\nOn {result['device']}, torch {result['torch']}{commit}; every op of the fused model ran on: "
        f"{', '.join(backends)}. Losses of naive and fused differ by {result['largest_loss_difference']:.1e} at most.\n"
    )
