"""Weights to start from, out of a local file: timm's, transformers', or a run's own."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn import VisionTransformer, resize_pos_embed

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # what others save weights under
_PREFIXES = ("module.", "_orig_mod.", "model.")
_POSITIONS = ("pos_embed", "position_embeddings", "pos_embedding")

# transformers' ViT, DeiT and DINOv2 in timm's names; q, k and v become one
_TRANSFORMERS = [
    (r"^(vit|deit|dinov2)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q_proj|k_proj|v_proj)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load what fits of a file into a model; a head of other classes starts anew, positions are resized.

    Args:
        model: in its own names: a preset or timm's in timm's, one of transformers in its.
        path: .safetensors, or what `torch.save` wrote of weights alone.

    Returns:
        Sentences: how many tensors were loaded, and which were not, on either side.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no weights, or none that the model has.
    """
    found = _of_transformers(model, path) or _read(path)
    own = model.state_dict()
    if isinstance(model, VisionTransformer) or type(model).__module__.startswith("timm."):
        found = in_timms_names(found)
    resized = [name for name in found if _is_positions(name) and name in own and found[name].shape != own[name].shape]
    for name in resized:
        found[name] = _resized(found[name], own[name])
    fits = {name: tensor for name, tensor in found.items() if name in own and tensor.shape == own[name].shape}
    if not fits:
        raise ValueError(
            f"train: argument 'init_from' got {str(path)!r}, which has {_some(found)}, and the model {_some(own)}; "
            "needs weights of the same kind of model"
        )
    model.load_state_dict(fits, strict=False)
    notes = [f"loaded {len(fits)} of {len(own)} tensors from {path}"]
    if resized:
        notes.append(f"resized: {_some(resized)}")
    new = [name for name in own if name not in fits]
    if new:
        notes.append(f"starts anew: {_some(new)}")
    unused = [f"{name} {list(tensor.shape)}" for name, tensor in found.items() if name not in fits]
    if unused:
        notes.append(f"of the file, not used: {_some(unused)}")
    return notes


def in_timms_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ViT, DeiT or DINOv2 under timm's names, q, k and v packed; any other as they are."""
    if not any("attention" in name for name in weights):
        return weights
    renamed: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        part = re.search(r"\.attn\.(q|k|v)(uery|ey|alue|_proj)\.", name)
        if part is None:
            renamed[name] = tensor
        else:
            packed.setdefault(name.replace(part[0], ".attn.qkv."), {})[part[1]] = tensor
    return renamed | {name: torch.cat([each[key] for key in "qkv"]) for name, each in packed.items() if len(each) == 3}


def _of_transformers(model: nn.Module, path: Path) -> dict[str, Tensor] | None:
    """What transformers reads for a model of its own: the names in a file are not always those in memory."""
    if not (path.is_file() and hasattr(model, "from_pretrained") and (path.parent / "config.json").is_file()):
        return None
    theirs, info = type(model).from_pretrained(  # type: ignore[attr-defined]
        path.parent, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    return {name: tensor for name, tensor in theirs.state_dict().items() if name not in info["missing_keys"]}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"train: argument 'init_from' got {str(path)!r}, which is no file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise a dozen types
        reason = str(error).split("\n", 1)[0]
        if isinstance(error, pickle.UnpicklingError):  # whose words advise to run what is in the file
            reason = "no file of torch.save's, or one of more than tensors"
        raise ValueError(f"train: argument 'init_from' got {str(path)!r}, which holds no weights ({reason})") from error
    if "lanes" in found:  # a run's checkpoint
        found = list(found["lanes"].values())[-1]
    while (wrapper := next((each for each in _WRAPPERS if isinstance(found.get(each), dict)), None)) is not None:
        found = found[wrapper]
    weights = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _is_positions(name: str) -> bool:
    return name.rpartition(".")[2] in _POSITIONS


def _resized(table: Tensor, wanted: Tensor) -> Tensor:
    """A table of positions of a square grid for another one, prefix tokens kept; as it is where it is of neither."""
    if table.dim() != 3 or wanted.dim() != 3 or table.shape[2] != wanted.shape[2]:
        return table
    for prefixes in range(2 + 8):  # class token, distillation token, registers
        sides = [math.isqrt(max(each.shape[1] - prefixes, 0)) for each in (table, wanted)]
        if all(side and side**2 + prefixes == each.shape[1] for side, each in zip(sides, (table, wanted), strict=True)):
            grids = [(side, side) for side in sides]
            return resize_pos_embed(table.float(), grids[0], grids[1], prefixes).to(table.dtype)
    return table


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
