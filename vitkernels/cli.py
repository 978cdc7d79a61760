"""The command line: `python -m vitkernels train | demo | verify | bench | info`.

What a user can cause ends in one sentence on standard error: exit code 2, or 130 for Ctrl-C. `--debug` shows where it
came from.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from vitkernels.dispatch import BackendError, backends
from vitkernels.fuse import verify
from vitkernels.train import TrainConfig, config, demo_config, machine, resume_config, train
from vitkernels.train.checkpoint import write_json
from vitkernels.train.lane import AMP_DTYPES

# what bad input or a full disk raises; anything else is a bug and shows its traceback
EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError, BackendError)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; those of the process if None.

    Returns:
        The exit code: 0, 1 where `verify` finds a difference or verifies nothing, 2 for what a user can correct,
        130 for Ctrl-C.
    """
    arguments = vars(_parser().parse_args(argv))
    command, debug = arguments.pop("command"), arguments.pop("debug")
    try:
        return COMMANDS[command](arguments) or 0
    except EXPECTED as error:
        if debug:
            raise
        print(f"vitkernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nvitkernels: {error or 'interrupted'}", file=sys.stderr)
        return 130


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


def _train_config(**given: Any) -> TrainConfig:
    if "data" not in given:
        raise ValueError("train: needs --data, a folder of images; or --resume --out, the folder of a run to continue")
    return TrainConfig(**given)


def _info(arguments: dict[str, Any]) -> None:
    config.require_packages()
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in (
        ("Versions", machine.versions()),
        ("Devices", machine.devices()),
        ("Backends", backends()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


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
    "verify": _verify,
    "bench": _bench,
    "info": _info,
}


def _parser() -> Parser:
    parser = Parser(prog="vitkernels", description="Vision Transformers on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train a model on folders of images"),
        ("demo", "train on scikit-learn's digit scans, naive and fused in turn, and compare"),
        (
            "verify",
            "run a model with random weights stock and fused, and compare outputs and gradients; exit code 1 where "
            "they differ or nothing was verified",
        ),
        ("bench", "time a model's training step, stock and fused in turn"),
        ("info", "versions, devices, and each backend and why it is or isn't there"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "train":
            _add_options(command, [field.name for field in dataclasses.fields(TrainConfig)])
        elif name == "demo":
            command.add_argument("--quick", action="store_true", help="a few steps of a small model")
            _add_options(command, ["backend", "seed", "out", "resume"])
        elif name in ("verify", "bench"):
            _add_model_options(command)
            if name == "verify":
                command.add_argument("--batch", type=_positive, default=4, help="images (default: %(default)s)")
                command.add_argument("--train", action="store_true", help="in training mode: DropPath and dropout drop")
            else:
                command.add_argument("--batch", type=_positive, help="images a step (default: 8, on a GPU 64)")
                command.add_argument("--compile", action="store_true", help="also through torch.compile")
                command.add_argument(
                    "--rounds", type=_positive, default=10, help="timed steps of each variant (default: %(default)s)"
                )
                command.add_argument("--json", metavar="PATH", help="file for the figures")
    return parser


def _add_model_options(command: Parser) -> None:
    """What `verify` and `bench` run, and on what."""
    command.add_argument(
        "model",
        metavar="LIBRARY:NAME",
        help="timm:vit_small_patch16_224, torchvision:vit_b_16, transformers:dinov2 (a model type, or a path to a "
        "config.json) or vitkernels:vit_small; weights are random, nothing is downloaded",
    )
    command.add_argument("--image-size", type=_positive, help="height and width in pixels (default: the model's own)")
    command.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    command.add_argument("--amp", choices=tuple(AMP_DTYPES), help="autocast's type; float32 throughout if not given")
    command.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; needs 1 or more")
    return int(text)


def _add_options(command: Parser, names: list[str]) -> None:
    """An option for each of these fields of TrainConfig, with its type and help; one that is not given is not set."""
    hints = typing.get_type_hints(TrainConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in names:
        field, kind = fields[name], config.value_type(hints[name])
        flag, text = f"--{name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        if field.default not in (None, dataclasses.MISSING) and kind is not bool:
            text += f" (default: {field.default})"
        if kind is bool:
            command.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        elif name == "model_args":
            command.add_argument(flag, nargs="+", metavar="KEY=VALUE", default=argparse.SUPPRESS, help=text)
        else:
            choices = field.metadata["choices"]
            command.add_argument(flag, type=kind, default=argparse.SUPPRESS, choices=choices, help=text)


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
