"""Does it pay? The demo with timm's model beside naive and fused, and each one's time to 97 % on the test images.

`python -m bench.training` writes bench/results/demo.json: the same weights to begin with, the same batches, the three
taking turns step by step. Only the seconds of steps count, not those of tests and loading.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peers as libraries
from rich.console import Console

from bench import machine, tables
from bench.store import RESULTS
from vitkernels.nn import PRESETS
from vitkernels.train import metrics
from vitkernels.train.checkpoint import write_json
from vitkernels.train.data import open_source
from vitkernels.train.demo import demo_config
from vitkernels.train.distributed import world
from vitkernels.train.lane import Lane
from vitkernels.train.loop import Trainer
from vitkernels.train.model import ModelSpec, Normalised, core
from vitkernels.train.report import report

GOAL = 0.97


def run(folder: Path, console: Console, *, quick: bool = False) -> dict[str, Any]:
    """Train the three and return result.json's figures with `seconds_to_97`, None where that was not reached."""
    config = demo_config(quick=quick, out=str(folder))
    with world(config.device) as here:
        trainer = Trainer(config, here, open_source(config), folder, console)
        naive, fused = trainer.lanes["naive"], trainer.lanes["fused"]
        timm = Lane(_timm(trainer.spec, fused), config, here, trainer.steps_per_epoch)
        trainer.lanes = {"naive": naive, "timm": timm, "fused": fused}
        folder.mkdir(parents=True, exist_ok=True)
        trainer.run()
        result = report(trainer, Console(quiet=True))
    rows = list(metrics.read(trainer.metrics_file))
    return {**result, "seconds_to_97": {name: seconds_to(GOAL, name, rows) for name in trainer.lanes}}


def _timm(spec: ModelSpec, fused: Lane) -> Normalised:
    """timm's model with the fused one's weights."""
    arguments = {**PRESETS[spec.name], **spec.arguments, "in_chans": spec.channels}
    model = libraries.import_timm().models.VisionTransformer(
        img_size=spec.image_size, num_classes=spec.num_classes, **arguments
    )
    model.load_state_dict(core(fused.model).state_dict())
    return Normalised(model, spec.mean, spec.std)


def seconds_to(goal: float, name: str, rows: list[dict[str, Any]]) -> float | None:
    """Seconds of training before the first test with this accuracy; None where there was none."""
    spent = 0.0
    for row in rows:
        if "test" not in row:
            spent += row[name]["seconds"]
        elif row["test"][name]["accuracy"] >= goal:
            return spent
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, which learn nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json", help="results file")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"revision": machine.revision(), **run(Path(folder) / "run", Console(), quick=known.quick)}
    write_json(known.out, result)
    print(tables.demo(result))


if __name__ == "__main__":
    main()
