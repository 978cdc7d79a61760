"""Models by name, from whichever library: "vit_small", "timm:vit_small_patch16_224"; nothing is downloaded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.libraries import import_torchvision, needed
from vitkernels.nn import create_model
from vitkernels.nn.presets import PRESET_NAMES, preset_of

__all__ = ["Asked", "Named", "build", "create", "import_torchvision", "library_of", "stir"]

DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Asked:
    """What a model shall be; None leaves it to the model.

    Attributes:
        image_size: height and width in pixels.
        classes: width of the head.
        channels: of an image.
        drop_path: stochastic depth at the last block.
        mean, std: of pixels, for a preset that normalises them itself.
        arguments: more keywords of the model's own.
    """

    image_size: int | None = None
    classes: int | None = None
    channels: int | None = None
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def options(self, **names: str) -> dict[str, Any]:
        """Keywords for what is asked for, under the names that a library has for it."""
        asked = {name: getattr(self, own) for own, name in names.items()}
        return {**{name: value for name, value in asked.items() if value}, **self.arguments}


@dataclass(frozen=True)
class Named:
    """A model with random weights, and the shape of an image that it takes.

    Attributes:
        name: as it was asked for, "timm:vit_small_patch16_224".
        module: in training mode.
        image: channels, height and width.
    """

    name: str
    module: nn.Module
    image: tuple[int, int, int]

    def images(self, batch: int) -> Tensor:
        """Random ones, [B, C, H, W] float32, on the CPU."""
        return torch.randn(batch, *self.image, dtype=torch.float32, device="cpu")


def create(name: str, asked: Asked = Asked()) -> Named:
    """Build a model as its library starts it.

    Args:
        name: a preset ("vit_small" is "vit_small_patch16"), "timm:NAME", "torchvision:NAME", or "transformers:TYPE" (a
            model type such as "vit" or "dinov2", or a path to a config.json or its folder).
        asked: what it shall be.

    Raises:
        ValueError: no such model, or one that cannot be what is asked for.
        ModuleNotFoundError: its library is not installed.
    """
    require(name)
    library, rest = library_of(name)
    try:
        module, image = _BUILDERS[library](rest, asked)
    except (TypeError, AssertionError, RuntimeError, AttributeError, KeyError, ImportError) as error:
        size = "" if asked.image_size is None else f" for images of {asked.image_size} x {asked.image_size}"
        more = f" with {dict(asked.arguments)}" if asked.arguments else ""
        raise ValueError(f"argument 'model' got {name!r}, which cannot be built{size}{more}: {error}") from error
    return Named(name, module.train(), image)


def require(name: str) -> None:
    """Raise what `create` raises for a name that its library does not know; nothing is built."""
    library, rest = library_of(name)
    _KNOWN[library](rest, name)


def build(name: str, image_size: int | None = None) -> Named:
    """Build a model with random weights, from torch's generator, none of which is where it starts.

    Args:
        name: as in `create`.
        image_size: height and width in pixels; the model's own if None.

    Raises:
        ValueError, ModuleNotFoundError: as `create`.
    """
    named = create(name, Asked(image_size))
    stir(named.module)
    return named


def library_of(name: str) -> tuple[str, str]:
    """The library of a model's name, and the name there; "vit_small_patch16_224", no preset, is one of timm's.

    Raises:
        ValueError: a library that is none of those, or no name.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        library, rest = ("timm" if preset_of(name) is None else "vitkernels"), name
    if library not in _BUILDERS or not rest:
        raise ValueError(
            f"argument 'model' got {name!r}; needs a preset such as vit_small, or LIBRARY:NAME with a library of "
            f"{', '.join(_BUILDERS)}, as in timm:vit_small_patch16_224"
        )
    return library, rest


def stir(model: nn.Module, by: float = 0.02) -> None:
    """Move every parameter off its starting value: behind a head of zeros every gradient is 0, and agrees with all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=by)


# ------------------------------------------------------------------------------------------------------ each library


def _known_timm(name: str, full: str) -> None:
    presets = [] if full.startswith("timm:") else PRESET_NAMES
    near = difflib.get_close_matches(name, presets, n=1, cutoff=0.6)
    timm = needed("timm", f"argument 'model' got {full!r}{f' (no preset; {near[0]} is one)' if near else ''}, which")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(_unknown(full, "timm", [*presets, *timm.list_models()], "a preset or " if presets else ""))


def _timm(name: str, asked: Asked) -> tuple[nn.Module, tuple[int, int, int]]:
    timm = needed("timm", "argument 'model'")
    config = timm.get_pretrained_cfg(name)
    channels, height, width = config.input_size if config is not None else (3, DEFAULT_SIZE, DEFAULT_SIZE)
    options = asked.options(classes="num_classes", channels="in_chans", drop_path="drop_path_rate")
    if asked.image_size is not None:
        height = width = asked.image_size
        if config is None or config.fixed_input_size:
            options = {"img_size": asked.image_size, **options}
    return timm.create_model(name, pretrained=False, **options), (asked.channels or channels, height, width)


def _known_torchvision(name: str, full: str) -> None:
    models = needed("torchvision.models", "argument 'model'")
    if name not in models.list_models(module=models):
        raise ValueError(_unknown(full, "torchvision", models.list_models(module=models)))


def _torchvision(name: str, asked: Asked) -> tuple[nn.Module, tuple[int, int, int]]:
    models = needed("torchvision.models", "argument 'model'")
    if asked.channels not in (None, 3):
        raise ValueError(f"argument 'model' got torchvision's {name!r}; needs 'data' of 3 channels")
    size = asked.image_size or DEFAULT_SIZE
    # vit_* hand their keywords on to VisionTransformer, which is made for one size; others take any
    own = {"image_size": size} if name.startswith("vit_") else {}
    options = asked.options(classes="num_classes", drop_path="stochastic_depth_prob")
    return models.get_model(name, weights=None, **{**own, **options}), (3, size, size)


def _known_transformers(name: str, full: str) -> None:
    needed("transformers", "argument 'model'")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not Path(name).exists() and name not in CONFIG_MAPPING:
        raise ValueError(_unknown(full, "transformers", CONFIG_MAPPING.keys()) + ", or a path to a config.json")


def _transformers(name: str, asked: Asked) -> tuple[nn.Module, tuple[int, int, int]]:
    transformers = needed("transformers", "argument 'model'")
    configs = transformers.AutoConfig
    config = configs.from_pretrained(name, local_files_only=True) if Path(name).exists() else configs.for_model(name)
    auto = _auto_class(transformers, config, needs_classes=asked.classes is not None)
    options = asked.options(channels="num_channels", drop_path="drop_path_rate")
    vision = getattr(config, "vision_config", config)  # of two towers, the one that sees
    if asked.image_size is not None and hasattr(vision, "image_size"):
        options = {"image_size": asked.image_size, **options}
    if asked.classes is not None:
        config.num_labels = asked.classes
    for key, value in options.items():
        holder = next((each for each in (config, vision) if hasattr(each, key)), None)
        if holder is None:
            raise TypeError(f"its config, {type(config).__name__}, has no {key!r}")
        if key == "image_size" and isinstance(holder.image_size, list | tuple) and isinstance(value, int):
            value = [value, value]
        try:
            setattr(holder, key, value)
        except Exception as error:  # the config's checks are errors of a class of their own
            raise TypeError(str(error)) from error
    kind = auto._model_mapping[type(config)]
    forward = inspect.signature((kind[0] if isinstance(kind, tuple) else kind).forward)
    required = {
        name
        for name, each in forward.parameters.items()
        if each.default is each.empty and each.kind != each.VAR_KEYWORD
    }
    if "pixel_values" not in forward.parameters or required - {"self", "pixel_values"}:
        raise ValueError(
            f"argument 'model' got transformers' {name!r}, which takes {', '.join(list(forward.parameters)[1:4])}; "
            "needs one that takes pixel_values alone, such as vit, dinov2 or clip_vision_model"
        )
    size = getattr(vision, "image_size", None) or asked.image_size or DEFAULT_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if config.architectures is None:  # where a type has two classifiers, from_config looks through these
        config.architectures = []
    return auto.from_config(config), (getattr(vision, "num_channels", 3), height, width)


def _auto_class(transformers: Any, config: Any, needs_classes: bool) -> Any:
    """With a classifier's head where there is one for this type of model."""
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel)[: 1 if needs_classes else 2]:
        if type(config) in auto._model_mapping:
            return auto
    auto = "AutoModelForImageClassification" if needs_classes else "AutoModel"
    raise ValueError(f"argument 'model' got the type {config.model_type!r}; needs one that {auto} knows")


def _known_vitkernels(name: str, full: str) -> None:
    if preset_of(name) is None:
        raise ValueError(_unknown(full, "vitkernels", PRESET_NAMES))


def _vitkernels(name: str, asked: Asked) -> tuple[nn.Module, tuple[int, int, int]]:
    size = asked.image_size or DEFAULT_SIZE
    options = asked.options(
        classes="num_classes", channels="in_chans", drop_path="drop_path_rate", mean="mean", std="std"
    )
    try:
        module = create_model(str(preset_of(name)), **{"img_size": size, **options})
    except ValueError as error:
        raise ValueError(
            f"argument 'model' got {name!r}, which cannot be built for images of {size} x {size}: {error}"
        ) from error
    return module, (asked.channels or 3, size, size)


_KNOWN: dict[str, Callable[[str, str], None]] = {
    "timm": _known_timm,
    "transformers": _known_transformers,
    "torchvision": _known_torchvision,
    "vitkernels": _known_vitkernels,
}
_BUILDERS: dict[str, Callable[[str, Asked], tuple[nn.Module, tuple[int, int, int]]]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vitkernels": _vitkernels,
}


def _unknown(full: str, library: str, known: Iterable[str], or_else: str = "") -> str:
    near = difflib.get_close_matches(full.rpartition(":")[2], list(known), n=3, cutoff=0.5)
    hint = f", such as {', '.join(near)}" if near else ""
    return f"argument 'model' got {full!r}; needs {or_else}a name that {library} knows{hint}"
