"""What a run has to show: one dictionary of figures, printed as tables, written as JSON, drawn as charts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitkernels.train import machine, metrics
from vitkernels.train.checkpoint import atomic_write, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from vitkernels.train.loop import Trainer

COLOURS = {"naive": "tab:orange", "fused": "tab:blue", "timm": "tab:green"}


@dataclass
class Curve:
    """What one model did: a number a step, and a number a test."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_steps: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


def report(trainer: Trainer, console: Console) -> dict[str, Any]:
    """Sum up a run that has ended: result.json, curves.png and speed.png into its folder, tables onto the console.

    Returns:
        The figures of result.json.
    """
    curves = {name: Curve() for name in trainer.lanes}
    ops: list[dict[str, Any]] = []
    skipped: set[str] = set()
    for row in metrics.read(trainer.metrics_file):
        skipped.update(row.get("skipped", ()))
        ops = row.get("ops", ops)
        for name, curve in curves.items():
            if "test" in row:
                curve.test_steps.append(row["step"])
                curve.test_loss.append(row["test"][name]["loss"])
                curve.test_accuracy.append(row["test"][name]["accuracy"])
            else:
                curve.loss.append(row[name]["loss"])
                curve.accuracy.append(row[name]["accuracy"])
                curve.seconds.append(row[name]["seconds"])
    result = _figures(trainer, curves, ops, sorted(skipped))
    write_json(trainer.folder / "result.json", result)
    _write_chart(trainer.folder / "curves.png", _draw_curves(curves))
    _write_chart(trainer.folder / "speed.png", _draw_speed(result))
    for table in (_figures_table(result), _ops_table(ops)):
        console.print(table)
    return result


def _figures(
    trainer: Trainer, curves: dict[str, Curve], ops: list[dict[str, Any]], skipped: list[str]
) -> dict[str, Any]:
    """What result.json holds. Speeds are the batch over the median step; of two models that took turns."""
    batch = trainer.config.batch_size
    seconds = {name: statistics.median(curve.seconds) for name, curve in curves.items()}
    result: dict[str, Any] = {
        "model": trainer.spec.name,
        "parameters": sum(parameter.numel() for parameter in trainer.main.model.parameters()),
        "device": machine.device_name(trainer.world.device),
        "processes": trainer.world.size,
        "torch": torch.__version__,
        "batch_size": batch,
        "epochs": trainer.config.epochs,
        "steps": trainer.step,
        "train_images": len(trainer.source.train),
        "test_images": len(trainer.source.test or ()),
        "skipped": skipped,
        "test_accuracy": {
            name: curve.test_accuracy[-1] if curve.test_accuracy else None for name, curve in curves.items()
        },
        "last_loss": {name: curve.loss[-1] for name, curve in curves.items()},
        "step_seconds": seconds,
        "images_per_second": {name: batch / each for name, each in seconds.items()},
    }
    if len(curves) > 1:
        naive, fused = curves["naive"], curves["fused"]
        result["ratio"] = seconds["naive"] / seconds["fused"]
        result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(naive.loss, fused.loss, strict=True))
    return {**result, "ops": ops}


# -------------------------------------------------------------------------------------------------------- tables


def _figures_table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    names = list(result["images_per_second"])
    title = f"{result['model']}, {result['steps']} steps of {result['batch_size']} images"
    table = Table(title=title, caption=f"on {result['device']}")
    table.add_column()
    for name in names:
        table.add_column(name, justify="right")
    rows = {
        "test accuracy": ("test_accuracy", "{:.2%}"),
        "loss of the last step": ("last_loss", "{:.4f}"),
        "step, median": ("step_seconds", "{:.4f} s"),
        "images per second": ("images_per_second", "{:,.1f}"),
    }
    for title, (figure, form) in rows.items():
        values = (result[figure][name] for name in names)
        table.add_row(title, *("none held out" if value is None else form.format(value) for value in values))
    if "ratio" in result:
        speeds, difference = result["images_per_second"], f"{result['largest_loss_difference']:.1e}"
        table.add_row("images per second, ratio", *(f"{speeds[name] / speeds['naive']:.2f}" for name in names))
        table.add_row("largest difference of the losses", *(difference if name == "fused" else "" for name in names))
    if result["skipped"]:
        table.add_row("images skipped", str(len(result["skipped"])))
    return table


def _ops_table(ops: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Which backend ran each op, in one step")
    for column in ("op", "direction", "calls", "backend"):
        table.add_column(column, justify="right" if column == "calls" else "left")
    for row in ops:
        backend = "; ".join([row["backend"], *row["declined"]])
        table.add_row(row["op"], row["direction"], str(row["calls"]), backend)
    if not ops:
        table.caption = "None: the model has no fused op."
    return table


# -------------------------------------------------------------------------------------------------------- charts


def _write_chart(path: Path, figure: Figure) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    atomic_write(path, FigureCanvasAgg(figure).print_png)


def _draw_curves(curves: dict[str, Curve]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for model, curve in curves.items():
            # the two lie on one another: the wider one shows beneath
            style = {"color": COLOURS[model], "linewidth": 3 if model == "naive" else 1}
            steps = range(1, len(curve.loss) + 1)
            axes.plot(steps, getattr(curve, name), alpha=0.5, label=f"{model}, training", **style)
            axes.plot(curve.test_steps, getattr(curve, f"test_{name}"), marker="o", label=f"{model}, test", **style)
        axes.set(xlabel="step", ylabel=name, title=name)
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _draw_speed(result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    speeds = result["images_per_second"]
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(speeds), list(speeds.values()), color=[COLOURS[name] for name in speeds])
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set(ylabel="images per second", title=f"{result['model']}, batch {result['batch_size']}\n{result['device']}")
    return figure
