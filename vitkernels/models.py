"""Models by name for the command line: "timm:vit_small_patch16_224", from whichever library; nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import PRESETS, create_model

DEFAULT_SIZE = 224
_declared: list[torch.library.Library] = []  # held: the declarations live as long as they do


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


def build(name: str, image_size: int | None = None) -> Named:
    """Build a model with random weights, from torch's generator.

    Args:
        name: "timm:NAME", "torchvision:NAME", "transformers:TYPE" (a model type such as "vit" or "dinov2", or a path
            to a config.json or its folder), or "vitkernels:NAME" (a preset; "vit_small" is "vit_small_patch16").
        image_size: height and width in pixels; the model's own if None.

    Raises:
        ValueError: no such model, or one that does not take images of that size.
        ModuleNotFoundError: its library is not installed.
    """
    library, colon, rest = name.partition(":")
    if library not in _BUILDERS or not colon or not rest:
        raise ValueError(
            f"argument 'model' got {name!r}; needs LIBRARY:NAME with a library of {', '.join(_BUILDERS)}, "
            "as in timm:vit_small_patch16_224"
        )
    if library != "vitkernels" and importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"argument 'model' got {name!r}: {library} is not installed")
    try:
        module, image = _BUILDERS[library](rest, image_size)
    except (TypeError, AssertionError, RuntimeError) as error:
        asked = "" if image_size is None else f" for images of {image_size} x {image_size}"
        raise ValueError(f"argument 'model' got {name!r}, which cannot be built{asked}: {error}") from error
    stir(module)
    return Named(name, module.train(), image)


def stir(model: nn.Module, by: float = 0.02) -> None:
    """Move every parameter off its starting value: behind a head of zeros every gradient is 0, and agrees with all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=by)


def import_torchvision() -> ModuleType:
    """torchvision; its models need nothing of its compiled part: where that does not load, its operators are declared.

    The compiled part loads beside one torch alone, and without it the import stops at the first operator's name.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


# ------------------------------------------------------------------------------------------------------ each library


def _timm(name: str, image_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    if importlib.util.find_spec("torchvision") is not None:  # timm imports it
        import_torchvision()
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(_unknown(f"timm:{name}", "timm", timm.list_models()))
    config = timm.get_pretrained_cfg(name)
    channels, height, width = config.input_size if config is not None else (3, DEFAULT_SIZE, DEFAULT_SIZE)
    if image_size is None:
        return timm.create_model(name, pretrained=False), (channels, height, width)
    options: dict[str, Any] = {"img_size": image_size} if config is None or config.fixed_input_size else {}
    return timm.create_model(name, pretrained=False, **options), (channels, image_size, image_size)


def _torchvision(name: str, image_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    models: Any = import_torchvision().models
    if name not in models.list_models(module=models):
        raise ValueError(_unknown(f"torchvision:{name}", "torchvision", models.list_models(module=models)))
    size = image_size or DEFAULT_SIZE
    # vit_* hand their keywords on to VisionTransformer, which is made for one size; others take any
    options = {"image_size": size} if name.startswith("vit_") else {}
    return models.get_model(name, weights=None, **options), (3, size, size)


def _transformers(name: str, image_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    if importlib.util.find_spec("torchvision") is not None:  # transformers' image processing imports it
        import_torchvision()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    elif name in CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        raise ValueError(
            _unknown(f"transformers:{name}", "transformers", CONFIG_MAPPING.keys()) + ", or a path to a config.json"
        )
    if image_size is not None and hasattr(config, "image_size"):
        config.image_size = image_size
    auto = _auto_class(transformers, config)
    kind = auto._model_mapping[type(config)]
    forward = inspect.signature((kind[0] if isinstance(kind, tuple) else kind).forward)
    needed = {
        name
        for name, each in forward.parameters.items()
        if each.default is each.empty and each.kind != each.VAR_KEYWORD
    }
    if "pixel_values" not in forward.parameters or needed - {"self", "pixel_values"}:
        raise ValueError(
            f"argument 'model' got 'transformers:{name}', which takes {', '.join(list(forward.parameters)[1:4])}; "
            "needs one that takes pixel_values alone, such as vit, dinov2 or clip_vision_model"
        )
    size = getattr(config, "image_size", None) or image_size or DEFAULT_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return auto.from_config(config), (getattr(config, "num_channels", 3), height, width)


def _auto_class(transformers: Any, config: Any) -> Any:
    """With a classifier's head where there is one for this type of model."""
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"argument 'model' got the type {config.model_type!r}; needs one that AutoModel knows")


def _vitkernels(name: str, image_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    preset = name if name in PRESETS else f"{name}_patch16"
    if preset not in PRESETS:
        raise ValueError(_unknown(f"vitkernels:{name}", "vitkernels", PRESETS))
    size = image_size or DEFAULT_SIZE
    return create_model(preset, img_size=size), (3, size, size)


_BUILDERS: dict[str, Callable[[str, int | None], tuple[nn.Module, tuple[int, int, int]]]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vitkernels": _vitkernels,
}


def _unknown(name: str, library: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.partition(":")[2], list(known), n=3, cutoff=0.5)
    hint = f", such as {', '.join(near)}" if near else ""
    return f"argument 'model' got {name!r}; needs a name that {library} knows{hint}"
