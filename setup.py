"""Builds the compiled extension; everything else stands in pyproject.toml.

One binary serves torch 2.11 and later: it is built on LibTorch's stable ABI and on Python's limited API.
`VITKERNELS_BUILD_EXT=0` installs the Python package alone (the reference and Triton backends still work);
`VITKERNELS_SANITIZE=address,undefined` builds the extension for `make test-asan`.

Where torch has CUDA and a CUDA toolkit is found (csrc/nvcc.py), `vitkernels._cuda` is built too, for
TORCH_CUDA_ARCH_LIST or the GPUs that are there; `VITKERNELS_BUILD_CUDA=0` leaves it out.

torch is no requirement of the build: pip would fetch one for it, with gigabytes of CUDA packages, beside the one that
is there. That one is found from within pip's own environment too, so `pip install .` needs no flags.
"""

import contextlib
import importlib
import os
import shutil
import site
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Command, Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

WITHOUT = "VITKERNELS_BUILD_EXT=0 installs without the extension (GPUs by Triton; CPUs then run on plain torch, slowly)"
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}  # commands, pip's among them


def stop(sentence: str) -> NoReturn:
    """End the build; a traceback would hide the sentence."""
    raise SystemExit(f"vitkernels: {sentence}")


def require_compiler() -> None:
    """Before anything is copied: what would stop at the first source file has told of hundreds by then."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"there is no C++ compiler {compiler!r}; needs gcc 9 or later (CXX names another one), or: {WITHOUT}")


def import_torch() -> None:
    """torch, from the environment that is installed into where the build runs in one of its own."""
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        return
    sys.path += [*site.getsitepackages(), site.getusersitepackages()]
    importlib.invalidate_caches()
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        stop(
            f"{error}; the extension is built with the torch that it will run with. Needs torch 2.11 or later "
            f"installed first, the CPU build or one for CUDA, then: pip install . (or: {WITHOUT})"
        )


def files(*patterns: str) -> list[str]:
    """Of csrc, relative to this file."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


cxx_flags = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # a * b + c becomes one FMA, which ISO mode switches off
]

link_flags = ["-s"]
sanitizers = os.environ.get("VITKERNELS_SANITIZE")
if sanitizers:
    link_flags = [f"-fsanitize={sanitizers}"]
    cxx_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]

extensions: list[Extension] = []
commands: dict[str, type[Command]] = {}
if os.environ.get("VITKERNELS_BUILD_EXT", "1") != "0":
    if COMPILING & set(sys.argv):
        require_compiler()
    import_torch()
    import nvcc
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extensions.append(
        CppExtension(
            "vitkernels._C",
            files("cpu/*.cpp", "shared/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": [*cxx_flags, f"-DTORCH_TARGET_VERSION={nvcc.STABLE_ABI}"]},
            extra_link_args=link_flags,
            depends=files("cpu/*.[hi]*", "shared/*.h"),
            py_limited_api=True,
        )
    )

    left_out = os.environ.get("VITKERNELS_BUILD_CUDA", "1") == "0"
    reason = "VITKERNELS_BUILD_CUDA is 0" if left_out else nvcc.why_not()
    if reason is None:
        print(f"vitkernels: CUDA C++ is built with {nvcc.find()} for {nvcc.names(nvcc.targets())}", file=sys.stderr)
        # no sources: at the sight of a .cu torch asks for the toolkit in its own way
        used = files("cuda/*", "shared/*")
        extensions.append(Extension("vitkernels._cuda", [], depends=used, py_limited_api=True))
    else:
        print(f"vitkernels: CUDA C++ is not built: {reason}", file=sys.stderr)

    class BuildExtensions(BuildExtension):
        """Compiles the CUDA half by csrc/nvcc.py, as the audit and the tests do."""

        def build_extension(self, ext: Extension) -> None:
            if ext.name != "vitkernels._cuda":
                super().build_extension(ext)
                return
            toolkit = nvcc.find()
            objects = nvcc.compile_all(toolkit, nvcc.targets(), Path(self.build_temp) / "cuda")
            nvcc.link(toolkit, objects, Path(self.get_ext_fullpath(ext.name)), (*nvcc.TORCH, *nvcc.RUNTIME))

    commands = {"build_ext": BuildExtensions.with_options(use_ninja=True)}

setup(ext_modules=extensions, cmdclass=commands, options={"bdist_wheel": {"py_limited_api": "cp310"}})
