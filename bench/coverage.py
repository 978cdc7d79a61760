"""How many models of timm and vision towers of transformers vk.fuse serves: `python -m bench.coverage`.

Every model that timm registers, and every tower of `towers.TOWERS`, is built on the meta device, where weights take no
memory, and fused. It counts as fused whole when it has Transformer blocks and all of them are. Apart are those of which
every block is but for an attention that no op serves. For the others the first reason is kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import machine, towers

NO_BLOCKS = "no Transformer block of a kind that is known"
OUTCOMES = ("whole", "around", "partly", "none", "failed")
FOLDER = Path(__file__).parent / "results"
RESULTS = {library: FOLDER / f"{library}-coverage.json" for library in ("timm", "transformers")}
_TOLD = {
    "whole": "Whole",
    "around": "Around their own attention",
    "partly": "Some of their blocks",
    "none": "None of their blocks",
    "failed": "Could not be built here",
}
_ROWS = 20  # of the table of reasons
_SUBJECT = {"timm": "models that timm {} registers", "transformers": "vision towers of transformers {}"}


def timm_model(name: str) -> nn.Module:
    """One of timm's models."""
    import timm

    return timm.create_model(name)


BUILD: dict[str, Callable[[str], nn.Module]] = {"timm": timm_model, "transformers": towers.build}


def names(library: str) -> list[str]:
    """Everything of a library that is counted."""
    return list(importlib.import_module("timm").list_models()) if library == "timm" else list(towers.TOWERS)


def outcome(library: str, name: str) -> tuple[str, str]:
    """(one of `OUTCOMES`, the first reason) of a model."""
    import vitkernels as vk

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BUILD[library](name)
    with contextlib.suppress(ValueError):  # where a rule knows nothing in it
        vk.fuse(model)
    explanation = vk.explain(model)
    if not explanation.blocks:
        return "none", NO_BLOCKS
    reasons = [reason for block, reason in explanation.unfused.items() if block not in explanation.around]
    if not reasons:
        around = list(explanation.around.values())
        return ("around", _general(around[0])) if around else ("whole", "")
    kind = "partly" if len(reasons) < len(explanation.blocks) else "none"
    return kind, _general(reasons[0])


def _general(reason: str) -> str:
    return re.sub(r"(?<!\w)\d+", "N", reason)


def judged(library: str, name: str) -> dict[str, str]:
    """`outcome` of a model, or why it could not be built."""
    try:
        kind, reason = outcome(library, name)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, ImportError) as error:
        said = str(error).strip().splitlines()[0].partition(". ")[0]
        kind, reason = "failed", f"{type(error).__name__}: {said}"
    return {"outcome": kind, "reason": reason}


def table(content: dict[str, Any]) -> str:
    """The count as a sentence, and the reasons of the models that have Transformer blocks and are not fused whole."""
    library = next(each for each in RESULTS if each in content)
    models = content["models"].values()
    counts = collections.Counter(each["outcome"] for each in models)
    rest = [each for each in models if each["outcome"] not in ("whole", "around")]
    reasons = collections.Counter(each["reason"] for each in rest if each["reason"] != NO_BLOCKS)
    rows = [f"| {reason.replace('|', '/')} | {count} |" for reason, count in reasons.most_common(_ROWS)]
    others = sum(reasons.values()) - sum(count for _, count in reasons.most_common(_ROWS))
    if others:
        rows.append(f"| others | {others} |")
    without = sum(each["reason"] == NO_BLOCKS for each in models)
    around = f"; of {counts['around']} more, every block but for its attention" if counts["around"] else ""
    return "\n".join(
        [
            f"Of the {len(models)} {_SUBJECT[library].format(content[library])}, `vk.fuse` fuses every block of "
            f"{counts['whole']}{around}. {without} have no Transformer block of a kind that it looks for. What is "
            "different in the others, in the first block that is not fused:",
            "",
            "| why not | models |",
            "| --- | ---: |",
            *rows,
            "",
            *_listed(library, content["models"]),
            "",
        ]
    )


def _listed(library: str, models: dict[str, dict[str, str]]) -> Iterator[str]:
    """A line for each outcome, with its models: timm's by family, the first word of a name, with their number."""
    for kind, told in _TOLD.items():
        chosen = [name for name, each in models.items() if each["outcome"] == kind and each["reason"] != NO_BLOCKS]
        families = collections.Counter(name.split("_")[0] if library == "timm" else name for name in sorted(chosen))
        listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in families.items())
        if listed:
            yield f"- {told}: {listed}."


def main(arguments: list[str] | None = None) -> int:
    """Build and fuse everything, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", nargs="*", help=f"of {', '.join(RESULTS)}; all by default")
    parser.add_argument("--only", help="a regular expression: count these names, and write nothing")
    options = parser.parse_args(arguments)
    from vitkernels.models import import_torchvision

    import_torchvision()
    logging.disable(logging.WARNING)
    for library in options.library or RESULTS:
        found = {
            name: judged(library, name)
            for name in names(library)
            if options.only is None or re.search(options.only, name)
        }
        _tell(library, found)
        if options.only is None:
            version = importlib.import_module(library).__version__
            content = {library: version, "revision": machine.revision(), "models": found}
            RESULTS[library].write_text(json.dumps(content, indent=0) + "\n")
    return 0


def _tell(library: str, found: dict[str, dict[str, str]]) -> None:
    for kind in OUTCOMES:
        chosen = [each for each in found.values() if each["outcome"] == kind]
        print(f"{library}, {kind}: {len(chosen)}")
        for reason, count in collections.Counter(each["reason"] for each in chosen).most_common(25):
            print(f"  {count:5}  {reason}")


if __name__ == "__main__":
    sys.exit(main())
