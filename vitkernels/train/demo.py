"""The demo: a ViT on scikit-learn's handwritten digit scans, naive and fused, as settings of the trainer."""

from __future__ import annotations

from typing import Any

from vitkernels.settings import TrainConfig

# 64 patches of 4 x 4 pixels and a class token, width 192. A patch is one pixel of the scan: nearly all that it tells is
# where it stands, so positions start large.
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "val_split": 0.2,
    "model": "vit_tiny_patch16",
    "model_args": {"patch_size": 4, "depth": 2, "global_pool": "avg"},
    "image_size": 32,
    "position_std": 0.5,
    "epochs": 16,
    "batch_size": 32,
    "lr": 1e-3,
    "label_smoothing": 0.1,
    "warmup_epochs": 1.0,
    "compare": "naive",
    "workers": 0,  # the scans are in memory, and the processors are being timed
}
QUICK: dict[str, Any] = {
    "model_args": {"patch_size": 8, "depth": 1},
    "epochs": 1,
    "batch_size": 256,
    "warmup_epochs": 0.0,
}


def demo_config(*, quick: bool = False, **changes: Any) -> TrainConfig:
    """The demo's settings; `quick` is a few steps of a small model, which learn nothing; `changes` go over both."""
    return TrainConfig(**{**SETTINGS, **(QUICK if quick else {}), **changes})
