"""Measurements: what the compiler says of the kernels, what this machine does, and the report made of both."""

import sys
from pathlib import Path

# the case list and the tolerance rule are the tests' own
sys.path.append(str(Path(__file__).parent.parent / "tests"))
