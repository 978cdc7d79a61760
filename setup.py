"""Builds the compiled extension; everything else stands in pyproject.toml.

One binary serves torch 2.11 and later: it is built on LibTorch's stable ABI and on Python's limited API.
`VITKERNELS_BUILD_EXT=0` installs the Python package alone (the reference and Triton backends still work);
`VITKERNELS_SANITIZE=address,undefined` builds the extension for `make test-asan`.

Where torch has CUDA and a CUDA toolkit is found (csrc/nvcc.py), `vitkernels._cuda` is built too, for
TORCH_CUDA_ARCH_LIST or the GPUs that are there; `VITKERNELS_BUILD_CUDA=0` leaves it out.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

import nvcc  # noqa: E402


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
    f"-DTORCH_TARGET_VERSION={nvcc.STABLE_ABI}",
]

link_flags = ["-s"]
sanitizers = os.environ.get("VITKERNELS_SANITIZE")
if sanitizers:
    link_flags = [f"-fsanitize={sanitizers}"]
    cxx_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]

extensions = []
if os.environ.get("VITKERNELS_BUILD_EXT", "1") != "0":
    extensions.append(
        CppExtension(
            "vitkernels._C",
            files("cpu/*.cpp", "shared/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx_flags},
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


class Build(BuildExtension):
    """Compiles the CUDA half by csrc/nvcc.py, as the audit and the tests do."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "vitkernels._cuda":
            super().build_extension(ext)
            return
        toolkit = nvcc.find()
        objects = nvcc.compile_all(toolkit, nvcc.targets(), Path(self.build_temp) / "cuda")
        nvcc.link(toolkit, objects, Path(self.get_ext_fullpath(ext.name)), (*nvcc.TORCH, *nvcc.RUNTIME))


setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
