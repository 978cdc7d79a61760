"""What a run takes from timm: optimizers, schedules, Mixup and CutMix, random erasing, an average of the weights.

Each is the library's own, called where a setting asks for it; a run without those settings needs no timm.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.libraries import needed
from vitkernels.settings import TrainConfig
from vitkernels.train.augment import drawing_from
from vitkernels.train.data import IGNORED, Source


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
    """timm's, where 'opt' or 'layer_decay' ask for it.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: an optimizer that timm does not know.
    """
    if config.opt is None and config.layer_decay is None:
        return None
    optim = needed("timm.optim", f"argument '{'layer_decay' if config.opt is None else 'opt'}'")
    name = config.opt or "adamw"
    known = optim.list_optimizers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["adamw", "lamb", "lion", "sgd"]
        raise ValueError(
            f"train: argument 'opt' got {name!r}; needs one of the {len(known)} optimizers that timm knows, such as "
            f"{', '.join(near)}"
        )
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"train: argument 'layer_decay' got {config.layer_decay} with model {config.model!r}; needs a preset, or a "
            "model of timm, whose layers have an order"
        )
    return optim.create_optimizer_v2(
        model, opt=name, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )


class Schedule:
    """A schedule of timm, stepped as torch's are."""

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.taken = schedule, 0

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.schedule.optimizer.param_groups]

    def step(self) -> None:
        self.taken += 1
        self.schedule.step_update(self.taken)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.schedule.step_update(self.taken)


def schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Schedule | None:
    """timm's, where 'sched' asks for it.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: a schedule that timm does not know.
    """
    if config.sched is None:
        return None
    timm = needed("timm.scheduler", "argument 'sched'")
    known = ("cosine", "tanh", "step", "multistep", "poly")  # those that go by steps, not by what tests find
    if config.sched not in known:
        raise ValueError(f"train: argument 'sched' got {config.sched!r}; needs one of {', '.join(known)}")
    made, _ = timm.create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_epochs=max(config.epochs // 3, 1),
        decay_milestones=[config.epochs // 3, 2 * config.epochs // 3],
        warmup_epochs=config.warmup,
        warmup_lr=config.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    made.step_update(0)
    return Schedule(made)


def average(model: nn.Module, config: TrainConfig) -> Any:
    """timm's ModelEmaV3 of a model, where 'ema' asks for it; its decay grows to that number over the first steps."""
    if config.ema is None:
        return None
    return needed("timm.utils", "argument 'ema'").ModelEmaV3(model, decay=config.ema, use_warmup=True)


class Mix:
    """Mixup, CutMix and random erasing of a batch on its device, by timm; nothing where none is asked for.

    What they draw is a function of the run's seed, the step and the process alone.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: an odd number of images, which Mixup cannot pair.
    """

    def __init__(self, config: TrainConfig, source: Source, part: int, device: torch.device) -> None:
        self.mixup = self.erasing = None
        if config.mixup or config.cutmix:
            if part % 2:
                raise ValueError(
                    f"train: argument 'batch_size' got {config.batch_size}, {part} a process; needs an even number "
                    "there with 'mixup' or 'cutmix'"
                )
            self.mixup = needed("timm.data", "argument 'mixup'").Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(source.classes)
            )
        if config.erase:
            self.erasing = needed("timm.data.random_erasing", "argument 'erase'").RandomErasing(
                config.erase, mode="pixel", device=device.type
            )
        self.mean, self.std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (source.mean, source.std))

    def __call__(self, images: Tensor, labels: Tensor, rng: Any) -> tuple[Tensor, Tensor | None]:
        """Images as floats from 0 to 1 or a little past, and the probabilities to learn."""
        if self.mixup is None and self.erasing is None:
            return images, None
        images, targets = images / 255, None
        with drawing_from(rng):
            if self.erasing is not None:  # of normalised pixels, whose noise has the deviation of 1 that timm means
                images = self.erasing((images - self.mean) / self.std) * self.std + self.mean
            if self.mixup is not None:
                known = labels != IGNORED
                if not known.any():
                    return images, None
                # who cannot be read would be mixed into others: another image stands in, and counts nothing
                images = torch.where(known.view(-1, 1, 1, 1), images, images[known][:1])
                images, targets = self.mixup(images, torch.where(known, labels, labels[known][:1]))
        return images, targets
