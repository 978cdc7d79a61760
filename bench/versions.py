"""On which Pythons and torches the wheel runs: `python -m bench.versions` tries each pair that is to be had here.

Each pair gets a folder of packages of its own; the wheel of `make wheel` is installed there without its dependencies,
beside torch and what the trainer imports, and a model is trained for ten steps on the extension. With --source the
extension is built there from the sdist, beside that torch's own headers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine, tables
from bench.store import RESULTS
from vitkernels.train.checkpoint import write_json

ROOT = Path(__file__).parent.parent
FILE = RESULTS / "versions.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
# ten steps of a small model on the extension's kernels; the loss falls
TEN_STEPS = """
import torch, vitkernels as vk

torch.manual_seed(0)
model = vk.nn.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
losses = []
with vk.record() as calls:
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert {call.backend for call in calls} == {"ext"}, vk.backends()
print(f"trained ten steps with {vk.__file__}")
"""


def packed(ending: str = "whl") -> Path:
    """The newest wheel in dist/, or what else `make wheel` makes, "tar.gz".

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted((ROOT / "dist").glob(f"vitkernels-*.{ending}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"versions: no {ending} in {ROOT / 'dist'}; run make wheel")
    return found[-1]


def found(name: str) -> tuple[str, str] | None:
    """(version, interpreter) of "3.11" or a path; None where no such Python runs here."""
    interpreter = shutil.which(f"python{name}") or shutil.which(name)
    if interpreter is not None:
        asked = "import sys; print('{}.{}'.format(*sys.version_info))"
        done = subprocess.run([interpreter, "-c", asked], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip(), interpreter
    return None


def trial(interpreter: str, torch: str, source: bool) -> str:
    """What came of one pair, "ten steps" or why not; the folder is gone afterwards."""
    needs, own = [f"torch=={torch}", "numpy"], ["--no-deps", str(packed())]
    if source:
        needs, own = [*needs, "setuptools", "ninja"], ["--no-deps", "--no-build-isolation", str(packed("tar.gz"))]
    with tempfile.TemporaryDirectory() as folder:
        install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
        for packages in (needs, own):
            environment = os.environ | {"PYTHONPATH": folder, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
            done = subprocess.run([*install, *packages], capture_output=True, text=True, env=environment)
            if done.returncode:
                return f"does not install: {_last(done.stderr)}"
        run = [interpreter, "-I", "-c", f"import sys; sys.path.insert(0, {folder!r})\n{TEN_STEPS}"]
        done = subprocess.run(run, capture_output=True, text=True, cwd=folder)
        return f"ten steps{', built there' * source}" if done.returncode == 0 else _last(done.stderr)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].replace("|", "/") if lines else "no output"


def table(content: dict[str, Any]) -> str:
    """A line for each Python, a column for each torch: those that `make versions` tries, and what else was tried."""
    trials: dict[str, dict[str, str]] = {name: {} for name in PYTHONS} | content["trials"]
    torches = sorted({*TORCHES, *(torch for row in trials.values() for torch in row)})
    rows = ((f"Python {python}", *(row.get(torch, "") for torch in torches)) for python, row in sorted(trials.items()))
    grid = tables.grid(("", *(f"torch {torch}" for torch in torches)), rows)
    return f"{grid}\n\nTried at {content['revision']}; empty: not tried.\n"


def main(arguments: list[str] | None = None) -> int:
    """Try every pair and write what came of it, after each one; those that this wheel has behind it are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions or paths (default: %(default)s)")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help="versions (default: %(default)s)")
    parser.add_argument("--source", action="store_true", help="build the sdist there, rather than take the wheel")
    parser.add_argument("--out", type=Path, default=FILE, help="file for what came of it")
    known = parser.parse_args(arguments)
    content: dict[str, Any] = {"wheel": f"{packed().name} {_digest(packed())}", "trials": {}}
    if known.out.exists() and (before := json.loads(known.out.read_text()))["wheel"] == content["wheel"]:
        content["trials"] = before["trials"]
    content["revision"] = machine.revision()
    for name in known.python:
        python = found(name)
        row = content["trials"].setdefault(python[0] if python else name, {})
        for torch in known.torch:
            row[torch] = trial(python[1], torch, known.source) if python else "no such Python here"
            print(f"Python {name}, torch {torch}: {row[torch]}", flush=True)
            write_json(known.out, content)
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
