"""The libraries beside torch, imported in one way wherever one is used; this package imports without any."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

_declared: list[torch.library.Library] = []  # held: the declarations live as long as they do


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


def needed(module: str, what: str, package: str | None = None) -> Any:
    """A module of another library, or one sentence that says what to install.

    Args:
        module: its name, as "timm.data".
        what: who needs it, as "argument 'aug'".
        package: its name in a package index; the library's if None.

    Raises:
        ModuleNotFoundError: it is not there.
    """
    library = module.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"{what} needs {library}: pip install {package or library}")
    if library in ("timm", "transformers", "torchvision") and importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # the others import it
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs {module}, which cannot be imported: {error}") from error
