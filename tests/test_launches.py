"""The Triton launchers without a GPU: every case's call binds to its kernel, and its results are laid out as declared.

Kernels are bound as for an H100, by their real argument types, alignments and launch options, but neither compiled nor
run (`make audit` compiles them, `test_triton.py` interprets them): results hold no numbers, and have to have the
shapes, dtypes and strides that the ops' fake implementations promise to torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from case import Case
from cases import CASES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels as vk
from vitkernels import dispatch, kernels
from vitkernels.op import Op

triton = pytest.importorskip("triton")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: interpreted kernels bind nothing", allow_module_level=True)

from ptx.driver import Gpu, Nothing, activate  # noqa: E402  # needs triton


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that were bound; the Triton backend takes tensors of the CPU meanwhile."""
    seen: list[str] = []

    def bind(*, fn: Any, **about: Any) -> bool:
        seen.append(fn.name)
        return True  # as if another had compiled it

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", bind)
    with activate(Gpu(), Nothing):
        yield seen


def _as_declared(op: Op, direction: str, args: tuple[Any, ...], results: Any) -> None:
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, args)
        declared = (op.forward_op if direction == "forward" else op.backward_op)(*fakes)
    for result, fake in zip(pytree.tree_leaves(results), pytree.tree_leaves(declared), strict=True):
        assert (result.shape, result.dtype) == (fake.shape, fake.dtype), f"{op.name} {direction}"
        if result.numel():
            sizes = [index for index, size in enumerate(result.shape) if size > 1]
            assert [result.stride(i) for i in sizes] == [fake.stride(i) for i in sizes], f"{op.name} {direction}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", kernels.PAGES)
def test_every_case_binds(op: str, dtype: torch.dtype, bound: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = dispatch.OPS[op].implementations
    triton_kernels = there["triton"]

    def checked(direction: str) -> Any:
        def launch(*args: Any) -> Any:
            results = getattr(triton_kernels, direction)(*args)
            _as_declared(dispatch.OPS[op], direction, args, results)
            return results

        return launch

    watched = dispatch.Implementation(checked("forward"), checked("backward"), triton_kernels.why_not)
    monkeypatch.setitem(there, "triton", watched)
    cases = [case for case in CASES if case.op == op and dtype in case.dtypes]
    assert cases
    for case in cases:
        _run(case, dtype)
    assert bound, "no kernel was launched"


def _run(case: Case, dtype: torch.dtype) -> None:
    tensors = case.build(dtype)
    with vk.use("triton"), vk.record() as calls:
        outputs = case.call(tensors)
        gradients = case.build_gradients(outputs)
        leaves = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
        roots = [outputs[name] for name in gradients]
        torch.autograd.grad(roots, leaves, list(gradients.values()), allow_unused=True)
    assert [call.backend for call in calls] == ["triton", "triton"], case
