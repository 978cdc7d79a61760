"""What the examples share: scikit-learn's digit scans as tensors, batches of them, and the option `--steps`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vitkernels as vk


class Scans(NamedTuple):
    """Handwritten digits: images [B, 1, 8, 8] uint8, labels [B] int64."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, count: int) -> Iterator[Scans]:
        """So many random batches of this size."""
        for _ in range(count):
            picked = torch.randint(len(self.labels), (size,))
            yield Scans(self.images[picked], self.labels[picked])


def digits(held_out: int = 360) -> tuple[Scans, Scans]:
    """scikit-learn's 1,797 scans in an order of their own: those to train on, and those held out."""
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    images = torch.from_numpy(source.images[order]).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target[order]).long()
    return Scans(images[held_out:], labels[held_out:]), Scans(images[:held_out], labels[:held_out])


def started(model: nn.Module) -> nn.Module:
    """The model with first weights for a narrow ViT and a short training; its own are for wide ones and long runs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(getattr(module, "pos_embed", None), nn.Parameter):
            nn.init.normal_(module.pos_embed, std=0.5)
    return model


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def ops_of(calls: list[vk.Call]) -> str:
    """The ops that ran, and on which backends: "attention, linear on ext"."""
    ops, backends = {call.op for call in calls}, {call.backend for call in calls}
    return f"{', '.join(sorted(ops))} on {', '.join(sorted(backends))}"


def steps(description: str | None, default: int) -> int:
    """The number of training steps that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=default, help=f"of training ({default})")
    return parser.parse_args().steps
