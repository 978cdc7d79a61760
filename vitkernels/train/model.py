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

from vitkernels.dispatch import BackendError
from vitkernels.fuse import explain, fuse
from vitkernels.models import Asked, create, library_of
from vitkernels.nn import VisionTransformer
from vitkernels.nn.naive import from_fused
from vitkernels.settings import CONFIG_FILE, TrainConfig
from vitkernels.train.data import Source

WEIGHTS_FILE = "model.safetensors"
WEIGHTS = {"last": WEIGHTS_FILE, "best": "best.safetensors", "ema": "ema.safetensors"}
PAST = 0.05  # how far bicubic resizing goes past 0 and 1
# positions and tokens, as timm, torchvision and transformers name them
_UNDECAYED = frozenset(
    {"pos_embed", "pos_embedding", "position_embedding", "position_embeddings"}
    | {"cls_token", "class_token", "dist_token", "distillation_token", "mask_token", "reg_token", "register_tokens"}
)


class Normalised(nn.Module):
    """A model that takes normalised images, fed with pixels: (image - mean) / std in front of it, the logits behind.

    Args:
        model: takes [B, C, H, W] floating point; gives logits, or an output with `.logits`.
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
        """[B, C, H, W], uint8 or floating point from 0 to 1 -> [B, classes]."""
        pixels = image.to(self.mean.dtype)
        if image.dtype == torch.uint8:
            pixels = pixels / 255
        output = self.model((pixels - self.mean) / self.std)
        return getattr(output, "logits", output)


class Trained(nn.Module):
    """A trained model as `load_model` gives it.

    Attributes:
        model: the classifier, fused; it takes pixels.
        classes: names of its classes, in the order of the logits.
        spec: what it was built from: image size, channels, mean and std.
    """

    def __init__(self, model: nn.Module, classes: list[str], spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.classes, self.spec = model, classes, spec

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            image: [B, C, S, S], uint8, or floating point from 0 to 1. The run's mean and std are applied here.

        Returns:
            [B, classes].

        Raises:
            ValueError: floats that are not from 0 to 1, or a twentieth past: bytes as floats, or images that are
                normalised already.
        """
        if image.is_floating_point() and not torch.compiler.is_compiling() and image.numel():
            low, high = (each.item() for each in image.detach().aminmax())
            if low < -PAST or high > 1 + PAST:
                raise ValueError(
                    f"load_model: argument 'image' holds floats from {low:.3g} to {high:.3g}; needs uint8, or floats "
                    "from 0 to 1, which are normalised by the model"
                )
        return self.model(image)


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
            tuple(source.mean),
            tuple(source.std),
            config.drop_path,
            dict(config.model_args or {}),
        )

    def build(self) -> nn.Module:
        """The model with fresh weights, fused; it takes uint8 pixels, or floats from 0 to 1.

        Raises:
            ValueError: an unknown name, arguments that the model does not take, or one of which nothing can be fused.
            ModuleNotFoundError: its library is not installed.
        """
        own = library_of(self.name)[0] == "vitkernels"
        pixels = {"mean": tuple(self.mean), "std": tuple(self.std)} if own else {}
        asked = Asked(
            self.image_size, self.num_classes, self.channels, self.drop_path, arguments=self.arguments, **pixels
        )
        model = create(self.name, asked).module
        if own:
            return model
        try:
            fuse(model)
        except ValueError as error:
            raise ValueError(f"train: argument 'model' got {self.name!r}: {error}") from error
        return Normalised(model, tuple(self.mean), tuple(self.std))


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
        return {"fused": model}
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"train: argument 'compare' got {compare!r} with model {spec.name!r}; needs a preset of vitkernels, "
            "as vit_small_patch16"
        )
    return {"naive": from_fused(model), "fused": model}


@torch.no_grad()
def require_logits(model: nn.Module, spec: ModelSpec, device: torch.device) -> None:
    """Before a run's folder is made: a library may build what runs on no image of its size; presets run.

    Raises:
        ValueError: the model does not run, or does not give [B, classes].
    """
    if isinstance(model, VisionTransformer):
        return
    images = torch.zeros(2, spec.channels, spec.image_size, spec.image_size, dtype=torch.uint8, device=device)
    size = f"{spec.image_size} x {spec.image_size}"
    model.eval()
    try:
        logits = model(images)
    except BackendError:  # of the run's settings, not of the model
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError) as error:
        reason = f", which does not run on images of {size}: {error}"
        raise ValueError(f"train: argument 'model' got {spec.name!r}{reason}") from error
    finally:
        model.train()
    shape = list(getattr(logits, "shape", ()))
    if shape != [2, spec.num_classes]:
        raise ValueError(
            f"train: argument 'model' got {spec.name!r}, which gives {shape or type(logits).__name__} of 2 images; "
            f"needs logits of {spec.num_classes} classes"
        )


def freeze_all_but_head(model: nn.Module, classes: int) -> list[str]:
    """Let the last Linear as wide as there are classes train alone; the names of its parameters.

    Raises:
        ValueError: there is none.
    """
    heads = [
        name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each.out_features == classes
    ]
    if not heads:
        raise ValueError("train: argument 'freeze' is set, and no Linear of the model gives the classes; needs a head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{heads[-1]}."))
    return [name for name, _ in _trained(model)]


def fused_blocks(model: nn.Module) -> str:
    """In words: "12 of 12 blocks fused", with the reason of what is not."""
    return explain(core(model)).summary


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, LayerScale, positions and tokens do not."""
    own: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in _trained(model):
        plain = parameter.dim() > 1 and name not in own and _UNDECAYED.isdisjoint(name.split("."))
        (decayed if plain else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def core(model: nn.Module) -> nn.Module:
    """The model whose weights are written: without the pixel scaling around it."""
    return model.model if isinstance(model, Normalised) else model


def load_model(folder: str | Path, weights: str = "last") -> tuple[Trained, list[str]]:
    """Read a trained model back: `load_model("runs/digits")`.

    Args:
        folder: a run's folder.
        weights: "last", "best" (of the highest test accuracy) or "ema" (their average, where the run kept one).

    Returns:
        The model in eval mode on the CPU, fused, and the names of its classes. It takes images [B, C, S, S] of uint8,
        or of floats from 0 to 1; the run's mean and std are applied inside.

    Raises:
        FileNotFoundError: the folder holds no trained model, or not those weights.
        ValueError: another word for `weights`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"load_model: argument 'weights' got {weights!r}; needs {' or '.join(map(repr, WEIGHTS))}")
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS[weights]):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_model: argument 'folder' got {str(folder)!r}, which holds no {name}")
    from safetensors.torch import load_file

    saved = json.loads((folder / CONFIG_FILE).read_text())
    spec = ModelSpec(**saved["model"])
    with torch.device("cpu"):
        model = spec.build()
    core(model).load_state_dict(load_file(folder / WEIGHTS[weights]))
    return Trained(model, saved["classes"], spec).eval(), saved["classes"]
