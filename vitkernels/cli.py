"""The command line: `python -m vitkernels train | demo | info`.

What a user can cause ends in one sentence on standard error: exit code 2, or 130 for Ctrl-C. `--debug` shows where it
came from.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from vitkernels.dispatch import BackendError, backends
from vitkernels.train import TrainConfig, config, demo_config, machine, train

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
        The exit code: 0, 2 for what a user can correct, 130 for Ctrl-C.
    """
    arguments = vars(_parser().parse_args(argv))
    command, debug = arguments.pop("command"), arguments.pop("debug")
    try:
        COMMANDS[command](arguments)
    except EXPECTED as error:
        if debug:
            raise
        print(f"vitkernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nvitkernels: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _train(arguments: dict[str, Any]) -> None:
    train(TrainConfig(**{**arguments, "model_args": _model_args(arguments["model_args"])}))


def _demo(arguments: dict[str, Any]) -> None:
    train(demo_config(**arguments))


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


COMMANDS = {"train": _train, "demo": _demo, "info": _info}


def _parser() -> Parser:
    parser = Parser(prog="vitkernels", description="Vision Transformers on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train a model on folders of images"),
        ("demo", "train on scikit-learn's digit scans, naive and fused in turn, and compare"),
        ("info", "versions, devices, and each backend and why it is or isn't there"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "train":
            _add_options(command, [field.name for field in dataclasses.fields(TrainConfig)])
        elif name == "demo":
            command.add_argument("--quick", action="store_true", help="a few steps of a small model")
            _add_options(command, ["backend", "seed", "out", "resume"])
    return parser


def _add_options(command: Parser, names: list[str]) -> None:
    """An option for each of these fields of TrainConfig, with the field's type, default and help."""
    hints = typing.get_type_hints(TrainConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in names:
        field, kind = fields[name], config.value_type(hints[name])
        flag, text = f"--{name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        required = field.default is dataclasses.MISSING
        if not required and field.default is not None and kind is not bool:
            text += " (default: %(default)s)"
        if kind is bool:
            command.add_argument(flag, action="store_true", help=text)
        elif name == "model_args":
            command.add_argument(flag, nargs="+", metavar="KEY=VALUE", help=text)
        else:
            default = None if required else field.default
            choices = field.metadata["choices"]
            command.add_argument(flag, type=kind, default=default, required=required, choices=choices, help=text)


def _model_args(pairs: list[str] | None) -> dict[str, Any] | None:
    """["depth=6", "global_pool=avg"] -> {"depth": 6, "global_pool": "avg"}."""
    if pairs is None:
        return None
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
