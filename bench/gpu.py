"""Everything that wants a GPU, in one command of under 9 minutes: `make gpu`.

Nothing is fetched and nothing need be installed but torch and triton: the extension is built in place, the tests run on
real kernels, then the benches. Each stage is timed and has a limit of its own; what it printed and wrote until it was
stopped stays. A stage whose tool is not there says so. The stages' outcomes stand in build/gpu.json, the benches'
figures in bench/results/<device>.json.
"""

from __future__ import annotations

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
OUTCOMES = ROOT / "build" / "gpu.json"
PYTHON = sys.executable
LIMIT = 540  # seconds in all


@dataclass(frozen=True)
class Stage:
    """A command with its limit.

    Args:
        name: of the stage.
        command: its words; a program that is not there skips the stage.
        limit: seconds, then it is stopped with all that it started.
        needs: Python packages without which it is skipped.
        environment: variables that it gets beside this process's own.
    """

    name: str
    command: Sequence[str]
    limit: int
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """What it needs that is not there."""
        if shutil.which(self.command[0]) is None:
            return self.command[0]
        return next((package for package in self.needs if importlib.util.find_spec(package) is None), None)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and after how many seconds."""

    text: str
    seconds: float

    @property
    def bad(self) -> bool:
        return self.text.startswith(("failed", "stopped"))


def stages() -> list[Stage]:
    """In the order in which they run."""
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]

    def parallel(most: int) -> list[str]:
        """Compiling takes most of the tests' time, and runs on the CPU."""
        workers = min(most, os.cpu_count() or 1)
        return ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []

    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3", "--target-processes", "all"]
    # the allocator's own blocks would hide what lies beside a tensor
    exposed = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = "bench.run" if (ROOT / "bench" / "run.py").exists() else "bench.ops"
    return [
        Stage("install", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 90, ("setuptools",)),
        Stage("info", [PYTHON, "-m", "vitkernels", "info"], 20),
        Stage("behaviour", [*pytest, *parallel(4), "tests/test_gpu.py"], 100, ("pytest",)),
        Stage("cases", [*pytest, *parallel(12), "--maxfail", "60", "tests/test_triton.py"], 150, ("pytest",)),
        Stage(
            "sanitizer",
            [*sanitizer, *pytest, "tests/test_triton.py", "-k", "bfloat16 and (plain or 72 or (one and token))"],
            50,
            ("pytest",),
            exposed,
        ),
        Stage("benches", [PYTHON, "-m", bench, "--quick"], 125, ("pytest", "pytest_benchmark")),
    ]


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


def run_all(device: str, planned: Sequence[Stage], outcomes: Path) -> dict[str, Outcome]:
    """Run the stages in order; the file says after each one how far it has come."""
    done: dict[str, Outcome] = {}
    for stage in planned:
        print(f"== {stage.name} (up to {stage.limit} s): {' '.join(stage.command)}", flush=True)
        done[stage.name] = run(stage)
        outcomes.parent.mkdir(parents=True, exist_ok=True)
        written = {name: {"outcome": each.text, "seconds": each.seconds} for name, each in done.items()}
        outcomes.write_text(json.dumps({"device": device, "stages": written}, indent=1) + "\n")
    return done


def main() -> int:
    """Run the stages; 0 when none failed, 1 when one did, 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; needs an NVIDIA GPU", file=sys.stderr)
        return 2
    done = run_all(torch.cuda.get_device_name(), stages(), OUTCOMES)
    for name, outcome in done.items():
        print(f"{name:<10} {outcome.seconds:>6} s  {outcome.text}")
    print(f"{'in all':<10} {sum(outcome.seconds for outcome in done.values()):>6.1f} s")
    return int(any(outcome.bad for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
