"""The models of a run, and a trained one read back from its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import PRESETS, VisionTransformer, create_model
from vitkernels.nn.naive import from_fused
from vitkernels.train.config import CONFIG_FILE, TrainConfig
from vitkernels.train.data import Source

WEIGHTS_FILE = "model.safetensors"
_UNDECAYED = frozenset({"pos_embed", "cls_token", "reg_token"})


class Normalised(nn.Module):
    """A model that takes normalised floats, fed with pixels: (image / 255 - mean) / std in front of it.

    Args:
        model: takes [B, C, H, W] floating point.
        mean, std: C numbers each, in [0, 1] pixel units.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> what the model gives."""
        return self.model((image.to(self.mean.dtype) / 255 - self.mean) / self.std)


@dataclass(frozen=True)
class ModelSpec:
    """All that it takes to build a model again; written beside its weights."""

    name: str
    image_size: int
    num_classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drop_path: float = 0.0
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig, source: Source) -> ModelSpec:
        """The model that a run's settings ask for, on its data."""
        return cls(
            config.model,
            config.image_size,
            len(source.classes),
            source.channels,
            source.mean,
            source.std,
            config.drop_path,
            dict(config.model_args or {}),
        )

    def build(self) -> nn.Module:
        """The model with fresh weights; it takes uint8 pixels.

        Raises:
            ValueError: an unknown name, or arguments that the model does not take.
        """
        arguments: dict[str, Any] = {"in_chans": self.channels, **self.arguments}
        if self.drop_path:
            arguments["drop_path_rate"] = self.drop_path
        pixels = {"mean": self.mean, "std": self.std} if self.name in PRESETS else {}
        try:
            model = create_model(
                self.name, img_size=self.image_size, num_classes=self.num_classes, **{**pixels, **arguments}
            )
        except (ImportError, RuntimeError, TypeError) as error:
            raise ValueError(f"train: cannot build model {self.name!r} with {arguments}: {error}") from error
        return model if self.name in PRESETS else Normalised(model, self.mean, self.std)


def build_all(spec: ModelSpec, position_std: float | None, compare: str | None) -> dict[str, nn.Module]:
    """The run's models by name, with the same weights; the last is the one that is kept.

    Raises:
        ValueError: as `ModelSpec.build`, or a model without a position table or without a naive counterpart.
    """
    model = spec.build()
    if position_std is not None:
        table = getattr(core(model), "pos_embed", None)
        if not isinstance(table, nn.Parameter):
            raise ValueError(
                f"train: argument 'position_std' got {position_std} with model {spec.name!r}; "
                "needs a model with a position table, pos_embed"
            )
        nn.init.normal_(table, std=position_std)
    if compare is None:
        return {"fused" if spec.name in PRESETS else "timm": model}
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"train: argument 'compare' got {compare!r} with model {spec.name!r}; needs a preset of vitkernels, "
            "as vit_small_patch16"
        )
    return {"naive": from_fused(model), "fused": model}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, LayerScale, positions and tokens do not."""
    own: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in _trained(model):
        plain = parameter.dim() > 1 and name not in own and name.rpartition(".")[2] not in _UNDECAYED
        (decayed if plain else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def core(model: nn.Module) -> nn.Module:
    """The model whose weights are written: without the pixel scaling around it."""
    return model.model if isinstance(model, Normalised) else model


def load_model(folder: str | Path) -> tuple[nn.Module, list[str]]:
    """Read a trained model back: `load_model("runs/digits")`.

    Args:
        folder: a run's folder.

    Returns:
        The model in eval mode on the CPU, which takes uint8 images [B, C, S, S], and the names of its classes.

    Raises:
        FileNotFoundError: the folder holds no trained model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_model: argument 'folder' got {str(folder)!r}, which holds no {name}")
    saved = json.loads((folder / CONFIG_FILE).read_text())
    with torch.device("cpu"):
        model = ModelSpec(**saved["model"]).build()
    core(model).load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval(), saved["classes"]
