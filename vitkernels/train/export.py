"""A trained model for others: a folder for timm or transformers, a file for ONNX or torch.export.

Each is read back by whoever it is for, and its answers are compared with the model's, before its place is named.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.fuse import unfuse
from vitkernels.libraries import needed
from vitkernels.models import library_of
from vitkernels.nn import PRESETS, VisionTransformer
from vitkernels.nn.presets import preset_of
from vitkernels.train.model import Trained, core, load_model
from vitkernels.train.standard import decompositions

OPSET = 20  # the first with Gelu; 23 has Attention too, which fewer runtimes have
LARGEST = 2**31 - 2**24  # bytes of weights that a file of ONNX (protobuf) holds; more lie in a file beside it
RTOL, ATOL = 1e-3, 1e-4  # sums in another order, through all layers


def export(run: str | Path, to: str, out: str | Path | None = None, *, weights: str = "last") -> Path:
    """Write a run's model for another program.

    Args:
        run: the run's folder.
        to: "timm" (a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`), "transformers" (a folder for
            `AutoModelForImageClassification.from_pretrained`), "onnx" (a file of standard operators) or "torch-export"
            (a file for `torch.export.load`, with the fused ops, where vitkernels is imported).
        out: where; a name in the run's folder if None.
        weights: "last", "best" or "ema".

    Returns:
        The file or folder. ONNX and torch.export take floats from 0 to 1, [B, C, S, S], B being any.

    Raises:
        FileNotFoundError: no such run.
        ModuleNotFoundError: a library that this needs is not installed.
        ValueError: a model that has no counterpart there, or whose answers there differ.
    """
    if to not in _WRITERS:
        raise ValueError(f"export: argument 'to' got {to!r}; needs {' or '.join(map(repr, _WRITERS))}")
    with _quiet():
        model, _ = load_model(run, weights)
    name, write = _WRITERS[to]
    path = Path(out) if out is not None else Path(run) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = model.spec
    images = torch.rand(2, spec.channels, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _quiet():
        theirs, ours = write(model, path, images), model(images)
    if not torch.allclose(theirs, ours, RTOL, ATOL):
        raise ValueError(
            f"export: the answers of {path} differ by {(theirs - ours).abs().max():.2g} from the model's; needs to be "
            "the same, and is not to be used"
        )
    return path


# ----------------------------------------------------------------------------------------------------- libraries


def _timm(model: Trained, path: Path, images: Tensor) -> Tensor:
    timm = needed("timm", "argument 'to'")
    architecture, arguments = _architecture(model)
    spec = model.spec
    stock = _timms(model, timm, architecture, arguments)
    config = {
        "mean": spec.mean,
        "std": spec.std,
        "input_size": (spec.channels, spec.image_size, spec.image_size),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": spec.num_classes,
        "label_names": model.classes,
    }
    timm.models.save_for_hf(
        stock, path, {"architecture": architecture, "pretrained_cfg": config}, arguments, safe_serialization=True
    )
    read = timm.create_model(f"local-dir:{path}", pretrained=True)
    return read.eval()(_normalised(model, images))


def _transformers(model: Trained, path: Path, images: Tensor) -> Tensor:
    transformers = needed("transformers", "argument 'to'")
    classes = dict(enumerate(model.classes))
    if library_of(model.spec.name)[0] == "transformers":
        stock: Any = unfuse(core(model.model))
        stock.config.id2label, stock.config.label2id = classes, {name: index for index, name in classes.items()}
    else:
        timm = needed("timm", "argument 'to'")
        architecture, arguments = _architecture(model)
        config = transformers.TimmWrapperConfig(
            architecture=architecture,
            model_args=arguments,
            num_labels=len(classes),
            id2label=classes,
            label2id={name: index for index, name in classes.items()},
            pretrained_cfg={
                "mean": list(model.spec.mean),
                "std": list(model.spec.std),
                "input_size": [model.spec.channels, model.spec.image_size, model.spec.image_size],
                "num_classes": len(classes),
            },
        )
        stock = transformers.TimmWrapperForImageClassification(config)
        stock.timm_model.load_state_dict(_timms(model, timm, architecture, arguments).state_dict())
    stock.save_pretrained(path)
    read = transformers.AutoModelForImageClassification.from_pretrained(path)
    return read.eval()(pixel_values=_normalised(model, images)).logits


def _architecture(model: Trained) -> tuple[str, dict[str, Any]]:
    """timm's name of the model, and the arguments that make it of that."""
    spec = model.spec
    library, name = library_of(spec.name)
    sizes = {"in_chans": spec.channels, **spec.arguments}
    if library == "timm":
        return name.partition(".")[0], ({"img_size": spec.image_size} if _is_sized(name) else {}) | sizes
    if library != "vitkernels":
        raise ValueError(f"export: argument 'to' is for models of timm and presets, and the run has {spec.name!r}")
    preset = str(preset_of(name))
    return "vit_base_patch16_224", {"img_size": spec.image_size, **PRESETS[preset], **sizes}


def _is_sized(name: str) -> bool:
    config = needed("timm", "argument 'to'").get_pretrained_cfg(name)
    return config is None or bool(config.fixed_input_size)


def _timms(model: Trained, timm: Any, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with the run's weights."""
    try:
        stock: nn.Module = timm.create_model(architecture, num_classes=model.spec.num_classes, **arguments)
        stock.load_state_dict(core(model.model).state_dict())
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"export: timm has no such model: {str(error).splitlines()[0]}") from error
    return stock.eval()


def _normalised(model: Trained, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (model.spec.mean, model.spec.std))
    return (images - mean) / std


# --------------------------------------------------------------------------------------------------------- graphs


class _Floats(nn.Module):
    """The model behind its normalisation, written as a graph has it."""

    def __init__(self, model: Trained) -> None:
        super().__init__()
        inner = model.model
        own = isinstance(inner, VisionTransformer)
        if isinstance(inner, VisionTransformer):  # its kernel does this too, from lists of numbers
            inner.patch_embed.mean = inner.patch_embed.std = None
        self.inner, self.own = inner, own
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(model.spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(model.spec.std).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.inner((image - self.mean) / self.std if self.own else image)


def _exported(model: Trained, images: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(_Floats(model).eval(), (images,), dynamic_shapes=({0: batch},))


def _torch_export(model: Trained, path: Path, images: Tensor) -> Tensor:
    torch.export.save(_exported(copy.deepcopy(model), images), str(path))
    return torch.export.load(str(path)).module()(images)


def _onnx(model: Trained, path: Path, images: Tensor) -> Tensor:
    """Fused ops become operators of the standard."""
    for library in ("onnx", "onnxscript"):
        needed(library, "argument 'to'")
    onnxruntime = needed("onnxruntime", "argument 'to', whose file is checked,")
    graph = _exported(copy.deepcopy(model), images).run_decompositions(decompositions())
    beside = sum(each.nbytes for each in model.state_dict().values()) > LARGEST
    torch.onnx.export(graph, (), str(path), opset_version=OPSET, dynamo=True, external_data=beside)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say of their progress is not the user's concern."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_WRITERS: dict[str, tuple[str, Callable[[Trained, Path, Tensor], Tensor]]] = {
    "timm": ("timm", _timm),
    "transformers": ("transformers", _transformers),
    "onnx": ("model.onnx", _onnx),
    "torch-export": ("model.pt2", _torch_export),
}
