"""Vision Transformers by name."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from vitkernels.libraries import needed
from vitkernels.nn.vision_transformer import VisionTransformer

# Dosovitskiy et al. 2020 (base, large, huge); Touvron et al. 2021 (tiny, small); Zhai et al. 2022 (giant);
# Alabdulmohsin et al. 2023 (so400m): width, depth, heads, hidden width
_SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}": {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
    }
    for size, (width, depth, heads, hidden) in _SIZES.items()
    for patch in (14, 16, 32)
}

PRESET_NAMES = [*(name.removesuffix("_patch16") for name in PRESETS if name.endswith("_patch16")), *PRESETS]


def create_model(name: str, *, img_size: int = 224, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of `PRESETS`, as "vit_small_patch16", or "vit_small" for the patch of 16; any other name, or
            "timm:NAME", is one of timm's, where timm is installed.
        img_size: in pixels; timm's models that take any size are built without it.
        num_classes: width of the head.
        kwargs: further arguments of `VisionTransformer`, over the preset's, or of `timm.create_model`.

    Raises:
        ValueError: an unknown name; the sentence holds the names nearest to it.
    """
    preset = preset_of(name)
    if preset is not None:
        return VisionTransformer(img_size=img_size, num_classes=num_classes, **{**PRESETS[preset], **kwargs})
    timm_name = name.removeprefix("timm:")
    try:
        timm = needed("timm", "that name")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"create_model: argument 'name' is {name!r}; needs {_known(name)} (timm's are not to be had: {error})"
        ) from error
    if not timm.is_model(timm_name.split(".")[0]):
        raise ValueError(f"create_model: argument 'name' is {name!r}; needs {_known(name)}, or a name that timm knows")
    config = timm.get_pretrained_cfg(timm_name)
    if config is not None and config.fixed_input_size:
        kwargs = {"img_size": img_size, **kwargs}
    return timm.create_model(timm_name, num_classes=num_classes, **kwargs)


def preset_of(name: str) -> str | None:
    """The preset that a name means, or None; "vit_small" is "vit_small_patch16"."""
    return next((each for each in (name, f"{name}_patch16") if each in PRESETS), None)


def _known(name: str) -> str:
    near = difflib.get_close_matches(name.removeprefix("timm:"), PRESETS, n=3, cutoff=0.5)
    return f"a preset such as {', '.join(map(repr, near or ['vit_small_patch16']))}"
