"""What each command of the command line does; `cli` reads the words, and says what went wrong."""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitkernels import settings
from vitkernels.dispatch import BackendError, backends
from vitkernels.fuse import verify
from vitkernels.settings import TrainConfig
from vitkernels.text import table
from vitkernels.train import demo_config, machine, resume_config, train
from vitkernels.train.checkpoint import write_json
from vitkernels.train.lane import AMP_DTYPES

# what bad input or a full disk raises; anything else is a bug and shows its traceback
EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError, BackendError)


def _train(arguments: dict[str, Any]) -> None:
    if "model_args" in arguments:
        arguments["model_args"] = _model_args(arguments["model_args"])
    train(_settings(arguments, _train_config))


def _demo(arguments: dict[str, Any]) -> None:
    train(_settings(arguments, functools.partial(demo_config, quick=arguments.pop("quick"))))


def _settings(arguments: dict[str, Any], fresh: Callable[..., TrainConfig]) -> TrainConfig:
    """Those of the run that is resumed, what is given over them, or fresh ones."""
    if arguments.get("resume") and "out" in arguments:
        del arguments["resume"]
        return resume_config(**arguments)
    return fresh(**arguments)


def _train_config(recipe: str | None = None, **given: Any) -> TrainConfig:
    if recipe is not None:
        given = settings.recipe(recipe, **given)
    if "data" not in given:
        raise ValueError("train: needs --data, a folder of images; or --resume --out, the folder of a run to continue")
    return TrainConfig(**given)


def _model_args(pairs: list[str]) -> dict[str, Any]:
    """["depth=6", "global_pool=avg"] -> {"depth": 6, "global_pool": "avg"}."""
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise ValueError(f"train: argument 'model_args' got {pair!r}; needs KEY=VALUE, as in depth=6")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return arguments


def _eval(arguments: dict[str, Any]) -> None:
    from vitkernels.train import evaluate

    folder = Path(arguments["out"] or Path(arguments["run"]) / "eval")
    found = evaluate.evaluate(
        arguments["run"],
        arguments["data"],
        weights=arguments["weights"],
        batch_size=arguments["batch_size"],
        workers=arguments["workers"],
        device=_device(arguments["device"]),
    )
    found.write(folder)
    print(found)
    print(f"wrote {folder / 'eval.json'} and {folder / 'confusion.png'}")


def _predict(arguments: dict[str, Any]) -> None:
    from vitkernels.train import predict

    found = predict.predict(
        arguments["run"],
        arguments["images"],
        weights=arguments["weights"],
        top=arguments["top"],
        device=_device(arguments["device"]),
        rollout=arguments["rollout"],
    )
    print(found.to_json() if arguments["json"] else found)


def _export(arguments: dict[str, Any]) -> None:
    from vitkernels.train.export import export

    print(f"wrote {export(arguments['run'], arguments['to'], arguments['out'], weights=arguments['weights'])}")


def _info(arguments: dict[str, Any]) -> None:
    for title, rows in (
        ("Versions", machine.versions()),
        ("Devices", machine.devices()),
        ("Backends", backends()),
    ):
        print(f"{title}\n{table([(f'  {name}', value) for name, value in rows.items()])}")


def _verify(arguments: dict[str, Any]) -> int:
    from vitkernels import models

    device = _device(arguments["device"])
    torch.manual_seed(arguments["seed"])
    named = models.build(arguments["model"], arguments["image_size"])
    model = named.module.to(device).train(arguments["train"])
    images = named.images(arguments["batch"]).to(device)
    with _autocast(device, arguments["amp"]):
        found = verify(model, images)
    print(found)
    return 0 if found.ok else 1


def _bench(arguments: dict[str, Any]) -> None:
    from vitkernels import models, speed

    device, path = _device(arguments["device"]), arguments["json"]
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"bench: argument 'json' got {path!r}, whose folder is not there")
    torch.manual_seed(arguments["seed"])
    named = models.build(arguments["model"], arguments["image_size"])
    batch = arguments["batch"] or (8 if device.type == "cpu" else 64)
    found = speed.measure(
        named,
        batch,
        device,
        amp=AMP_DTYPES[arguments["amp"]] if arguments["amp"] else None,
        compiled=arguments["compile"],
        rounds=arguments["rounds"],
        say=lambda text: print(f"vitkernels: {text}", file=sys.stderr),
    )
    print(found)
    if path is not None:
        write_json(Path(path), found.to_dict())


def _device(name: str | None) -> torch.device:
    """The device of that name; the GPU where there is one, if None."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"argument 'device' got {name!r}: {str(error).splitlines()[0]}") from error


def _autocast(device: torch.device, amp: str | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if amp is None else torch.autocast(device.type, AMP_DTYPES[amp])


COMMANDS: dict[str, Callable[[dict[str, Any]], int | None]] = {
    "train": _train,
    "demo": _demo,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
    "verify": _verify,
    "bench": _bench,
    "info": _info,
}
