"""Loads the compiled extension, and remembers why it could not.

The extension implements the schemas that `dispatch` and the op pages define, under the namespace `vitkernels_ext`: C++
in `vitkernels._C` under the CPU key, CUDA C++ in `vitkernels._cuda` (`ext_cuda`) under the CUDA key. Each half is
loaded at the first call that asks for it, never at import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vitkernels import dispatch, ext_cuda, products, program
from vitkernels.ops._amp import CODES
from vitkernels.ops.rotary import why_not_fused

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
_NAMESPACE = "vitkernels_ext"
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_CUDA = ext_cuda.Cuda()
_gpu: ext_cuda.Gpu = _CUDA
_library = torch.library.Library(_NAMESPACE, "DEF")


@functools.cache
def why_not() -> str | None:
    """Load the extension once; a sentence that says why it is not there, or None."""
    try:
        importlib.import_module("vitkernels._C")
    except ImportError as error:
        return f"the compiled extension did not load ({error}); build it with: pip install -e ."
    configure = torch.ops.vitkernels_ext.configure
    configure("products", products.encode(products.choose(configure)))
    return None


def describe() -> str:
    """How the loaded extension works here: its instruction set, which library multiplies what, and its CUDA half."""
    chosen = products.decode(torch.ops.vitkernels_ext.configure("products", -1))
    return f"instruction set {isa()}; {products.describe(chosen)}; {_CUDA.describe()}"


def isa(name: str | None = None) -> str:
    """The instruction set that the vector kernels run on; with a name, switch to it (for tests and benchmarks).

    Raises:
        ValueError: a name that is not in `ISAS`, or one that this processor does not have.
    """
    if name is not None and name not in ISAS:
        raise ValueError(f"isa: unknown instruction set {name!r}; needs one of {', '.join(map(repr, ISAS))}")
    reason = why_not()
    if reason is not None:
        raise dispatch.BackendError(f"isa: {reason}")
    wanted = -1 if name is None else ISAS.index(name)
    now = torch.ops.vitkernels_ext.configure("isa", wanted)
    if name is not None and ISAS[now] != name:
        raise ValueError(f"isa: this processor does not have {name!r}; it has up to {ISAS[now]!r}")
    return ISAS[now]


def _call_why_not(op: str, call: Any) -> str | None:
    for arg in call:
        if not isinstance(arg, torch.Tensor):
            continue
        kind = arg.device.type
        if kind == _gpu.kind:
            return ext_cuda.why_not_call(_gpu, op, call)
        if kind != "cpu":
            return f"the extension has kernels for the CPU and for CUDA, and a tensor is on {arg.device}"
        if arg.dtype not in _DTYPES and arg.is_floating_point():
            return f"the extension has no kernel for {arg.dtype}"
    return None


_DECLINES = {"rotary": why_not_fused}  # what an op's kernels leave to the reference


def _why_not(op: str) -> Callable[[str, Any], str | None]:
    declines = _DECLINES.get(op)
    if declines is None:
        return lambda direction, call: _call_why_not(op, call)
    return lambda direction, call: _call_why_not(op, call) or declines(direction, call)


def _launcher(name: str) -> Callable[..., Any]:
    return _gpu.launcher(name) or _torch_op(name)


def _torch_op(name: str) -> Callable[..., Any]:
    """What calling a torch op comes to, with one Python frame less."""
    return getattr(getattr(torch.ops, _NAMESPACE), name).default._op


def _register_launchers() -> None:
    for op in dispatch.OPS.values():
        # products round float32 weights to the rows' dtype as they read them
        forward, backward = _launcher(op.name), _launcher(f"{op.name}_backward")
        op.register("ext", forward, backward, _why_not(op.name), rounds_weights=op.one_dtype, widens=True)


def register() -> None:
    """Make the compiled backend known, and give it to every op; the schemas are the op pages' own."""
    dispatch.add_backend(dispatch.Backend("ext", ("cuda", "cpu"), lambda: why_not(), lambda: describe()))
    _library.define("configure(str name, int value) -> int")
    _library.define("program(int[] code, float[] numbers, str[] names) -> Tensor")
    _library.define("run(Tensor program, Tensor[] inputs) -> Tensor[]")
    for op in dispatch.OPS.values():
        for name, schema in op.schemas.items():
            _library.define(f"{name}{schema}")
    names = {_torch_op(name): name for op in dispatch.OPS.values() for name in op.schemas if op.name != "patch_embed"}
    program.extension = program.Extension(names, CODES, _torch_op("program"), _torch_op("run"))
    _register_launchers()


@contextlib.contextmanager
def stand_in(gpu: ext_cuda.Gpu) -> Iterator[None]:
    """Let the CUDA half take `gpu` for the real ones inside the block, in every thread: for tests."""
    global _gpu
    before, _gpu = _gpu, gpu
    _register_launchers()
    try:
        yield
    finally:
        _gpu = before
        _register_launchers()
