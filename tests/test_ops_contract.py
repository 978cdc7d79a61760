"""What every op promises beside its numbers: layouts, no aliasing, arguments untouched, repeatable, traceable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check_case, run
from case import Case, T
from cases import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    ATTENTION,
    ATTENTION_QKV,
    ATTENTION_VARLEN,
    CASES,
    GATES,
    PLAIN,
    ROTARY,
    SMALL,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    attention_rel_pos,
    attention_rel_pos_qkv,
    attention_varlen,
    attention_varlen_qkv,
    glu_mlp,
    linear,
    mlp,
    patch_embed,
    rotary,
)
from cases_rotary import LAYER, RMS, ROTARY_LEARNED, ROTARY_QKV, rotary_qkv
from conftest import skip_without
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.ops._amp import CODES


@dataclass(frozen=True)
class Launch:
    """One call of a launcher: what it was given and what it returned."""

    torch_op: Any
    args: tuple[Any, ...]
    results: tuple[Tensor, ...]


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> Tensor:
    """All the bytes under a tensor, those between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of any backend, checked for arguments that it changed."""
    seen: list[Launch] = []

    def watched(launch: Callable[..., Any], torch_op: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = [_storage(tensor).clone() for tensor in _tensors(args)]
            results = launch(*args)
            for tensor, bytes_before in zip(_tensors(args), before, strict=True):
                assert torch.equal(_storage(tensor), bytes_before), f"{torch_op} changed an argument"
            seen.append(Launch(torch_op, args, results if isinstance(results, tuple) else (results,)))
            return results

        return call

    for op in dispatch.OPS.values():
        for backend, given in op.implementations.items():
            watched_implementation = dispatch.Implementation(
                watched(given.forward, op.forward_op), watched(given.backward, op.backward_op), given.why_not
            )
            monkeypatch.setitem(op.implementations, backend, watched_implementation)
    return seen


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and the strides that mean something."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tuple(tensor.shape), tensor.dtype, strides if tensor.numel() else []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_as_traced_and_alias_nothing(case: Case, backend: str, launches: list[Launch]) -> None:
    run(case, case.build(case.dtypes[0]), forward=backend)
    assert len(launches) == 2
    for launch in launches:
        traced = launch.torch_op(*map(_on_meta, launch.args))
        traced = traced if isinstance(traced, tuple) else (traced,)
        assert [_layout(result) for result in launch.results] == [_layout(fake) for fake in traced], launch.torch_op
        taken = {tensor.untyped_storage().data_ptr() for tensor in _tensors(launch.args)}
        for result in launch.results:
            place = result.untyped_storage().data_ptr()
            assert result.numel() == 0 or place not in taken, f"{launch.torch_op}: a result shares memory"
            taken.add(place)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_unasked_gradients_are_empty(case: Case, backend: str, launches: list[Launch]) -> None:
    """With one gradient asked for, the backward op fills that one and returns no elements for the others."""
    tensors = case.build(torch.float32)
    for wanted in [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]:
        launches.clear()
        run(
            case,
            {
                name: tensor if tensor is None else tensor.detach().requires_grad_(name == wanted)
                for name, tensor in tensors.items()
            },
            forward=backend,
        )
        filled = sum(result.numel() > 0 for result in launches[-1].results)
        of_q = 3 if case.op in ("attention", "attention_rel_pos", "attention_varlen") else 1
        also = {"attn_mask": 1, "rel_h": 2, "rel_w": 2}  # one of a pair brings both
        assert filled == of_q + also.get(wanted, 0), wanted


@pytest.mark.parametrize("case", [each for each in SMALL if each.op in ("linear", "mlp", "glu_mlp")], ids=str)
def test_gradients_of_weights_in_a_dtype_that_is_asked_for(case: Case, backend: str, launches: list[Launch]) -> None:
    """Those that are asked for, of weights and biases: of the same values, and as the op is traced."""
    run(case, case.build(torch.bfloat16), forward=backend)
    op, (*args, needs) = dispatch.OPS[case.op], launches[-1].args
    with vk.use(backend):
        for wanted in (needs, [False, *needs[1:]], [True] + [False] * (len(needs) - 1)):
            narrow, wide = op.backward(*args, wanted), op.backward(*args, wanted, CODES[torch.float32])
            traced = op.backward_op(*map(_on_meta, args), wanted, CODES[torch.float32])
            for index, (mine, theirs, fake) in enumerate(zip(wide, narrow, traced, strict=True)):
                dtype = torch.float32 if index and wanted[index] else torch.bfloat16
                assert mine.dtype == fake.dtype == dtype
                assert torch.equal(mine, theirs.to(dtype))


def test_memory_that_the_extension_allocates_is_poisoned() -> None:
    """In tests it takes its results from aten's empty_strided, and what that hands out is NaN."""
    skip_without("ext")
    assert torch.empty_strided((1000,), (1,)).isnan().all()
    assert torch.empty_strided((1000,), (1,), dtype=torch.bfloat16).isnan().all()
    x, weight = torch.randn(300, 64), torch.ones(64)

    def allocating() -> int:
        with vk.use("ext"), torch.profiler.profile() as profile:
            vk.ops.add_layer_norm(x, x, weight)
        return sum(event.name == "aten::empty_strided" for event in profile.events())

    assert allocating() == 4
    configure = torch.ops.vitkernels_ext.configure
    configure("dispatched_memory", 0)
    try:
        assert allocating() == 0, "and else goes past the dispatcher"
    finally:
        configure("dispatched_memory", 1)


def _flags_at(address: int) -> str:
    """What Linux says of the memory at an address (VmFlags of /proc/self/smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError(f"no memory at {address:#x}")


def test_large_results_ask_for_large_pages(force_library) -> None:
    skip_without("ext")
    force_library("torch")  # oneDNN allocates its results itself
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no transparent huge pages")
    configure = torch.ops.vitkernels_ext.configure
    configure("dispatched_memory", 0)
    try:
        weight = torch.ones(1024, 4)
        small, large = (torch.ops.vitkernels_ext.linear(torch.ones(rows, 4), weight, None) for rows in (8, 12288))
    finally:
        configure("dispatched_memory", 1)
    assert "hg" in _flags_at(large.data_ptr() + large.numel() * 2).split()
    assert torch.equal(large[:8], small)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in PLAIN for dtype in (torch.float32, torch.bfloat16) if dtype in case.dtypes],
    ids=str,
)
def test_same_bits_every_time(case: Case, dtype: torch.dtype, backend: str) -> None:
    runs = [run(case, case.build(dtype), forward=backend) for _ in range(3)]
    for name, value in runs[0].items():
        for again in runs[1:]:
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    "case",
    [*ATTENTION, *ATTENTION_QKV, *ATTENTION_VARLEN, *ADD_LAYER_NORM, *ADD_RMS_NORM, *ROTARY, *ROTARY_QKV],
    ids=str,
)
def test_same_bits_with_any_number_of_threads(case: Case) -> None:
    """Where no vendor's GEMM takes part, how the work is split changes no sum."""
    skip_without("ext")
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(run(case, case.build(case.dtypes[0]), forward="ext"))
    for name, value in runs[0].items():
        for other in runs[1:]:
            assert torch.equal(value, other[name]), name


# -------------------------------------------------------------------------------------- numerical slopes

SLOPES = [
    linear("slopes", (2, 2), 5, 3),
    patch_embed("slopes", 2, (2, 2), channels=2, width=3, prefix=1, pos_embed=5, keep=3, mean=[0.5, 0.1], std=[2, 0.5]),
    attention("slopes", 1, 2, 3, 4, 3, mask=T((2, 1, 4))),
    attention("slopes, causal", 1, 2, 4, 4, 3, options={"is_causal": True}),
    attention_qkv("slopes", 1, 2, 3, 3, mask=T((3, 3))),
    attention_rel_pos("slopes", 1, 2, (2, 3), 3, queries=2),
    attention_rel_pos_qkv("slopes", 1, 2, (2, 2), 3),
    attention_varlen("slopes", (2, 0, 3), 2, 3, keys=(3, 1, 2), keys_heads=1),
    attention_varlen_qkv("slopes", (2, 3), 2, 3),
    add_layer_norm("slopes", (2, 2, 5)),
    add_layer_norm("slopes, no branch", (2, 2, 5), branch=False, vectors=("bias",)),
    add_layer_norm("slopes, adaptive", (2, 2, 5), vectors=("bias", "scale"), by_sample=("weight", "scale")),
    add_rms_norm("slopes", (2, 2, 5)),
    add_rms_norm("slopes, adaptive", (2, 2, 5), vectors=("bias", "scale"), by_sample=("weight", "scale")),
    *(glu_mlp(f"slopes, {name}", (2, 2), (3, 5, 2), options={"activation": name}) for name in GATES),
    *(mlp(f"slopes, {name}", (2, 2), (3, 5, 2), options={"activation": name}) for name in ("gelu", "gelu_tanh")),
    *(mlp(f"slopes, {name}", (2, 2), (3, 5, 2), options={"activation": name}) for name in ("quick_gelu", "silu")),
    mlp("slopes, relu", (2, 2), (3, 5, 2), options={"activation": "relu"}),
    rotary("slopes", (1, 2, 3, 4), prefix=1, positions=None),
    rotary("slopes, halves", (1, 2, 3, 4), prefix=1, half=True, lead=(2,), positions=None),
    rotary_qkv("slopes, LayerNorm", (1, 3, 3, 2, 4), prefix=1, positions=None, **LAYER),
    rotary_qkv("slopes, RMSNorm, pairs", (3, 2, 2, 4), half=False, positions=None, **RMS),
]


@pytest.mark.parametrize("case", SLOPES, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    tensors = case.build(torch.float64)
    leaves = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(tensors | dict(zip(leaves, values, strict=True))).values())

    with vk.use(backend), vk.record() as calls:
        assert torch.autograd.gradcheck(function, [tensors[name] for name in leaves], check_batched_grad=True)
    assert {(call.direction, call.backend) for call in calls} == {("forward", backend), ("backward", backend)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ROTARY_LEARNED, ids=str)
def test_gradients_of_learned_positions(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gives them, behind any backend's forward; the others say why they do not."""
    skip_without("ext")
    monkeypatch.setattr(dispatch, "_warned", set())
    check_case(case, dtype, "ext", "reference")
    tensors = case.build(dtype)
    out = case.call(tensors)["out"]
    with vk.use("ext"), pytest.raises(vk.BackendError, match="ext: the kernels have no gradients of sin and cos"):
        out.sum().backward(retain_graph=True)
    with pytest.warns(UserWarning, match="rotary runs on the plain-torch reference"):
        out.sum().backward()
    with vk.use("reference"):
        torch.library.opcheck(
            dispatch.OPS["rotary"].forward_op, (*map(_four_axes, tensors.values()), *case.options.values())
        )


def _four_axes(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


# -------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case: Case, backend: str, launches: list[Launch]) -> None:
    tensors = case.build(torch.float32)
    run(case, tensors, forward=backend)
    forward, backward = list(launches)
    with vk.use(backend):
        torch.library.opcheck(forward.torch_op, _leaves(forward.args, requires_grad=True))
        torch.library.opcheck(backward.torch_op, _leaves(backward.args, requires_grad=False))


def _leaves(args: tuple[Any, ...], requires_grad: bool) -> tuple[Any, ...]:
    return tuple(
        arg.detach().requires_grad_(requires_grad and arg.requires_grad)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    )


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_meta_tensors(case: Case) -> None:
    """Shapes, layouts and dtypes without data, gradients included, and no kernel runs."""
    real = case.call(case.build(case.dtypes[0]))
    tensors = case.build(case.dtypes[0], device="meta")
    with vk.record() as calls:
        outputs = case.call(tensors)
        torch.autograd.backward(
            [outputs[name] for name in case.used or case.results],
            list(case.build_gradients(outputs).values()),
        )
    assert not calls
    assert {name: _layout(output) for name, output in outputs.items()} == {
        name: _layout(output) for name, output in real.items()
    }
    for name, tensor in tensors.items():
        if tensor is not None and tensor.grad is not None:
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fake_tensors(case: Case) -> None:
    tensors = case.build(torch.float32)
    real = case.call(tensors)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(tensor.detach()) for name, tensor in tensors.items() if tensor is not None}
    with mode, vk.record() as calls:
        outputs = case.call(fakes)
    assert not calls
    for name, output in outputs.items():
        assert output.device == real[name].device
        assert _layout(output) == _layout(real[name])


def test_no_forward_takes_a_dtype() -> None:
    """AOTInductor of torch 2.11 hands ScalarTypes on by another table: norms in float32 came out in float64."""
    schemas = {name: op.schemas[name] for name, op in dispatch.OPS.items()}
    assert "Tensor x" in schemas["add_layer_norm"]
    assert not [name for name, schema in schemas.items() if "ScalarType" in schema]
