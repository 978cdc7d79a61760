"""A run from its settings to its report."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitkernels import dispatch
from vitkernels.train import checkpoint
from vitkernels.train.config import CONFIG_FILE, TrainConfig, require_packages
from vitkernels.train.data import open_source
from vitkernels.train.distributed import World, world
from vitkernels.train.loop import CHECKPOINT, Trainer
from vitkernels.train.report import report

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
        KeyboardInterrupt: on Ctrl-C, with a sentence on how to continue.
    """
    require_packages()
    from rich.console import Console

    with contextlib.ExitStack() as stack:
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
        quiet = Console(quiet=True)
        return _run(config, here, (console or Console()) if here.is_first else quiet)


def _run(config: TrainConfig, here: World, console: Console) -> dict[str, Any]:
    state = _find_checkpoint(config)
    source = open_source(config)
    folder = Path(config.out or f"runs/{source.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    trainer = Trainer(config, here, source, folder, console)
    if state is not None:
        trainer.load_state_dict(state)
    if here.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"train: argument 'out': cannot make the folder {folder}: {error.strerror}") from error
        settings = {"model": asdict(trainer.spec), "classes": source.classes, "training": asdict(config)}
        checkpoint.write_json(folder / CONFIG_FILE, settings)
        for note in source.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        console.print(f"writing to {folder}", markup=False, highlight=False, soft_wrap=True)
    try:
        trainer.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted at step {trainer.step}; {trainer.kept}") from None
    return report(trainer, console) if here.is_first else {}


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
