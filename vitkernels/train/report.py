"""What a run has to show: one dictionary of figures, printed as tables, written as JSON, drawn as charts."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vitkernels.text import table
from vitkernels.train import machine, metrics
from vitkernels.train.charts import write_chart
from vitkernels.train.checkpoint import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from vitkernels.train.loop import Trainer

COLOURS = {"naive": "tab:orange", "fused": "tab:blue", "timm": "tab:green", "ema": "tab:purple"}
SMOOTHED = 40  # points of a curve that a mean is taken over: a fortieth of its steps each


@dataclass
class Curve:
    """What one model did: a number a step, and a number a test."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_steps: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_top5: list[float] = field(default_factory=list)
    test_epochs: list[int] = field(default_factory=list)


def report(trainer: Trainer, console: Console) -> dict[str, Any]:
    """Sum up a run that has ended: result.json, curves.png and speed.png into its folder, tables onto the console.

    Returns:
        The figures of result.json.
    """
    curves = {name: Curve() for name in trainer.lanes}
    if trainer.main.ema is not None:
        curves["ema"] = Curve()
    decoding: list[float] = []
    ops: list[dict[str, Any]] = []
    skipped: set[str] = set()
    for row in metrics.read(trainer.metrics_file):
        skipped.update(row.get("skipped", ()))
        ops = row.get("ops", ops)
        if "decoding" in row:
            decoding.append(row["decoding"])
        for name, curve in curves.items():
            if "test" in row:
                curve.test_steps.append(row["step"])
                curve.test_loss.append(row["test"][name]["loss"])
                curve.test_accuracy.append(row["test"][name]["accuracy"])
                curve.test_top5.append(row["test"][name].get("top5"))
                curve.test_epochs.append(row["epoch"])
            elif name in row:
                curve.loss.append(row[name]["loss"])
                curve.accuracy.append(row[name]["accuracy"])
                curve.seconds.append(row[name]["seconds"])
    result = _figures(trainer, curves, ops, sorted(skipped), decoding)
    write_json(trainer.folder / "result.json", result)
    write_chart(trainer.folder / "curves.png", _draw_curves(curves, trainer.steps_per_epoch))
    write_chart(trainer.folder / "speed.png", _draw_speed(result))
    for text in (_figures_text(result), _ops_text(ops)):
        console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)
    return result


def _figures(
    trainer: Trainer,
    curves: dict[str, Curve],
    ops: list[dict[str, Any]],
    skipped: list[str],
    decoding: list[float],
) -> dict[str, Any]:
    """What result.json holds. Speeds are the batch over the median step; of two models that took turns.

    Images are decoded as fast as all workers of all processes do it together, while the model has the processors too.
    """
    batch = trainer.config.batch_size
    seconds = {name: statistics.median(curve.seconds) for name, curve in curves.items() if curve.seconds}
    hands = max(trainer.config.workers, 1) * trainer.world.size
    kept = curves["ema" if "ema" in curves else list(curves)[-1]]
    best = max(range(len(kept.test_accuracy)), key=lambda index: (kept.test_accuracy[index], -index), default=None)
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
        "test_top5": {name: curve.test_top5[-1] if curve.test_top5 else None for name, curve in curves.items()},
        "best": None if best is None else {"epoch": kept.test_epochs[best], "test_accuracy": kept.test_accuracy[best]},
        "last_loss": {name: curve.loss[-1] for name, curve in curves.items() if curve.loss},
        "step_seconds": seconds,
        "images_per_second": {name: batch / each for name, each in seconds.items()},
        "decoded_per_second": batch * hands / max(statistics.median(decoding), 1e-9) if decoding else None,
    }
    if "naive" in curves:
        naive, fused = curves["naive"], curves["fused"]
        result["ratio"] = seconds["naive"] / seconds["fused"]
        result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(naive.loss, fused.loss, strict=True))
    return {**result, "ops": ops}


# -------------------------------------------------------------------------------------------------------- tables


def _figures_text(result: dict[str, Any]) -> str:
    names = list(result["test_accuracy"])
    rows = [("", *names)]
    shown = {
        "test accuracy": ("test_accuracy", "{:.2%}"),
        "test accuracy, top 5": ("test_top5", "{:.2%}"),
        "loss of the last step": ("last_loss", "{:.4f}"),
        "step, median": ("step_seconds", "{:.4f} s"),
        "images per second": ("images_per_second", "{:,.1f}"),
    }
    for title, (figure, form) in shown.items():
        values = [result[figure].get(name, "") for name in names]
        if title.endswith("top 5") and all(value in (None, 1.0) for value in values):
            continue  # five classes or fewer
        rows.append((title, *("none held out" if each is None else each and form.format(each) for each in values)))
    if "ratio" in result:
        speeds, difference = result["images_per_second"], f"{result['largest_loss_difference']:.1e}"
        rows.append(("images per second, ratio", *(f"{speeds[name] / speeds['naive']:.2f}" for name in names)))
        rows.append(("largest difference of the losses", *(difference if name == "fused" else "" for name in names)))
    head = f"{result['model']}, {result['steps']} steps of {result['batch_size']} images, on {result['device']}"
    tail = []
    if result["best"] is not None:
        best = result["best"]
        tail.append(f"best weights: epoch {best['epoch']}, test accuracy {best['test_accuracy']:.2%}")
    if result["decoded_per_second"] is not None:
        tail.append(f"images decoded per second, by all workers: {result['decoded_per_second']:,.0f}")
    if result["skipped"]:
        tail.append(f"images skipped: {len(result['skipped'])}")
    return "\n".join([head, table(rows), *tail])


def _ops_text(ops: list[dict[str, Any]]) -> str:
    rows = [("op", "direction", "calls", "backend")]
    rows += [
        (row["op"], row["direction"], str(row["calls"]), "; ".join([row["backend"], *row["declined"]])) for row in ops
    ]
    return f"Which backend ran each op, in one step\n{table(rows)}"


# -------------------------------------------------------------------------------------------------------- charts


def _draw_curves(curves: dict[str, Curve], steps_per_epoch: int) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    for name, axes in panels.items():
        for model, curve in curves.items():
            # two models lie on one another: the wider line shows beneath
            width, colour = (4 if model == "naive" else 1.5), COLOURS[model]
            raw = getattr(curve, name)
            epochs = [(step + 1) / steps_per_epoch for step in range(len(raw))]
            if raw:
                axes.plot(epochs, raw, color=colour, linewidth=0.8, alpha=0.35)
                means = _smoothed(raw)
                places = [epochs[-1] * (part + 0.5) / len(means) for part in range(len(means))]
                axes.plot(places, means, color=colour, linewidth=width, alpha=0.6, label=f"{model}, training")
            tests = [step / steps_per_epoch for step in curve.test_steps]
            if tests:
                axes.plot(
                    tests,
                    getattr(curve, f"test_{name}"),
                    color=colour,
                    linewidth=width,
                    linestyle="--",
                    marker="o",
                    markersize=4,
                    label=f"{model}, test",
                )
        axes.set(xlabel="epoch", ylabel=name, title=f"{name}, smoothed (raw: faint)")
        axes.grid(alpha=0.3)
    panels["accuracy"].yaxis.set_major_formatter(PercentFormatter(1.0))  # as many digits as the ticks have
    figure.legend(*panels["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _smoothed(values: list[float]) -> list[float]:
    """Means of as many equal parts as a curve has room for."""
    parts = min(SMOOTHED, max(1, len(values) // 4))
    bounds = [len(values) * part // parts for part in range(parts + 1)]
    return [statistics.fmean(values[low:high]) for low, high in itertools.pairwise(bounds)]


def _draw_speed(result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    speeds = result["images_per_second"]
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(speeds), list(speeds.values()), 0.6, color=[COLOURS[name] for name in speeds])
    slowest = min(speeds.values())
    ratios = [f"{each:,.0f}" + (f"  ({each / slowest:.2f} x)" if len(speeds) > 1 else "") for each in speeds.values()]
    axes.bar_label(bars, ratios, padding=4)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set(xlabel="images per second", title=f"{result['model']}, batch {result['batch_size']}\n{result['device']}")
    return figure
