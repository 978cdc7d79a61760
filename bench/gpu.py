"""Everything that wants a GPU, in one command of under 9 minutes: `make gpu`.

Installs without network or dependencies, runs the tests on real kernels, then the benches. Each stage is timed and has
a limit of its own; what a stopped run has so far stays in bench/results/gpu.json and in the benches' own files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PYTHON = sys.executable

# name: (command, limit in seconds)
STAGES: dict[str, tuple[list[str], int]] = {
    "install": ([PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."], 90),
    "info": ([PYTHON, "-m", "vitkernels", "info"], 30),
    "tests": ([PYTHON, "-m", "pytest", "tests/test_triton.py", "-n", "8", "--maxfail", "60"], 180),
    "sanitizer": (
        f"compute-sanitizer --tool memcheck --error-exitcode 3 {PYTHON} -m pytest tests/test_triton.py "
        "-p no:xdist -k one_token-float32".split(),
        60,
    ),
    "ops": ([PYTHON, "-m", "bench.ops"], 150),
}


def main() -> int:
    """Run the stages; 0 when all passed, 1 when one failed, 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device; needs an NVIDIA GPU", file=sys.stderr)
        return 2
    done: dict[str, dict[str, object]] = {}
    for name, (command, limit) in STAGES.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        if shutil.which(command[0]) is None:
            outcome = f"skipped: {command[0]} is not installed"
        else:
            try:
                code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
                outcome = "passed" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit} s"
        done[name] = {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1)}
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gpu.json").write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "stages": done}, indent=1)
        )
    for name, stage in done.items():
        print(f"{name:<10} {stage['seconds']:>6} s  {stage['outcome']}")
    return int(any(str(stage["outcome"]).startswith(("failed", "stopped")) for stage in done.values()))


if __name__ == "__main__":
    sys.exit(main())
