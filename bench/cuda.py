"""Compile csrc/cuda without a GPU and read what the compiler made of each kernel."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ptx import cuda as machine  # the tests' own: launches without a GPU
from ptx.cuda import nvcc

import vitkernels as vk
from bench.sass import Reading
from vitkernels.ext_cuda import WIDEST_HEAD, WIDEST_TURING_HEAD

ARCHITECTURES = nvcc.ARCHITECTURES
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOAD = re.compile(r"ld\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[bufs](\d+)\s")


def why_not() -> str | None:
    """A sentence that says why nothing is compiled here, or None."""
    return None if nvcc.find() else "no CUDA toolkit: pip install -r requirements-cuda.txt, or set CUDA_HOME"


def read_all(
    architectures: Sequence[int], only: str = "", jobs: int = 2
) -> Iterator[tuple[str, int, Reading | None, str]]:
    """Each kernel's name, architecture and reading; a file that does not compile, with why not.

    Args:
        architectures: 80 for sm_80.
        only: what a name, "mlp: activate_forward<true>", has to contain.
        jobs: compilers at once.
    """
    sources = [each for each in nvcc.sources() if each.suffix == ".cu"]
    given = {each: given_by_launches(each >= 80) for each in architectures}
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda source: _read(source, given), sources):
            yield from (each for each in found if only in each[0])


def read_of_tests(only: str = "", jobs: int = 2) -> Iterator[tuple[str, int, Reading | None, str]]:
    """The same for sm_80 alone, of the PTX that the tests execute: one pass of the compiler for both."""
    given = {machine.ARCHITECTURE: given_by_launches(True)}
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda each: _assemble(*each, given), machine.texts().items()):
            yield from (each for each in found if only in each[0])


@functools.cache
def given_by_launches(ampere: bool) -> dict[str, int]:
    """The most bytes of shared memory that launches give a kernel beside its own, by its mangled name.

    Attention's alone do: the launchers say it, asked for a mask with a row for each query, and for positions, in every
    width of heads.
    """
    most: dict[str, int] = {}
    with machine.activate((8, 0) if ampere else (7, 5), take=lambda call, record: None) as record, vk.use("ext"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if ampere else (torch.float32,):
            for width in (*range(16, 113, 16), WIDEST_HEAD) if ampere else (WIDEST_TURING_HEAD,):
                q, mask = torch.zeros(1, 1, 2, width, dtype=dtype), torch.zeros(1, 1, 2, 2, dtype=dtype)
                vk.ops.attention(q.requires_grad_(), q, q, attn_mask=mask).sum().backward()
                vk.ops.attention_rel_pos(q, q, q, mask, mask[..., :1]).sum().backward()
    for name, (_, _, shared) in zip(record.names, record.shapes, strict=True):
        most[name] = max(shared, most.get(name, 0))
    return most


def _read(source: Path, given: Mapping[int, Mapping[str, int]]) -> list[tuple[str, int, Reading | None, str]]:
    """Of one file; `given` is what launches give kernels, by architecture and name."""
    architectures = list(given)
    toolkit = nvcc.find()
    assert toolkit is not None, why_not()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    flags = [*nvcc.WARNINGS, *targets, "-Xptxas=-v", "-Xptxas=-Werror"]
    with tempfile.TemporaryDirectory() as folder:
        keep = ["--keep", f"--keep-dir={folder}", "-fatbin", "-o", f"{folder}/all.fatbin"]
        try:
            printed = nvcc.run([*nvcc.command(toolkit, source, flags), *keep])
        except RuntimeError as error:
            return _failed(source, given, error)
        texts = [each.read_text() for each in Path(folder).glob("*.ptx")]
    return _readings(source, printed, texts, given)


def _assemble(
    source: Path, text: str, given: Mapping[int, Mapping[str, int]]
) -> list[tuple[str, int, Reading | None, str]]:
    """Of one file that is PTX already."""
    toolkit = nvcc.find()
    assert toolkit is not None, why_not()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{source.stem}.ptx"
        path.write_text(text)
        target = f"-arch=sm_{architecture_of(text)}"
        try:
            printed = nvcc.run([toolkit.nvcc.with_name("ptxas"), "-v", "-Werror", target, "-o", f"{path}.cubin", path])
        except RuntimeError as error:
            return _failed(source, given, error)
    return _readings(source, printed, [text], given)


def _failed(
    source: Path, given: Mapping[int, Mapping[str, int]], error: RuntimeError
) -> list[tuple[str, int, Reading | None, str]]:
    reason = next((line for line in str(error).splitlines() if "error" in line), str(error).splitlines()[-1])
    return [(f"{source.stem} (CUDA C++)", each, None, reason) for each in given]


def _readings(
    source: Path, printed: str, texts: Sequence[str], given: Mapping[int, Mapping[str, int]]
) -> list[tuple[str, int, Reading | None, str]]:
    """What ptxas printed of a file, beside the PTX of its architectures."""
    bodies = {architecture_of(text): bodies_of(text) for text in texts}
    found: list[tuple[str, int, Reading | None, str]] = []
    for name, architecture, text in _entries(printed):
        threads, body = bodies[architecture][name]
        stack = [int(number) for each in _STACK.findall(text) for number in each[:1]]
        shared = _SHARED.search(text)
        registers = _USED.search(text)
        assert registers is not None, text
        matrix = len(re.findall(r"\bmma\.sync", body))
        reading = Reading(
            threads=threads,
            registers=int(registers[1]),
            spilled=sum(stack),
            shared=(int(shared[1]) if shared else 0) + given[architecture].get(name, 0),
            matrix={"mma.sync": matrix} if matrix else {},
            widest=max((int(count or 1) * int(bits) for count, bits in _LOAD.findall(body)), default=0),
            scratch=0,
            waits=None,
        )
        found.append((f"{source.stem}: {demangled(name)} (CUDA C++)", architecture, reading, ""))
    return found


def _entries(printed: str) -> Iterator[tuple[str, int, str]]:
    """What ptxas printed of each kernel: mangled name, architecture, text."""
    starts = list(_ENTRY.finditer(printed))
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        yield start[1], int(start[2]), printed[start.end() : following.start() if following else None]


def architecture_of(ptx: str) -> int:
    """80 where the text is for sm_80."""
    found = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    assert found is not None, ptx[:200]
    return int(found[1])


def bodies_of(ptx: str) -> dict[str, tuple[int, str]]:
    """The most threads of a block, and the text, of each kernel."""
    found = {}
    for part in ptx.split(".entry ")[1:]:
        threads = re.search(r"\.maxntid ([\d, ]+)", part)
        if threads is None:
            raise ValueError(f"{part.split('(')[0]}: has no __launch_bounds__")
        found[part.split("(")[0].strip()] = math.prod(map(int, threads[1].split(","))), part
    return found


def demangled(name: str) -> str:
    """`vk::activate_forward<true>(...)` without namespace and arguments."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^(void )?vk::", "", text).split("(vk::")[0].split("(")[0]
