"""One model in training: forward, loss, backward, optimizer, schedule. A run has one lane, or two that take turns."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from vitkernels.train.config import TrainConfig
from vitkernels.train.data import IGNORED
from vitkernels.train.distributed import World
from vitkernels.train.model import core, parameter_groups

AMP_DTYPES = {"bf16": torch.bfloat16}


class Lane:
    """A model with everything that its training changes."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, steps_per_epoch: int) -> None:
        self.config, self.world = config, world
        self.model = model.to(world.device)
        self.parallel = world.wrap(self.model)
        groups = parameter_groups(core(self.model), config.weight_decay)
        self.optimizer = AdamW(groups, lr=config.lr, fused=True)
        self.schedule = _schedule(self.optimizer, config, steps_per_epoch)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """Train on a batch, pixels and labels on this lane's device.

        Returns:
            Seconds that forward, backward and update took, and this process's sums as `_sums` has them.
        """
        start = self._clock()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.parallel(images)
        sums = _sums(logits, labels, self.config.label_smoothing)
        (sums[0] / sums[2].clamp(min=1)).backward()
        self.optimizer.step()
        seconds = self._clock() - start
        self.schedule.step()
        return seconds, sums.detach()

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> Tensor:
        """This process's sums on a batch, without training."""
        with self._autocast():
            logits = self.model(images)
        return _sums(logits, labels, label_smoothing=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=AMP_DTYPES[self.config.amp])

    def _clock(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what was launched has run: under 1 % of a step
        return time.perf_counter()


def _sums(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """[loss, right answers, images], summed over the images that could be read."""
    loss = F.cross_entropy(
        logits.float(), labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED
    )
    return torch.stack([loss, (logits.argmax(-1) == labels).sum(), (labels != IGNORED).sum()])


def _schedule(optimizer: AdamW, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up from a hundredth, then half a cosine down to 0 at the last step."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup * steps_per_epoch), total - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=total - warmup)
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
