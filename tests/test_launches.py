"""The Triton launchers without a GPU: each case's call binds to its kernel, and its results are laid out as declared.

Kernels are bound as for an H100, by their real argument types, alignments and launch options, but neither compiled nor
run (`make audit` compiles them, `test_triton.py` interprets them): results hold no numbers, and have to have the
shapes, dtypes and strides that the ops' fake implementations promise to torch.compile.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from case import Case
from cases import FEWER, IMAGENET, UINT8, attention_qkv, mlp, patch_embed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels as vk
from vitkernels import dispatch, kernels
from vitkernels.op import Op

triton = pytest.importorskip("triton")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: interpreted kernels bind nothing", allow_module_level=True)

from ptx import sample  # noqa: E402
from ptx.driver import Gpu, Nothing, activate  # noqa: E402  # needs triton

from vitkernels.kernels import fences, patch_embed_kernels  # noqa: E402
from vitkernels.kernels.fences import FENCED  # noqa: E402


def _name(kernel: Any) -> str:
    """Such as "attention_long.attention_long_dq"."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The kernels that were bound, "page.kernel", and their launch options; CPU tensors go to Triton meanwhile."""
    seen: list[dict[str, Any]] = []

    def bind(*, fn: Any, compile: dict[str, Any], **about: Any) -> bool:
        seen.append({"kernel": f"{fn.module.rpartition('.')[2]}.{fn.name.rpartition('.')[2]}"} | compile)
        return True  # as if another had compiled it

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", bind)
    pages = [page for name, page in sys.modules.items() if name.startswith(f"{kernels.__name__}.")]
    for kernel in {each for page in pages for each in vars(page).values() if isinstance(each, triton.JITFunction)}:
        # what tests before this one have bound would not be bound again
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
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
def test_every_case_binds(
    op: str, dtype: torch.dtype, bound: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    cases = [case for case in FEWER if case.op == op and dtype in case.dtypes]
    assert cases
    for case in cases:
        _run(case, dtype)
    assert bound, "no kernel was launched"


@pytest.mark.parametrize("op", kernels.PAGES)
def test_the_sample_of_the_machine_launches_every_kernel(op: str, bound: list[dict[str, Any]]) -> None:
    """Which the audit compiles for sm_90, by the trials of `ptx.sample`."""
    page = importlib.import_module(f"{kernels.__name__}.{kernels.PAGES[op][0]}")
    left = {_name(variant.kernel) for variant in page.variants((9, 0))}
    assert left
    for trial in sample.triton():
        if left and trial.case.op == op:
            with activate(Gpu(trial.capability, trial.processors), Nothing):
                _run(trial.case, trial.dtype)
            left -= {each["kernel"] for each in bound}
    assert not left


def _run(case: Case, dtype: torch.dtype) -> None:
    tensors = case.build(dtype)
    with vk.use("triton"), vk.record() as calls:
        outputs = case.call(tensors)
        gradients = case.build_gradients(outputs)
        leaves = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
        roots = [outputs[name] for name in gradients]
        torch.autograd.grad(roots, leaves, list(gradients.values()), allow_unused=True)
    assert [call.backend for call in calls] == ["triton", "triton"], case


SHORT = [f"attention_short.attention_short_{name}" for name in ("forward", "backward")]
LONG = [f"attention_long.attention_long_{name}" for name in ("forward", "delta", "dq", "dkdv")]


@pytest.mark.parametrize(
    ("batch", "processors", "kernels"), [(2, 3, SHORT), (1, 3, LONG), (2, 4, LONG), (88, 132, SHORT), (87, 132, LONG)]
)
def test_few_heads_go_to_the_long_kernels(
    batch: int, processors: int, kernels: list[str], bound: list[dict[str, Any]]
) -> None:
    """Three heads a sample: two programs a multiprocessor of the short kernels, or none of them."""
    with activate(Gpu(processors_=processors), Nothing):
        _run(attention_qkv("few heads", batch, 3, 17, 16), torch.bfloat16)
    assert [each["kernel"] for each in bound] == kernels


@pytest.mark.parametrize(
    ("options", "stages", "columns"),
    [
        ({}, 3, 256),
        ({"table": torch.float32}, 3, 128),
        ({"image": {"dtype": torch.float32}}, 1, 128),
        ({"image": {"dtype": torch.float32}, "table": torch.float32}, 1, 128),
        ({"image": UINT8}, 1, 128),
        (IMAGENET, 1, 128),
    ],
    ids=["bf16", "float32 table", "float32 image", "autocast", "uint8", "mean and std"],
)
def test_converted_pixels_are_multiplied_in_one_stage(
    options: dict[str, Any], stages: int, columns: int, bound: list[dict[str, Any]]
) -> None:
    """And a product's other operand comes in the dtype of the products, whatever dtype the gradient arrives in."""
    _run(patch_embed("launch", 16, (2, 2), width=256, prefix=1, pos_embed=5, **options), torch.bfloat16)
    kernels = {each["kernel"].partition(".")[2]: each for each in bound}
    embed, product = kernels["embed"], kernels["weight_gradient"]
    assert embed["num_stages"] == (stages if FENCED else 1)
    assert embed["constants"][(patch_embed_kernels.embed.arg_names.index("BLOCK_N"),)] == columns
    assert product["signature"]["p_dout"] == "*bf16"


@pytest.mark.parametrize(
    ("processors", "inner", "stages"),
    [
        (1, 96, [3, 3]),  # tiles come by the copy engine
        (1, 95, [1, 1]),  # rows that it cannot address
        (132, 96, [1, 1]),  # small tiles, which come by pointers
    ],
)
def test_mlp_by_pointers_takes_one_stage_where_triton_leaves_out_fences(
    processors: int, inner: int, stages: list[int], bound: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fences, "FENCED", False)
    with activate(Gpu(processors_=processors), Nothing):
        _run(mlp("launch", (2, 100), (inner, 288, inner)), torch.bfloat16)
    products = [each for each in bound if each["kernel"].startswith("mlp_kernels")]
    assert [each["num_stages"] for each in products] == stages
    by_tma = [each["signature"]["p_activated"].startswith("tensordesc") for each in products]
    assert by_tma == [count > 1 for count in stages], "results leave by the copy engine where operands come by it"
