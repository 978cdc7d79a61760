"""The training loop: epochs of steps over one lane or two, tests, metrics and checkpoints.

A run killed at any moment and resumed takes the same steps, to the last bit, as one that was left alone: all that a
step depends on is in the checkpoint (weights, optimizer, schedule, random states, the step's number) or a function of
the seed and the step (order and augmentation, see `data`).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.settings import TrainConfig
from vitkernels.train import checkpoint, metrics
from vitkernels.train.data import Batch, Source, held_out_loader, train_loader
from vitkernels.train.distributed import World
from vitkernels.train.from_timm import Mix
from vitkernels.train.lane import FIGURES, Lane
from vitkernels.train.logs import Log
from vitkernels.train.metrics import Metrics
from vitkernels.train.model import WEIGHTS, ModelSpec, build_all, core, freeze_all_but_head
from vitkernels.train.progress import progress
from vitkernels.train.start import load_weights
from vitkernels.train.stopping import Stop

if TYPE_CHECKING:
    from rich.console import Console

CHECKPOINT = "checkpoint.pt"


class Trainer:
    """A run of `config` on `source`: built, given a checkpoint's state where it resumes, and run once.

    `stop` is looked at after each step: whoever sets its number gets a checkpoint of that step.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        source: Source,
        folder: Path,
        console: Console,
        stop: Stop | None = None,
    ) -> None:
        self.config, self.world, self.source, self.folder, self.console = config, world, source, folder, console
        self.stop, self.stopped = stop or Stop(), 0
        pin = world.device.type == "cuda"
        self.batches, self.loader = train_loader(source, config, world.rank, world.size, pin)
        self.test_batches = held_out_loader(source, config, world.rank, world.size, pin)
        self.steps_per_epoch = len(self.batches)
        self.total = config.epochs * self.steps_per_epoch

        torch.manual_seed(config.seed)
        self.spec = ModelSpec.of(config, source)
        models = build_all(self.spec, config.position_std, config.compare)
        self.notes: list[str] = []
        if config.init_from is not None and not config.resume:
            self.notes += load_weights(core(models["fused"]), Path(config.init_from))
        if config.freeze:
            self.notes.append(
                f"trains {', '.join(freeze_all_but_head(core(models['fused']), len(source.classes)))} alone"
            )
        self.lanes = {name: Lane(model, config, world, self.steps_per_epoch) for name, model in models.items()}
        self.mix = Mix(config, source, config.batch_size // world.size, world.device)
        torch.manual_seed(config.seed + world.rank)  # processes draw different DropPath masks
        self.step, self.best, self.is_best = 0, -1.0, False
        self.told: set[str] = set()  # images that cannot be read, each named once on the screen

    @property
    def main(self) -> Lane:
        """The model that is kept; any other is there to be compared with it."""
        return list(self.lanes.values())[-1]

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def run(self) -> int:
        """Take the steps that are left; the number of the signal that stopped it, or 0."""
        self.best = max(
            (self._score(row["test"]) for row in metrics.read(self.metrics_file, self.step, "test")), default=-1.0
        )
        record_ops = True
        with contextlib.ExitStack() as stack:
            self.metrics = stack.enter_context(Metrics(self.metrics_file, self.step)) if self.world.is_first else None
            library = self.config.log if self.world.is_first else None
            self.log = stack.enter_context(Log(library, self.folder, asdict(self.config)))
            self.bar = stack.enter_context(progress(self.console, self.total, self.step, self.config))
            while self.step < self.total and not self.stopped:
                epoch, self.batches.start = divmod(self.step, self.steps_per_epoch)
                self.batches.epoch = epoch
                for batch in self.loader:
                    self._step(batch, epoch, record_ops)
                    record_ops = False
                    ended = self.step % self.steps_per_epoch == 0
                    if ended:
                        self._test(epoch)
                    # only here: a checkpoint of a step comes after every row of that step
                    every = self.config.checkpoint_every
                    if ended or self.stopped or (every and self.step % every == 0):
                        self._save()
                    if self.stopped:
                        break
        return self.stopped if self.step < self.total else 0

    def _step(self, batch: Batch, epoch: int, record_ops: bool) -> None:
        images, labels = self._to_device(batch)
        seed = f"{self.config.seed} {self.step} {self.world.rank}"
        images, targets = self.mix(images, labels, Random(seed))
        # whoever goes second finds the batch in the cache: they take turns
        lanes = list(self.lanes.items())[:: -1 if self.step % 2 else 1]
        row: dict[str, Any] = {"step": self.step + 1, "epoch": epoch + 1, "lr": lanes[0][1].lr}
        with contextlib.ExitStack() as stack:
            calls = stack.enter_context(dispatch.record()) if record_ops else []
            taken = {name: lane.step(images, labels, targets, self.step) for name, lane in lanes}
        figures, (self.stopped, decoding) = self._figures(
            {name: sums for name, (_, sums) in taken.items()}, (self.stop.number, batch.seconds)
        )
        self.step += 1
        for name in self.lanes:
            if not math.isfinite(figures[name]["loss"]):
                raise FloatingPointError(
                    f"train: the loss of the {name} model is {figures[name]['loss']} at step {self.step}; "
                    f"needs a lower 'lr' or a longer warm-up; {self.kept}"
                )
            row[name] = {**figures[name], "seconds": taken[name][0]}
        row["decoding"] = decoding
        skipped = self._skipped(batch.errors, figures, self.config.batch_size)
        if skipped:
            row["skipped"] = skipped
        if calls:
            row["ops"] = _summary(calls)
        self._log(row)
        self.bar.step(row, list(self.lanes))

    @torch.no_grad()
    def _test(self, epoch: int) -> None:
        if self.test_batches is None or self.source.test is None:
            return
        models = {name: (lane, lane.model) for name, lane in self.lanes.items()}
        if self.main.ema is not None:
            models["ema"] = (self.main, self.main.ema.module)
        sums = {name: torch.zeros(FIGURES, dtype=torch.float64, device=self.world.device) for name in models}
        errors: list[str] = []
        for _, model in models.values():
            model.eval()
        for batch in self.test_batches:
            images, labels = self._to_device(batch)
            errors += batch.errors
            for name, (lane, model) in models.items():
                sums[name] += lane.test(images, labels, model)
        for lane in self.lanes.values():
            lane.model.train()
        figures, _ = self._figures(sums)
        row = {"step": self.step, "epoch": epoch + 1, "test": figures}
        skipped = self._skipped(errors, figures, len(self.source.test))
        if skipped:
            row["skipped"] = skipped
        self._log(row)
        score = self._score(figures)
        self.is_best = score > self.best
        self.best = max(score, self.best)
        accuracies = ", ".join(f"{name} {each['accuracy']:.2%}" for name, each in figures.items())
        five = f", top-5 {figures['fused']['top5']:.2%}" if len(self.source.classes) > 5 else ""
        self.console.print(
            f"epoch {epoch + 1} of {self.config.epochs}: test accuracy {accuracies}{five}",
            highlight=False,
            soft_wrap=True,
        )

    @staticmethod
    def _score(figures: dict[str, Any]) -> float:
        """What the best weights are best at: the accuracy of the model, or of its average where there is one."""
        return float(figures["ema" if "ema" in figures else list(figures)[-1]]["accuracy"])

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.config.strict and batch.errors:
            raise ValueError(f"train: argument 'strict' is set, and an image cannot be read: {batch.errors[0]}")
        device = self.world.device
        return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)

    def _figures(
        self, sums: dict[str, Tensor], more: tuple[float, float] = (0, 0)
    ) -> tuple[dict[str, dict[str, float]], tuple[int, float]]:
        """Over all processes: mean loss and accuracy, how many images they are of; and `more`, a signal and seconds.

        A signal may reach processes at different steps: all stop where the first of them knows of it.
        """
        table = torch.stack([each.double() for each in sums.values()])
        number, seconds = more
        last = table.new_tensor([number, number > 0, seconds, 0.0])
        *rows, (numbers, asked, seconds, _) = self.world.sum(torch.cat([table, last[None]])).tolist()
        figures = {
            name: {
                "loss": loss / max(images, 1),
                "accuracy": right / max(images, 1),
                "top5": five / max(images, 1),
                "images": int(images),
            }
            for name, (loss, right, five, images) in zip(sums, rows, strict=True)
        }
        return figures, (round(numbers / asked) if asked else 0, seconds)

    def _skipped(self, errors: list[str], figures: dict[str, dict[str, float]], expected: int) -> list[str]:
        """The images that some process could not read, each named on the screen."""
        readable = next(iter(figures.values()))["images"]
        if readable == expected:
            return []
        skipped = [error for each in self.world.gather(errors) for error in each]
        if not readable:
            raise ValueError(f"train: none of {expected} images can be read, the first being {skipped[0]}")
        for error in sorted(set(skipped) - self.told):
            self.console.print(
                f"skipped an image that cannot be read: {error}", markup=False, highlight=False, soft_wrap=True
            )
        self.told.update(skipped)
        return skipped

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(row)
        self.log.add(row)

    # ------------------------------------------------------------------------------------------------- checkpoints

    @property
    def kept(self) -> str:
        """What an interrupted run can go on from, in words."""
        if not (self.folder / CHECKPOINT).exists():
            return "no checkpoint was written yet"
        return f"the last checkpoint is kept: continue with --resume --out {self.folder}"

    def settings(self) -> dict[str, Any]:
        """What must be the same in a run and in its continuation."""
        return {
            **self.config.fixed(),
            "model_args": self.spec.arguments,
            "classes": self.source.classes,
            "training images": len(self.source.train),
        }

    def _save(self) -> None:
        random = self.world.gather(checkpoint.random_state(self.world.device))
        if self.metrics is not None:
            self.metrics.sync()
            lanes = {name: lane.state_dict() for name, lane in self.lanes.items()}
            settings = {**self.settings(), "epochs": self.config.epochs}
            state = {"step": self.step, "settings": settings, "lanes": lanes, "random": random}
            if self.is_best:
                kept = self.main.model if self.main.ema is None else self.main.ema.module
                checkpoint.write_weights(self.folder / WEIGHTS["best"], core(kept))
            checkpoint.save(self.folder / CHECKPOINT, state)
            checkpoint.write_weights(self.folder / WEIGHTS["last"], core(self.main.model))
            if self.main.ema is not None:
                checkpoint.write_weights(self.folder / WEIGHTS["ema"], core(self.main.ema.module))
        self.is_best = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it is of a run with other settings or other data.
        """
        if set(state["lanes"]) != set(self.lanes):
            raise ValueError(
                f"train: argument 'resume': the checkpoint in {self.folder} is of {', '.join(state['lanes'])}, and the "
                f"run trains {', '.join(self.lanes)}; needs the same (models of timm were trained stock once)"
            )
        # a setting that is younger than the checkpoint was what its default is
        kept = {**TrainConfig(data="").fixed(), **state["settings"]}
        for name, value in self.settings().items():
            if kept.get(name) != value:
                raise ValueError(
                    f"train: argument 'resume': {name} is {value!r}, and {kept.get(name)!r} in the "
                    f"checkpoint in {self.folder}; needs the same"
                )
        epochs = kept.get("epochs", self.config.epochs)
        if state["step"] > self.total:
            raise ValueError(
                f"train: argument 'epochs' got {self.config.epochs}; needs more than the {state['step']} steps of the "
                f"checkpoint in {self.folder}, {self.steps_per_epoch} an epoch"
            )
        other = epochs != self.config.epochs
        for name, lane in self.lanes.items():
            lane.load_state_dict(state["lanes"][name], state["step"] if other else None)
        self.step = state["step"]
        if other:
            self.notes.append(
                f"the run had {epochs} epochs and has {self.config.epochs} now: from step {self.step} on the learning "
                f"rate is that of a run of {self.config.epochs}, {self.main.lr:.2e}"
            )
        if len(state["random"]) == self.world.size:
            checkpoint.set_random_state(state["random"][self.world.rank], self.world.device)
        else:
            torch.manual_seed(hash((self.config.seed, self.step, self.world.rank)) % 2**63)
            self.notes.append(
                f"the run had {len(state['random'])} processes and has {self.world.size} now: the same batches, other "
                "random numbers of DropPath and dropout"
            )


def _summary(calls: list[dispatch.Call]) -> list[dict[str, Any]]:
    """Which backend ran each op, how often, and what the ones before it said."""
    counted = Counter(calls)
    return [
        {
            "op": call.op,
            "direction": call.direction,
            "backend": call.backend,
            "calls": count,
            "declined": [f"{name}: {reason}" for name, reason in call.declined],
        }
        for call, count in counted.items()
    ]
