"""How many of timm's registered models vk.fuse serves: `python -m bench.coverage`.

Every model that timm registers is built on the meta device, where weights take no memory, and fused. It counts as
fused whole when it has Transformer blocks and all of them are; for the others the first reason is kept.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

NO_BLOCKS = "no Transformer block of a kind that is known"
RESULTS = Path(__file__).parent / "results" / "timm-coverage.json"


def outcome(name: str) -> tuple[str, str]:
    """("whole" | "partly" | "none", the first reason) of one of timm's models."""
    import timm

    import vitkernels as vk

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name)
    with contextlib.suppress(ValueError):  # where a rule knows nothing in it
        vk.fuse(model)
    explanation = vk.explain(model)
    if not explanation.blocks:
        return "none", NO_BLOCKS
    reasons = list(explanation.unfused.values())
    if not reasons:
        return "whole", ""
    kind = "partly" if len(reasons) < len(explanation.blocks) else "none"
    return kind, re.sub(r"(?<!\w)\d+", "N", reasons[0])


def table(content: dict[str, Any]) -> str:
    """The count as a sentence, and the reasons of the models that have Transformer blocks and are not fused whole."""
    models = content["models"].values()
    counts = collections.Counter(each["outcome"] for each in models)
    reasons = collections.Counter(each["reason"] for each in models if each["reason"] not in ("", NO_BLOCKS))
    rows = [f"| {reason.replace('|', '/')} | {count} |" for reason, count in reasons.most_common(12)]
    others = sum(reasons.values()) - sum(count for _, count in reasons.most_common(12))
    without = sum(each["reason"] == NO_BLOCKS for each in models)
    return "\n".join(
        [
            f"Of the {len(models)} models that timm {content['timm']} registers, `vk.fuse` fuses {counts['whole']} at "
            f"all their blocks, and {without} have no Transformer blocks of a kind that it looks for. Why the rest is "
            "not:",
            "",
            "| first reason | models |",
            "| --- | ---: |",
            *rows,
            f"| others | {others} |",
            "",
        ]
    )


def main() -> int:
    """Build and fuse every registered model, and write what came of it."""
    from bench import machine
    from vitkernels.models import import_torchvision

    import_torchvision()
    import timm

    logging.disable(logging.WARNING)
    found: dict[str, dict[str, Any]] = {}
    names = [name for name in timm.list_models() if not sys.argv[1:] or re.search(sys.argv[1], name)]
    for name in names:
        try:
            kind, reason = outcome(name)
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            kind, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        found[name] = {"outcome": kind, "reason": reason}
    for kind in ("whole", "partly", "none", "failed"):
        chosen = [each for each in found.values() if each["outcome"] == kind]
        print(f"{kind}: {len(chosen)}")
        for reason, count in collections.Counter(each["reason"] for each in chosen).most_common(25):
            print(f"  {count:5}  {reason}")
    if len(sys.argv) == 1:
        content = {"timm": timm.__version__, "revision": machine.revision(), "models": found}
        RESULTS.write_text(json.dumps(content, indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
