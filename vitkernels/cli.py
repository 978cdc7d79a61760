"""The command line: `python -m vitkernels train | demo | eval | predict | export | verify | bench | info`.

What a user can cause ends in one sentence on standard error: exit code 2, or 130 and 143 for Ctrl-C and SIGTERM.
`--debug` shows where it came from. This page imports no torch: words are read before it is (`answer_at_once`), and what
the commands do stands in `commands`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vitkernels.settings import TrainConfig, value_type
from vitkernels.text import is_first

COMMANDS = {
    "train": "train a model on folders of images",
    "demo": "train on scikit-learn's digit scans, naive and fused in turn, and compare",
    "eval": "test a trained model on a folder of images: accuracy, top-5, calibration, and who is taken for whom",
    "predict": "say what is in images, by a trained model",
    "export": "write a trained model for timm, transformers, ONNX or torch.export",
    "verify": "run a model with random weights stock and fused, and compare outputs and gradients; exit code 1 where "
    "they differ or nothing was verified",
    "bench": "time a model's training step, stock and fused in turn",
    "info": "versions, devices, and each backend and why it is or isn't there",
}
# titles of --help, each from this setting on
_GROUPS = {"data": "data", "model": "model", "epochs": "training", "aug": "augmentation", "amp": "how it runs"}
EXPORTS = ("timm", "transformers", "onnx", "torch-export")
WEIGHTS = ("last", "best", "ema")
AMP = ("bf16", "fp16")
PATIENCE = 10.0  # seconds


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, with the nearest of the words that it knows."""

    def error(self, message: str) -> NoReturn:
        chosen = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if chosen:
            message += _near(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        _leave_it_to_the_first(2)
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What the words of a command line say; leaves the process on --help, --version and words that are none."""
    parser, commands = _parsers()
    if "_ARGCOMPLETE" in os.environ and importlib.util.find_spec("argcomplete") is not None:
        import argcomplete

        argcomplete.autocomplete(parser)
    known, rest = parser.parse_known_args(argv)
    if rest:
        command = commands[known.command]
        hint = _near(rest[0].partition("=")[0], command._option_string_actions)
        command.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return vars(known)


def answer_at_once() -> None:
    """Where this process is `python -m vitkernels`: read its words now, for torch takes seconds to import.

    Until `main` runs, Ctrl-C and SIGTERM end it in one sentence, wherever among the imports it is.
    """
    if not _is_command_line():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    parse()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; those of the process if None.

    Returns:
        The exit code: 0, 1 where `verify` finds a difference or verifies nothing, 2 for what a user can correct,
        130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = parse(argv)
    command, debug = arguments.pop("command"), arguments.pop("debug")
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from vitkernels import commands

        try:
            return commands.COMMANDS[command](arguments) or 0
        except commands.EXPECTED as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            if not getattr(error, "alone", False):  # met by this process, and maybe by no other
                _leave_it_to_the_first(2)
            print(f"vitkernels: {_with_flags(str(error), command)}", file=sys.stderr)
            return 2
    except KeyboardInterrupt as error:
        if is_first():
            print(f"\nvitkernels: {_with_flags(str(error), command) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _is_command_line() -> bool:
    """Asked while the package is imported: `python -m` has put its own words into sys.argv, and "-m" before them."""
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "vitkernels"
    return bool(sys.argv) and Path(sys.argv[0]).name == "vitkernels"


def _leave(number: int, frame: FrameType | None) -> None:
    if is_first():
        os.write(2, b"\nvitkernels: interrupted\n")
    os._exit(128 + number)


def _leave_it_to_the_first(code: int) -> None:
    """Under torchrun every process finds the same fault, and the first one tells it; then torchrun ends the others.

    Where it has not ended this one after a while, the fault is this one's alone.
    """
    if not is_first():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(PATIENCE)


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _with_flags(sentence: str, command: str) -> str:
    """A sentence of the Python API in the words of the command line: argument 'batch_size' is --batch-size there."""
    words = {"folder": "RUN"}  # of load_model
    for action in _parsers()[1][command]._actions:
        long = next((flag for flag in action.option_strings if flag.startswith("--")), None)
        words[action.dest] = long or str(action.metavar)

    def flag(found: re.Match[str]) -> str:
        return f"{found['before']}{words[found['name']]}" if found["name"] in words else found[0]

    sentence = " ".join(sentence.split())
    return re.sub(r"(?P<before>argument |needs |than |most |with |without |or )'(?P<name>\w+)'", flag, sentence)


# ----------------------------------------------------------------------------------------------------------- options


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of everything, and each command's."""
    from vitkernels import __version__

    parser = Parser(
        prog="vitkernels",
        description="Vision Transformers on fused kernels.",
        epilog='Completion in a shell, with argcomplete installed: eval "$(register-python-argcomplete vitkernels)".',
    )
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Parser] = {}
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        commands[name] = command
    _train_options(commands["train"])
    demo = commands["demo"]
    demo.add_argument("--quick", action="store_true", help="a few steps of a small model")
    _settings_options(demo, ["backend", "seed", "out", "resume"])
    for name in ("eval", "predict", "export"):
        _run_options(commands[name], name)
    for name in ("verify", "bench"):
        _model_options(commands[name], name)
    return parser, commands


def _train_options(command: Parser) -> None:
    command.add_argument(
        "--recipe", default=argparse.SUPPRESS, help="settings to begin with: deit, finetune, probe, or a YAML file"
    )
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    starts = [names.index(name) for name in _GROUPS] + [len(names)]
    for title, start, end in zip(_GROUPS.values(), starts, starts[1:], strict=False):
        _settings_options(command.add_argument_group(title), names[start:end])


def _settings_options(command: Any, names: list[str]) -> None:
    """An option for each of these fields of TrainConfig, with its type and help; one that is not given is not set."""
    hints = typing.get_type_hints(TrainConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in names:
        field, kind = fields[name], value_type(hints[name])
        flags, text = [f"--{name.replace('_', '-')}", *field.metadata["flags"]], field.metadata["help"]
        text = text.replace("%", "%%")
        if field.default not in (None, dataclasses.MISSING) and kind is not bool:
            text += f" (default: {field.default})"
        if kind is bool:
            command.add_argument(*flags, action="store_true", default=argparse.SUPPRESS, help=text)
        elif name == "model_args":
            command.add_argument(*flags, nargs="+", metavar="KEY=VALUE", default=argparse.SUPPRESS, help=text)
        else:
            choices = field.metadata["choices"]
            command.add_argument(*flags, dest=name, type=kind, default=argparse.SUPPRESS, choices=choices, help=text)


def _run_options(command: Parser, name: str) -> None:
    """Of what works on a trained model."""
    command.add_argument("run", metavar="RUN", help="a run's folder")
    command.add_argument(
        "--weights", choices=WEIGHTS, default="last", help="of the run's weights, which (default: %(default)s)"
    )
    if name == "eval":
        command.add_argument(
            "--data",
            required=True,
            help="images, as `train` takes them; of those that RUN trained on, the ones that it held out",
        )
        command.add_argument("--batch-size", type=_positive, default=64, help="images at a time (default: %(default)s)")
        command.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
        command.add_argument("--out", help="folder for eval.json and confusion.png (default: RUN/eval)")
    elif name == "predict":
        command.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
        command.add_argument("--top", type=_positive, default=5, help="classes to name (default: %(default)s)")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--rollout", metavar="PNG", help="draw where its attention comes from, image by image")
    else:
        command.add_argument("--to", choices=EXPORTS, required=True, help="for whom")
        command.add_argument("--out", help="file or folder to write (default: in RUN)")
        return
    command.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")


def _model_options(command: Parser, name: str) -> None:
    """What `verify` and `bench` run, and on what."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="timm:vit_small_patch16_224, torchvision:vit_b_16, transformers:dinov2 (a model type, or a path to a "
        "config.json) or vit_small, a preset of vitkernels; weights are random, nothing is downloaded",
    )
    command.add_argument("--image-size", type=_positive, help="height and width in pixels (default: the model's own)")
    command.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    command.add_argument("--amp", choices=AMP, help="autocast's type; float32 throughout if not given")
    command.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    if name == "verify":
        command.add_argument("--batch", type=_positive, default=4, help="images (default: %(default)s)")
        command.add_argument("--train", action="store_true", help="in training mode: DropPath and dropout drop")
        return
    command.add_argument("--batch", type=_positive, help="images a step (default: 8, on a GPU 64)")
    command.add_argument("--compile", action="store_true", help="also through torch.compile")
    command.add_argument(
        "--rounds", type=_positive, default=10, help="timed steps of each variant (default: %(default)s)"
    )
    command.add_argument("--json", metavar="PATH", help="file for the figures")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; needs 1 or more")
    return int(text)
