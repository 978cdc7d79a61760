"""One model in training: forward, loss, backward, optimizer, schedule. A run has one lane, or two that take turns."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from vitkernels.settings import TrainConfig
from vitkernels.train import from_timm
from vitkernels.train.data import IGNORED
from vitkernels.train.distributed import World
from vitkernels.train.model import core, parameter_groups

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIGURES = 4  # loss, right answers, right among five, images


class Lane:
    """A model with everything that its training changes."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, steps_per_epoch: int) -> None:
        self.config, self.world = config, world
        self.model = model.to(world.device)
        self.ema = from_timm.average(self.model, config)
        compiled: Any = torch.compile(self.model) if config.compile else self.model
        self.parallel = world.wrap(compiled)
        self.optimizer = from_timm.optimizer(core(self.model), config) or AdamW(
            parameter_groups(core(self.model), config.weight_decay), lr=config.lr, fused=True
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
        self.schedule: Any = from_timm.schedule(self.optimizer, config, steps_per_epoch) or _schedule(
            self.optimizer, config, steps_per_epoch
        )

    @property
    def lr(self) -> float:
        """The highest learning rate of the next step."""
        return float(max(self.schedule.get_last_lr()))

    def step(
        self, images: Tensor, labels: Tensor, targets: Tensor | None = None, taken: int = 0
    ) -> tuple[float, Tensor]:
        """Train on a batch on this lane's device.

        Args:
            images: uint8 pixels, or floats from 0 to 1.
            labels: the classes, or IGNORED.
            targets: probabilities to learn in place of the labels, [B, classes].
            taken: steps before this one.

        Returns:
            Seconds that forward, backward and update took, and this process's sums as `_sums` has them.
        """
        start = self._clock()
        self.optimizer.zero_grad(set_to_none=True)
        readable = (labels != IGNORED).sum().clamp(min=1)
        total = torch.zeros(FIGURES, device=images.device)
        parts = [slice(at, at + self._part(len(images))) for at in range(0, len(images), self._part(len(images)))]
        for number, part in enumerate(parts):
            with self._alone(number + 1 < len(parts)):
                with self._autocast():
                    logits = self.parallel(images[part])
                soft = None if targets is None else targets[part]
                sums = _sums(logits, labels[part], self.config.label_smoothing, soft)
                self.scaler.scale(sums[0] / readable).backward()
            total = sums.detach() if len(parts) == 1 else total + sums.detach()
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, taken + 1)
        seconds = self._clock() - start
        self.schedule.step()
        return seconds, total

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor, model: nn.Module | None = None) -> Tensor:
        """This process's sums on a batch, without training; of another model if given: an average."""
        with self._autocast():
            logits = (model or self.model)(images)
        return _sums(logits, labels, label_smoothing=0.0)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], step: int | None = None) -> None:
        """Take a state back.

        Args:
            state: of a lane with the same settings.
            step: take the schedule, being of another length than the state's, from its start to this step.
        """
        self.model.load_state_dict(state["model"])
        if step is None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        else:
            self._schedule_at(step)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _schedule_at(self, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer first
            for _ in range(step):
                self.schedule.step()

    def _part(self, images: int) -> int:
        return -(-images // self.config.accumulate)

    def _alone(self, alone: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all but the last part stay in their process."""
        if alone and self.world.size > 1:
            return self.parallel.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=AMP_DTYPES[self.config.amp])

    def _clock(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what was launched has run: under 1 % of a step
        return time.perf_counter()


def _sums(logits: Tensor, labels: Tensor, label_smoothing: float, targets: Tensor | None = None) -> Tensor:
    """[loss, right answers, right among five, images], summed over the images that could be read."""
    known = labels != IGNORED
    logits = logits.float()
    if targets is None:
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED)
    else:
        loss = (F.cross_entropy(logits, targets, reduction="none") * known).sum()
    five = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    return torch.stack([loss, (logits.argmax(-1) == labels).sum(), five.sum(), known.sum()])


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up from a hundredth, then half a cosine down to 0 at the last step."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup * steps_per_epoch), total - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=total - warmup)
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
