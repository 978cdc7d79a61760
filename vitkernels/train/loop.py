"""The training loop: epochs of steps over one lane or two, tests, metrics and checkpoints.

A run killed at any moment and resumed takes the same steps, to the last bit, as one that was left alone: all that a
step depends on is in the checkpoint (weights, optimizer, schedule, random states, the step's number) or a function of
the seed and the step (order and augmentation, see `data`).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitkernels import dispatch
from vitkernels.train import checkpoint
from vitkernels.train.config import TrainConfig
from vitkernels.train.data import Batch, Source, held_out_loader, train_loader
from vitkernels.train.distributed import World
from vitkernels.train.lane import Lane
from vitkernels.train.metrics import Metrics
from vitkernels.train.model import WEIGHTS_FILE, ModelSpec, build_all, core
from vitkernels.train.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

CHECKPOINT = "checkpoint.pt"


class Trainer:
    """A run of `config` on `source`: built, given a checkpoint's state where it resumes, and run once."""

    def __init__(self, config: TrainConfig, world: World, source: Source, folder: Path, console: Console) -> None:
        self.config, self.world, self.source, self.folder, self.console = config, world, source, folder, console
        pin = world.device.type == "cuda"
        self.batches, self.loader = train_loader(source, config, world.rank, world.size, pin)
        self.test_batches = held_out_loader(source, config, world.rank, world.size, pin)
        self.steps_per_epoch = len(self.batches)
        self.total = config.epochs * self.steps_per_epoch

        torch.manual_seed(config.seed)
        self.spec = ModelSpec.of(config, source)
        models = build_all(self.spec, config.position_std, config.compare)
        self.lanes = {name: Lane(model, config, world, self.steps_per_epoch) for name, model in models.items()}
        torch.manual_seed(config.seed + world.rank)  # processes draw different DropPath masks
        self.step = 0

    @property
    def main(self) -> Lane:
        """The model that is kept; any other is there to be compared with it."""
        return list(self.lanes.values())[-1]

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def run(self) -> None:
        """Take the steps that are left."""
        record_ops = True
        with (
            Metrics(self.metrics_file, self.step) if self.world.is_first else contextlib.nullcontext() as self.metrics,
            Bar(self.console, self.total, self.step, self.config.batch_size) as self.bar,
        ):
            while self.step < self.total:
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
                    if ended or (every and self.step % every == 0):
                        self._save()

    def _step(self, batch: Batch, epoch: int, record_ops: bool) -> None:
        images, labels = self._to_device(batch)
        # whoever goes second finds the batch in the cache: they take turns
        lanes = list(self.lanes.items())[:: -1 if self.step % 2 else 1]
        row: dict[str, Any] = {"step": self.step + 1, "epoch": epoch + 1, "lr": lanes[0][1].lr}
        with contextlib.ExitStack() as stack:
            calls = stack.enter_context(dispatch.record()) if record_ops else []
            taken = {name: lane.step(images, labels) for name, lane in lanes}
        figures = self._figures({name: sums for name, (_, sums) in taken.items()})
        self.step += 1
        for name in self.lanes:
            if not math.isfinite(figures[name]["loss"]):
                raise FloatingPointError(
                    f"train: the loss of the {name} model is {figures[name]['loss']} at step {self.step}; "
                    f"needs a lower 'lr' or a longer warm-up; {self.kept}"
                )
            row[name] = {**figures[name], "seconds": taken[name][0]}
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
        sums = {name: torch.zeros(3, dtype=torch.float64, device=self.world.device) for name in self.lanes}
        errors: list[str] = []
        for lane in self.lanes.values():
            lane.model.eval()
        for batch in self.test_batches:
            images, labels = self._to_device(batch)
            errors += batch.errors
            for name, lane in self.lanes.items():
                sums[name] += lane.test(images, labels)
        for lane in self.lanes.values():
            lane.model.train()
        figures = self._figures(sums)
        row = {"step": self.step, "epoch": epoch + 1, "test": figures}
        skipped = self._skipped(errors, figures, len(self.source.test))
        if skipped:
            row["skipped"] = skipped
        self._log(row)
        accuracies = ", ".join(f"{name} {figures[name]['accuracy']:.2%}" for name in self.lanes)
        self.console.print(f"epoch {epoch + 1} of {self.config.epochs}: test accuracy {accuracies}", highlight=False)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.config.strict and batch.errors:
            raise ValueError(f"train: 'strict' is set, and an image cannot be read: {batch.errors[0]}")
        device = self.world.device
        return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)

    def _figures(self, sums: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Mean loss and accuracy over all processes, and how many images they are of."""
        rows = self.world.sum(torch.stack([each.double() for each in sums.values()])).tolist()
        return {
            name: {"loss": loss / max(images, 1), "accuracy": right / max(images, 1), "images": int(images)}
            for name, (loss, right, images) in zip(sums, rows, strict=True)
        }

    def _skipped(self, errors: list[str], figures: dict[str, dict[str, float]], expected: int) -> list[str]:
        """The images that some process could not read, each named on the screen."""
        readable = next(iter(figures.values()))["images"]
        if readable == expected:
            return []
        skipped = [error for each in self.world.gather(errors) for error in each]
        if not readable:
            raise ValueError(f"train: none of {expected} images can be read, the first being {skipped[0]}")
        for error in skipped:
            self.console.print(
                f"skipped an image that cannot be read: {error}", markup=False, highlight=False, soft_wrap=True
            )
        return skipped

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(row)

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
            "processes": self.world.size,
            "classes": self.source.classes,
            "training images": len(self.source.train),
        }

    def _save(self) -> None:
        random = self.world.gather(checkpoint.random_state(self.world.device))
        if self.metrics is not None:
            self.metrics.sync()
            lanes = {name: lane.state_dict() for name, lane in self.lanes.items()}
            state = {"step": self.step, "settings": self.settings(), "lanes": lanes, "random": random}
            checkpoint.save(self.folder / CHECKPOINT, state)
            checkpoint.write_weights(self.folder / WEIGHTS_FILE, core(self.main.model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it is of a run with other settings or other data.
        """
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"train: argument 'resume': {name} is {value!r}, and {state['settings'].get(name)!r} in the "
                    f"checkpoint in {self.folder}; needs the same"
                )
        for name, lane in self.lanes.items():
            lane.load_state_dict(state["lanes"][name])
        checkpoint.set_random_state(state["random"][self.world.rank], self.world.device)
        self.step = state["step"]


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
