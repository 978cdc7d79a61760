"""What wants a GPU, in commands of under 9 minutes: `make gpu`, `make gpu-checks`, `make gpu-cuda`, `make gpu-models`.

    python -m bench.gpu [tests | checks | cuda | models] [--out FOLDER]

tests   the tests on real kernels, then the benches
checks  a part of them under memcheck, and all under the other ptxas that Triton brings: the first one's is older, and
        what it makes of a kernel is held to the same tolerance
cuda    builds the extension's CUDA C++ with the toolkit that is there, runs the case list on it, then the benches
models  a training step of ViT-B, batch 256, against timm under torch.compile's max-autotune

Nothing is fetched and nothing need be installed but torch and triton: the extension is built in place first, its CUDA
half by the command that tests it. Each stage
is timed and has a limit of its own; what it printed and wrote until it was stopped stays. A stage whose tool is not
there says so. The stages' outcomes stand in build/gpu-<command>.json, the benches' figures in
bench/results/<device>.json; after each stage both are copied to the folder that --out names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTCOMES = ROOT / "build"
FIGURES = ROOT / "bench" / "results"
PYTHON = sys.executable
COMMANDS = ("tests", "checks", "cuda", "models")
LIMIT = 540  # seconds of a command


@dataclass(frozen=True)
class Stage:
    """A command with its limit.

    Args:
        name: of the stage.
        command: its words; a program that is not there skips the stage.
        limit: seconds, then it is stopped with all that it started.
        needs: Python packages without which it is skipped.
        environment: variables that it gets beside this process's own.
        files: without which it is skipped.
    """

    name: str
    command: Sequence[str]
    limit: int
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()

    @property
    def missing(self) -> str | None:
        """What it needs that is not there."""
        if shutil.which(self.command[0]) is None:
            return self.command[0]
        package = next((package for package in self.needs if importlib.util.find_spec(package) is None), None)
        return package or next((str(file) for file in self.files if not file.exists()), None)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and after how many seconds."""

    text: str
    seconds: float

    @property
    def bad(self) -> bool:
        return self.text.startswith(("failed", "stopped"))


def other_ptxas() -> Path:
    """The ptxas that Triton brings for sm_100 and later, of a later release; it also knows sm_80 and sm_90."""
    found = importlib.util.find_spec("triton")
    folder = Path(found.origin).parent if found is not None and found.origin else Path()
    return folder / "backends" / "nvidia" / "bin" / "ptxas-blackwell"


def stages(command: str) -> list[Stage]:
    """Of "tests", "checks", "cuda" or "models", in the order in which they run."""
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]

    def parallel(most: int, *distribution: str) -> list[str]:
        """Compiling takes most of the tests' time, and runs on the CPU."""
        workers = min(most, os.cpu_count() or 1)
        return ["-n", str(workers), "--dist", *distribution] if importlib.util.find_spec("xdist") else []

    # the first tests first: the time may not suffice for the last ones
    in_order = ("load", "--maxschedchunk", "3")
    # loadgroup: the cases of 48 GiB are one group
    behaviour = [*pytest, *parallel(6, "loadgroup"), "--limit=95", "tests/test_gpu.py"]
    cases = [*pytest, *parallel(13, *in_order), "--limit=160", "tests/test_triton.py"]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3", "--target-processes", "all"]
    # the allocator's own blocks would hide what lies beside a tensor
    exposed = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ptxas = other_ptxas()
    later = {"environment": {"TRITON_PTXAS_PATH": str(ptxas)}, "files": (ptxas,)}
    benches = [PYTHON, "-m", "bench.run"]
    needed = ("pytest", "pytest_benchmark")
    build = [PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    install = Stage("install", build, 90, ("setuptools",), {"VITKERNELS_BUILD_CUDA": "0"})
    cuda = [*pytest, *parallel(13, *in_order), "--limit=180", "tests/test_cuda.py"]
    return {
        "tests": [
            install,
            Stage("info", [PYTHON, "-m", "vitkernels", "info"], 20),
            Stage("behaviour", behaviour, 110, ("pytest",)),
            Stage("cases", cases, 180, ("pytest",)),
            Stage("benches", [*benches, "--quick"], 125, needed),
        ],
        "checks": [
            install,
            Stage(
                "sanitizer",
                [*sanitizer, *pytest, "tests/test_triton.py", "-k", "bfloat16 and (plain or 72 or (one and token))"],
                120,
                ("pytest",),
                exposed,
            ),
            Stage("behaviour, other ptxas", behaviour, 110, ("pytest",), **later),
            Stage("cases, other ptxas", cases, 180, ("pytest",), **later),
        ],
        "cuda": [
            Stage("install with CUDA C++", build, 180, ("setuptools",)),
            Stage("info", [PYTHON, "-m", "vitkernels", "info"], 20),
            Stage("cases", cuda, 200, ("pytest",)),
            Stage("benches", [*benches, "--quick"], 140, needed),
        ],
        "models": [install, Stage("models", [*benches, "--suite", "autotuned"], 440, needed)],
    }[command]


def run(stage: Stage) -> Outcome:
    """Run a stage to its end or its limit; what it prints goes where this process's output goes."""
    start = time.monotonic()

    def outcome(text: str) -> Outcome:
        return Outcome(text, round(time.monotonic() - start, 1))

    if stage.missing is not None:
        return outcome(f"skipped: {stage.missing} is not installed")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **stage.environment}
    with subprocess.Popen(list(stage.command), cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(stage.limit)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers too
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            return outcome(f"stopped after {stage.limit} s")
    return outcome("passed" if code == 0 else f"failed: exit code {code}")


def run_all(device: str, planned: Sequence[Stage], outcomes: Path, out: Path | None = None) -> dict[str, Outcome]:
    """Run the stages in order; the file says after each one how far it has come, and what is new is copied to `out`."""
    done: dict[str, Outcome] = {}
    start = time.time()
    for stage in planned:
        print(f"== {stage.name} (up to {stage.limit} s): {' '.join(stage.command)}", flush=True)
        done[stage.name] = run(stage)
        outcomes.parent.mkdir(parents=True, exist_ok=True)
        written = {name: {"outcome": each.text, "seconds": each.seconds} for name, each in done.items()}
        outcomes.write_text(json.dumps({"device": device, "stages": written}, indent=1) + "\n")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            figures = [path for path in FIGURES.glob("*.json") if path.stat().st_mtime >= start]
            for path in (outcomes, *figures):
                shutil.copy(path, out)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when none failed, 1 when one did, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="?", choices=COMMANDS, default=COMMANDS[0], help="what to run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where copies of outcomes and figures go")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; needs an NVIDIA GPU", file=sys.stderr)
        return 2
    outcomes = OUTCOMES / f"gpu-{options.command}.json"
    done = run_all(torch.cuda.get_device_name(), stages(options.command), outcomes, options.out)
    for name, outcome in done.items():
        print(f"{name:<22} {outcome.seconds:>6} s  {outcome.text}")
    print(f"{'in all':<22} {sum(outcome.seconds for outcome in done.values()):>6.1f} s")
    return int(any(outcome.bad for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
