"""A run from its settings to its report."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitkernels import dispatch, models
from vitkernels.settings import CONFIG_FILE, TrainConfig, require_packages
from vitkernels.train import checkpoint, machine
from vitkernels.train.data import DIGITS, open_source
from vitkernels.train.distributed import World, is_lost, world
from vitkernels.train.loop import CHECKPOINT, Trainer
from vitkernels.train.model import fused_blocks, require_logits
from vitkernels.train.report import report
from vitkernels.train.stopping import Stop, Stopped, listening

if TYPE_CHECKING:
    from rich.console import Console


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Train a model, and a second one beside it where config.compare says so.

    Writes into config.out: metrics.jsonl, checkpoint.pt, model.safetensors and config.json (for `load_model`),
    result.json, and curves and speed as PNG. Under torchrun every process calls it, and the first one writes.

    Args:
        config: the settings.
        console: where progress and tables go; standard output if None.

    Returns:
        The figures of result.json; nothing in processes other than the first.

    Raises:
        ValueError: settings, data or a checkpoint that do not fit.
        FileNotFoundError: a folder or a checkpoint that is not there.
        ModuleNotFoundError: a package of the trainer's that is not installed.
        OSError: a file that cannot be written (a full disk); what was saved before is kept.
        BackendError: none of config.backend's can serve a call.
        FloatingPointError: the loss is no longer a number.
        Stopped: on Ctrl-C or SIGTERM (a KeyboardInterrupt), after a checkpoint, with a sentence on how to continue.
        ConnectionError: another of the run's processes is gone.
    """
    require_packages()
    from rich.console import Console

    # signals are let go of last: torchrun's SIGTERM can come while a lost group is taken down, before the sentence
    with contextlib.ExitStack() as signals, contextlib.ExitStack() as stack:
        here = stack.enter_context(world(config.device))
        if config.batch_size % here.size:
            raise ValueError(
                f"train: argument 'batch_size' got {config.batch_size}; needs a multiple of {here.size}, the processes"
            )
        if torch.get_default_device().type != "cpu":  # on which samplers draw, and models are built
            stack.enter_context(torch.device("cpu"))
        if config.backends:
            stack.enter_context(dispatch.use(*config.backends))
            _check_backends(config.backends)
        stop = signals.enter_context(listening())
        quiet = Console(quiet=True)
        return _run(config, here, (console or Console()) if here.is_first else quiet, stop)


def _run(config: TrainConfig, here: World, console: Console, stop: Stop) -> dict[str, Any]:
    models.require(config.model)  # before a million files are looked at
    state = _find_checkpoint(config)
    source = open_source(config)
    folder = Path(config.out or f"runs/{source.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    trainer = Trainer(config, here, source, folder, console, stop)
    if state is not None:
        trainer.load_state_dict(state)
    require_logits(trainer.main.model, trainer.spec, here.device)
    if here.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"train: argument 'out': cannot make the folder {folder}: {error.strerror}") from error
        # paths from the root: the run may go on from another folder
        where = {name: _absolute(getattr(config, name)) for name in ("data", "val_data")}
        settings = {"model": asdict(trainer.spec), "classes": source.classes, "training": {**asdict(config), **where}}
        checkpoint.write_json(folder / CONFIG_FILE, settings)
        for line in opening(trainer):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        number = trainer.run()
    except KeyboardInterrupt:
        raise Stopped(f"interrupted at step {trainer.step}; {trainer.kept}") from None
    except (ValueError, OSError) as error:  # of an image or a file that other processes may not have met
        error.alone = True  # type: ignore[union-attr]
        raise
    except RuntimeError as error:
        if here.size == 1 or not is_lost(error):
            raise
        lost = ConnectionError(
            f"train: process {here.rank} of {here.size} lost another one at step {trainer.step}; {trainer.kept}"
        )
        lost.alone = True  # type: ignore[attr-defined]
        raise lost from error
    if number:
        raise Stopped(f"stopped at step {trainer.step}; {trainer.kept}", number)
    return report(trainer, console) if here.is_first else {}


def opening(trainer: Trainer) -> list[str]:
    """The first lines of a run: what it trains on, what it trains, for how long, on what."""
    config, source, model = trainer.config, trainer.source, trainer.main.model
    parameters = list(model.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    total = sum(each.numel() for each in parameters)
    of_these = "" if trained == total else f", {trained:,} of them trained"
    device = machine.device_name(trainer.world.device)
    processes = f", {trainer.world.size} processes" if trainer.world.size > 1 else ""
    there = [name for name in dispatch.order(trainer.world.device.type) if dispatch.why_not(name) is None]
    lines = [
        f"images: {len(source.train):,} to train on, {len(source.test or ()):,} to test on, in {len(source.classes)} "
        f"classes, from {config.data}",
        *source.notes,
        f"model: {trainer.spec.name}, {total:,} parameters{of_these}; {fused_blocks(model)}",
        f"steps: {trainer.total:,} of {config.batch_size} images, {trainer.steps_per_epoch:,} an epoch"
        + (f"; goes on from step {trainer.step:,}" if trainer.step else ""),
        f"device: {device}{processes}; ops run on {', or else '.join(there)}",
        *trainer.notes,
        f"writing to {trainer.folder}",
    ]
    return lines


def _absolute(path: str | None) -> str | None:
    return path if path in (None, DIGITS) else str(Path(str(path)).absolute())


def _check_backends(names: tuple[str, ...]) -> None:
    reasons = {name: dispatch.why_not(name) for name in names}
    if all(reasons.values()):
        sentence = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise dispatch.BackendError(f"train: argument 'backend' names none that is there. {sentence}")


def _find_checkpoint(config: TrainConfig) -> dict[str, Any] | None:
    path = Path(config.out) / CHECKPOINT if config.out else None
    if config.resume and path is not None:
        return checkpoint.load(path)
    if path is not None and path.exists():
        raise ValueError(
            f"train: argument 'out' got {config.out!r}, which holds a run; needs 'resume', or another folder"
        )
    return None
