"""What `make emulate` leaves in the repository: bench/results/emulated.json, which says what was executed.

A row is an op in a dtype on a GPU, as one compiler compiles it; launches of real models have rows of their own, for
they run last. Its digest is of its trials' keys (`alike.digest`: launches as compiled, how numbers are drawn, the
reference) and of the machine's files, so that it stays valid over changes that leave its launches as they were. Such a
row is not run again. A row with a finding always is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "bench" / "results" / "emulated.json"
# what decides, beside launches, numbers drawn and references, what comes of a trial
MACHINE = ("tests/ptx/*.py", "tests/ptx/*.cpp", "tests/accuracy.py", "vitkernels/accuracy.py")
# files there that say what is done, and how it is kept
CHOOSING = ("emulate.py", "trials.py", "sample.py", "plant.py", "alike.py", "rows.py", "store.py")
# what decides about launches, numbers and references
_CASES = ("tests/case*.py", "tests/layouts.py", "tests/draws.py", "tests/ptx/trials.py", "vitkernels/ops/*.py")
LAUNCHES = {
    "triton": ("vitkernels/kernels/**/*.py", *_CASES),
    "cuda": ("vitkernels/ext*.py", "csrc/nvcc.py", "csrc/cuda/*", "csrc/shared/*", *_CASES),
}
KERNELS = {"triton": ("vitkernels/kernels/**/*.py",), "cuda": ("csrc/cuda/*", "csrc/shared/*")}

Place = tuple[str, str, str, str]  # GPU, op, dtype, "cases" of the list or "models"


def digest(patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """Of the files' contents."""
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.name not in without)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def machine() -> str:
    """Of the machine's files."""
    return digest(MACHINE, CHOOSING)


def backend_of(compiler: str) -> str:
    return "triton" if compiler.startswith("triton-") else "cuda"


def kernels(backend: str) -> str:
    """Of the kernels' files and the machine's: what the report calls "as they are"."""
    return _short(f"{digest(KERNELS[backend])} {machine()}")


def digest_of(keys: Iterable[str]) -> str:
    """A row's, of its trials' keys, or of their sources, on this machine; "" where one of them could not be told."""
    found = sorted(set(keys))
    return "" if "" in found else _short(" ".join([machine(), *found]))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """What was executed of an op.

    Attributes:
        compiler: such as "triton-3.6.0".
        gpu, op, dtype, of: its place; `of` is "cases" of the list or "models".
        trials: whose outcome is known: all that there were, unless one of them failed.
        launches: executed for it. Trials that are alike are executed once, for the first row that has one.
        failed: trials with a finding.
        digest: of its trials' keys and the machine; "" where trials are missing, or launch what cannot be told.
        sources: the same of what is known without compiling (`alike.sources`).
        kernels: what `kernels` gave when the row was last seen to be valid.
    """

    compiler: str
    gpu: str
    op: str
    dtype: str
    of: str
    trials: int
    launches: int
    failed: int
    digest: str
    sources: str
    kernels: str

    @property
    def place(self) -> Place:
        return self.gpu, self.op, self.dtype, self.of

    @property
    def passed(self) -> bool:
        """Whether all of its trials ran without a finding."""
        return not self.failed and bool(self.digest)


@dataclass
class Rows:
    """The file.

    Attributes:
        trials: how many there are for each compiler, executed or not.
        rows: what was executed.
    """

    trials: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path = FILE) -> Rows:
        """The file's, or none where there is no file."""
        if not path.exists():
            return cls()
        content = json.loads(path.read_text())
        return cls(content["trials"], [Row(**row) for row in content["rows"]])

    def of(self, compiler: str) -> dict[Place, Row]:
        return {row.place: row for row in self.rows if row.compiler == compiler}

    def put(self, compiler: str, rows: Iterable[Row], places: Iterable[Place], trials: int) -> None:
        """Replace rows of a compiler; those of places that are no more go."""
        found = self.of(compiler) | {row.place: row for row in rows}
        others = [row for row in self.rows if row.compiler != compiler]
        self.rows = [*others, *(found[place] for place in places if place in found)]
        self.trials[compiler] = trials

    def write(self, path: Path = FILE) -> None:
        """A line for each row, sorted, so that a change is seen as what it is."""
        lines = [json.dumps(asdict(row)) for row in sorted(self.rows, key=lambda row: (row.compiler, row.place))]
        trials, rows = json.dumps(dict(sorted(self.trials.items()))), ",\n".join(lines)
        new = path.with_suffix(".new")
        new.write_text(f'{{"trials": {trials}, "rows": [\n{rows}\n]}}\n')
        os.replace(new, path)
