"""Which CUDA toolkit compiles csrc/cuda, for which GPUs, and how: setup.py, the audit and the tests all ask here."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest torch that a binary must load in
ARCHITECTURES = (75, 80, 86, 89, 90)  # that every kernel is written for; later ones take the last one's PTX
FLAGS = (
    "-O3",
    "-std=c++17",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    "-DUSE_CUDA",  # in torch's headers: what only its CUDA builds have
    "-DPy_LIMITED_API=0x030A0000",
    "--expt-relaxed-constexpr",
)
WARNINGS = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Werror")
HOST = ("-Xcompiler=-fPIC,-fvisibility=hidden",)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: `home` holds bin/nvcc; `source` says how it was found."""

    home: Path
    source: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @functools.cached_property
    def version(self) -> str:
        """Such as "13.0"."""
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+\.\d+)", text)
        return found[1] if found else "unknown"

    @property
    def library(self) -> Path:
        """Where its runtime lies."""
        return next((self.home / name for name in ("lib64", "lib") if (self.home / name).is_dir()), self.home / "lib64")

    def __str__(self) -> str:
        return f"CUDA {self.version} at {self.home} ({self.source})"


def find() -> Toolkit | None:
    """CUDA_HOME where it is set, else the package nvidia-cuda-nvcc, else the usual place, else the nvcc on PATH."""
    return next((each for each in _candidates() if each.nvcc.exists()), None)


def _candidates() -> Iterator[Toolkit]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        yield Toolkit(Path(home), "CUDA_HOME")
        return  # what was asked for, or nothing
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for each in sorted(Path(folder).glob("cu[0-9]*"), reverse=True):
            yield Toolkit(each, "the package nvidia-cuda-nvcc")
    yield Toolkit(Path("/usr/local/cuda"), "the usual place")
    found = shutil.which("nvcc")
    if found:
        yield Toolkit(Path(found).resolve().parents[1], "nvcc on PATH")


def why_not() -> str | None:
    """A sentence that says why this torch gets no CUDA C++ here, or None."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    toolkit = find()
    if toolkit is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        return f"CUDA_HOME is {home}, which has no bin/nvcc" if home else "no CUDA toolkit was found; set CUDA_HOME"
    if toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"the toolkit is {toolkit}; needs the major version of torch's CUDA {torch.version.cuda}"
    return None


def targets() -> tuple[str, ...]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), the GPUs that are there, or all architectures."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not asked and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(each) for each in range(torch.cuda.device_count())}
        asked = [f"{major}.{minor}" for major, minor in sorted(found)]
    if not asked:
        asked = [f"{each // 10}.{each % 10}" for each in ARCHITECTURES]
        asked[-1] += "+PTX"
    flags = []
    for each in asked:
        number = re.match(r"(\d+)\.(\d+)", each)
        if number is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST holds {each!r}; needs numbers such as 8.0 or 9.0+PTX")
        name = number[1] + number[2]
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if each.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return (*flags, f'-DVITKERNELS_TARGETS="{names(flags)}"')


def names(flags: Sequence[str]) -> str:
    """What code the flags ask for: "sm_80 compute_90"."""
    return " ".join(flag.split(",code=")[1] for flag in flags if flag.startswith("-gencode"))


def ptx(architecture: int) -> tuple[str, ...]:
    """Flags under which the objects hold PTX alone, as text."""
    return (f"-gencode=arch=compute_{architecture},code=compute_{architecture}", "-Xfatbin=-compress=false")


def sources() -> list[Path]:
    """Of the module `vitkernels._cuda`."""
    return sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp"), *(CSRC / "shared").glob("*.cpp")])


def _includes() -> list[str]:
    folders = [CSRC, *include_paths(), sysconfig.get_paths()["include"]]
    return [f"-I{folders[0]}", *(part for folder in folders[1:] for part in ("-isystem", str(folder)))]


def run(command: Sequence[object]) -> str:
    """Run a compiler; gives what it printed.

    Raises:
        RuntimeError: it failed; the message holds what it printed.
    """
    words = [str(each) for each in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}")
    return done.stdout


def command(toolkit: Toolkit, source: Path, flags: Sequence[str]) -> list[object]:
    """nvcc's for one file, without what it makes."""
    return [toolkit.nvcc, *FLAGS, *_includes(), *flags, source]


def _texts(source: Path) -> list[Path]:
    """A file and all of csrc that it includes."""
    found = [source]
    for each in found:  # grows meanwhile
        for name in re.findall(r'^#include "(.+)"', each.read_text(), re.MULTILINE):
            path = next(path for path in (each.parent / name, CSRC / name) if path.exists())
            found += [path] if path not in found else []
    return found


def compile_all(toolkit: Toolkit, flags: Sequence[str], folder: Path, jobs: int | None = None) -> list[Path]:
    """Objects of all sources; those that were compiled before of the same text with the same flags stay.

    Args:
        toolkit: that compiles.
        flags: `targets()` or `ptx()`, and definitions.
        folder: where the objects go.
        jobs: compilers at once; by default MAX_JOBS, or one a processor.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def make(source: Path) -> Path:
        text = "".join(each.read_text() for each in _texts(source))
        key = hashlib.sha256(f"{toolkit} {torch.__version__} {FLAGS} {flags} {text}".encode()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            for old in folder.glob(f"{source.stem}-*"):
                old.unlink()
            own = target.with_suffix(f".{os.getpid()}")
            run([*command(toolkit, source, [*HOST, *flags]), "-c", "-o", own])
            own.replace(target)
        return target

    with ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(make, sources()))


def link(toolkit: Toolkit, objects: Sequence[Path], target: Path, libraries: Sequence[str]) -> None:
    """A module of objects.

    Args:
        toolkit: whose nvcc calls the linker.
        objects: from `compile_all`.
        target: the shared library to make.
        libraries: torch's, and what stands for CUDA's runtime where it is not NVIDIA's own (`RUNTIME`).
    """
    folders = [f"-L{Path(torch.__file__).parent / 'lib'}", f"-L{toolkit.library}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    run([toolkit.nvcc, "-shared", "-o", target, *objects, *folders, *libraries])


TORCH = ("-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_cuda")
# the runtime goes into the module: torch's own may have another version, and both share the driver's contexts
RUNTIME = ("-cudart=static",)
