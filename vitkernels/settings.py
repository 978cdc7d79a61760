"""Every setting of a training run: its name, default, meaning and bounds, once, for Python and the command line.

This page and `cli` import no torch, so that `--help` and a misspelt word are answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"  # in a run's folder: its model, classes and settings
RECIPES = Path(__file__).parent / "train" / "recipes"
PACKAGES = {"matplotlib": "matplotlib", "PIL": "pillow", "rich": "rich", "safetensors": "safetensors"}


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number must be, as a sentence and as a test."""

    needs: str
    holds: Callable[[float], bool]


AT_LEAST_1 = Bound("1 or more", lambda value: value >= 1)
AT_LEAST_0 = Bound("0 or more", lambda value: value >= 0)
ABOVE_0 = Bound("more than 0", lambda value: value > 0)
SHARE = Bound("0 or more and less than 1", lambda value: 0 <= value < 1)
PART = Bound("more than 0 and 1 at most", lambda value: 0 < value <= 1)


def _option(
    default: Any,
    help: str,
    *,
    bound: Bound | None = None,
    choices: tuple[str, ...] | None = None,
    free: bool = False,
    flags: tuple[str, ...] = (),
) -> Any:
    """`free`: a resumed run may change it; `flags`: more names of it on the command line."""
    metadata = {"help": help, "bound": bound, "choices": choices, "free": free, "flags": flags}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of `train`; checked when made.

    Raises:
        TypeError: a value of another type than its field's.
        ValueError: a value out of its bounds, or two that do not go together.
    """

    data: str = _option(
        dataclasses.MISSING,
        "folder with one subfolder of images per class, or with train/ and val/ of such folders; a data set that "
        "Hugging Face's `datasets` saved; a folder of webdataset's .tar shards; or 'digits': scikit-learn's",
        free=True,
    )
    val_data: str | None = _option(
        None, "test images, laid out as --data; instead of --val-split", free=True, flags=("--val",)
    )
    val_split: float = _option(0.1, "share of each class held out for testing; 0 for none", bound=SHARE)
    model: str = _option(
        "vit_small_patch16",
        "a preset of vitkernels (vit_small), timm:NAME, transformers:TYPE (or a path to a config.json), or "
        "torchvision:NAME; its blocks run fused",
    )
    model_args: Mapping[str, Any] | None = _option(None, "more arguments of the model, as in depth=6 embed_dim=192")
    init_from: str | None = _option(
        None, "weights to start from, a local file (.safetensors, .pt, .bin): timm's, transformers' or a run's"
    )
    freeze: bool = _option(False, "train the head alone")
    image_size: int = _option(224, "side of the square that the model sees, in pixels", bound=AT_LEAST_1)
    epochs: int = _option(
        100, "passes over the training images; a resumed run may be given more", bound=AT_LEAST_1, free=True
    )
    batch_size: int = _option(128, "images per step, over all processes together", bound=AT_LEAST_1)
    accumulate: int = _option(1, "parts that a step's images go through the model in, to save memory", bound=AT_LEAST_1)
    lr: float = _option(5e-4, "the highest learning rate, after the warm-up", bound=ABOVE_0)
    weight_decay: float = _option(0.05, "weight decay, on matrices alone", bound=AT_LEAST_0)
    warmup_epochs: float | None = _option(
        None, "epochs of linear warm-up before the cosine (default: a tenth of all, at most 5)", bound=AT_LEAST_0
    )
    opt: str | None = _option(None, "an optimizer of timm, such as lamb or lion (default: torch's fused AdamW)")
    layer_decay: float | None = _option(
        None, "factor of the learning rate from each layer to the one before it, by timm", bound=PART
    )
    sched: str | None = _option(None, "a schedule of timm, such as step or poly (default: a cosine)")
    clip_grad: float | None = _option(None, "largest norm of all gradients", bound=ABOVE_0)
    label_smoothing: float = _option(0.0, "share of the target spread over all classes", bound=SHARE)
    drop_path: float = _option(0.0, "stochastic depth at the last block, growing linearly", bound=SHARE)
    aug: str | None = _option(None, "timm's augmentation of training images, such as rand-m9-mstd0.5-inc1")
    erase: float = _option(0.0, "probability of timm's random erasing", bound=SHARE)
    mixup: float = _option(0.0, "alpha of timm's Mixup", bound=AT_LEAST_0)
    cutmix: float = _option(0.0, "alpha of timm's CutMix", bound=AT_LEAST_0)
    ema: float | None = _option(None, "decay of an average of the weights (timm's ModelEmaV3), tested too", bound=SHARE)
    position_std: float | None = _option(
        None,
        "deviation that positions start with; a small data set wants more than the usual 0.02",
        bound=AT_LEAST_0,
    )
    amp: str | None = _option(
        None, "autocast's type, fp16 with a gradient scaler; float32 throughout if not given", choices=("bf16", "fp16")
    )
    compile: bool = _option(False, "run the model through torch.compile", free=True)
    backend: str | None = _option(None, "backends to ask, in order, of triton, ext and reference", free=True)
    compare: str | None = _option(
        None, "train this model too: same weights, same batches, a step of each in turn", choices=("naive",)
    )
    device: str | None = _option(None, "default: cuda where torch sees it", choices=("cpu", "cuda"), free=True)
    seed: int = _option(0, "of weights, order and augmentation (the test split stays the same)", bound=AT_LEAST_0)
    workers: int = _option(
        2, "processes that decode images; 0 decodes in the training process", bound=AT_LEAST_0, free=True
    )
    strict: bool = _option(False, "stop at a corrupt image; otherwise it is named, counted and skipped", free=True)
    log: str | None = _option(
        None, "write curves there too, beside metrics.jsonl", choices=("tensorboard", "wandb"), free=True
    )
    out: str | None = _option(None, "folder of the run (default: runs/DATA-DATE-TIME)", free=True)
    resume: bool = _option(False, "continue the run in --out, with its options, from its checkpoint", free=True)
    checkpoint_every: int = _option(
        0, "steps between checkpoints within an epoch; 0: at the end of each epoch alone", bound=AT_LEAST_0, free=True
    )

    def __post_init__(self) -> None:
        from vitkernels.dispatch import BACKENDS

        types = typing.get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = _as_plain(getattr(self, field.name))
            _check(field, types[field.name], value)
            object.__setattr__(self, field.name, value)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"train: argument 'warmup_epochs' got {self.warmup_epochs}; needs less than 'epochs', {self.epochs}"
            )
        if self.compare and self.drop_path:
            raise ValueError(
                f"train: argument 'drop_path' got {self.drop_path}; needs 0 with compare='naive', which has none"
            )
        if self.compare and (self.freeze or self.init_from):
            raise ValueError("train: argument 'compare' is set with 'init_from' or 'freeze'; needs neither")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"train: argument 'accumulate' got {self.accumulate}; needs at most 'batch_size', {self.batch_size}"
            )
        if self.resume and self.out is None:
            raise ValueError("train: argument 'resume' is set without 'out'; needs the folder of the run to continue")
        for name in self.backends:
            if name not in BACKENDS:
                raise ValueError(
                    f"train: argument 'backend' got {self.backend!r}; needs names of {', '.join(map(repr, BACKENDS))}"
                )

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that 'backend' names; none for the device's default order."""
        return () if self.backend is None else tuple(name.strip() for name in self.backend.split(","))

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it continues."""
        fields = (field.name for field in dataclasses.fields(self) if not field.metadata["free"])
        return {name: getattr(self, name) for name in fields}


def resume_config(out: str, **changes: Any) -> TrainConfig:
    """The settings that the run in the folder `out` was started with, to go on with it; `changes` go over them.

    Raises:
        FileNotFoundError: there is no run, and `changes` are not a run's settings themselves.
        ValueError: its settings cannot be read.
        TypeError, ValueError: as `TrainConfig`. Changes that the checkpoint does not bear are found by `train`.
    """
    path, known = Path(out) / CONFIG_FILE, {field.name for field in dataclasses.fields(TrainConfig)}
    kept: dict[str, Any] = {}
    if path.is_file():
        try:
            training = json.loads(path.read_text())["training"]
            kept = {name: value for name, value in training.items() if name in known}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"train: {path} does not hold a run's settings ({error}); it was left as it is") from error
    if "data" not in {**kept, **changes}:
        raise FileNotFoundError(f"train: argument 'resume' is set, and there is no run in {out}: no {path}")
    return TrainConfig(**{**kept, **changes, "out": out, "resume": True})


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """The settings of a recipe, with `changes` over them: `TrainConfig(**recipe("deit", data="photos"))`.

    Args:
        name: "deit", "finetune", "probe", or the path of a YAML file with settings by their names.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: a file that does not hold settings.
        ModuleNotFoundError: pyyaml is not installed.
    """
    require_packages({"yaml": "pyyaml"})
    import yaml

    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"train: argument 'recipe' got {name!r}; needs {', '.join(known)}, or the path of a YAML file"
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"train: argument 'recipe' got {name!r}, which is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"train: argument 'recipe' got {name!r}; needs lines such as 'lr: 0.001'")
    settings = {str(key).replace("-", "_"): value for key, value in settings.items()}
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = [key for key in settings if key not in fields]
    if unknown:
        raise ValueError(f"train: argument 'recipe' got {name!r}{near(unknown[0], fields, 'setting')}")
    return {**settings, **changes}


def near(word: str, known: Iterable[str], kind: str) -> str:
    """As in: , whose setting 'lrr' is unknown; did you mean lr?"""
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f", whose {kind} {word!r} is unknown" + (f"; did you mean {' or '.join(found)}?" if found else "")


def value_type(hint: Any) -> Any:
    """The type inside `X | None`, or X itself."""
    return next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint) if _is_optional(hint) else hint


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _as_plain(value: Any) -> Any:
    """Integers of any kind as ints, alone or in a mapping: a run's settings are written as JSON."""
    from vitkernels.ops._check import integer

    return {name: integer(each) for name, each in value.items()} if isinstance(value, Mapping) else integer(value)


def _check(field: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    name, metadata = field.name, field.metadata
    if value is None and _is_optional(hint):
        return
    kind = value_type(hint)
    kind = typing.get_origin(kind) or kind
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"train: argument '{name}' got {value!r} of type {type(value).__name__}; needs {kind.__name__}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise ValueError(f"train: argument '{name}' got {value!r}; needs {' or '.join(map(repr, metadata['choices']))}")
    bound = metadata["bound"]
    if bound is not None and not (math.isfinite(value) and bound.holds(value)):
        raise ValueError(f"train: argument '{name}' got {value}; needs {bound.needs}")


def require_packages(extra: Mapping[str, str] | None = None) -> None:
    """Say what to install before any work starts.

    Raises:
        ModuleNotFoundError: a package of the trainer's is not installed.
    """
    missing = [package for module, package in {**PACKAGES, **(extra or {})}.items() if not _is_installed(module)]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed; needs: pip install {' '.join(missing)}")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
