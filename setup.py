"""Builds the compiled extension; everything else stands in pyproject.toml.

One binary serves torch 2.11 and later: it is built on LibTorch's stable ABI and on Python's limited API.
`VITKERNELS_BUILD_EXT=0` installs the Python package alone (the reference and Triton backends still work);
`VITKERNELS_SANITIZE=address,undefined` builds the extension for `make test-asan`.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest torch that the binary must load in
ROOT = Path(__file__).parent

cxx_flags = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # a * b + c becomes one FMA, which ISO mode switches off
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
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
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx_flags},
            extra_link_args=link_flags,
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.[hi]*")),
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
