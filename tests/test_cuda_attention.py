"""The attention ops in CUDA C++, through the extension's own launchers, executed by the machine in `ptx`."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check_case
from case import Case, T
from cases_attention import (
    BF16,
    F16,
    F32,
    attention,
    attention_qkv,
    attention_rel_pos,
    attention_varlen_qkv,
)
from draws import keep_some
from ptx import cuda, sample
from ptx.findings import FLIGHT, RACE
from ptx.launch import Packed
from ptx.trials import Trial

import vitkernels as vk
from vitkernels import ext_cuda

if cuda.why_not():
    pytest.skip(str(cuda.why_not()), allow_module_level=True)

import nvcc  # ptx.cuda says where it lies

MOST_SHARED = 99 << 10  # bytes that a block may have on every capability from 8.0 on
TURING_SHARED = 64 << 10  # and on 7.5
FORWARD, DQ, DKDV = KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")
BIAS = attention("bias", 1, 2, 70, mask=T((1, 1, 70, 70)))
PADDED = attention("padding", 2, 2, 40, 70, mask=T((2, 1, 1, 70), convert=keep_some))
CAUSAL = attention_qkv("causal", 1, 2, 70, causal=True)
PACKED = attention_varlen_qkv("several", (33, 1, 70))
IMAGE = attention_rel_pos("image", 1, 2, (5, 14))


TRIALS = [each for each in sample.cuda() if each.case.op in ext_cuda.ATTENTION]


def launched(case: Case, dtype: torch.dtype, capability: tuple[int, int] = (8, 0), **backends: str) -> cuda.Launched:
    """Hold a case to the tolerance rule on the machine; gives what was launched, in which nothing was found."""
    with cuda.activate(capability) as record:
        check_case(case, dtype, **{"forward": "ext", **backends})
    assert not record.findings, "\n".join(map(str, record.findings))
    return record


def kernels(record: cuda.Launched) -> list[str]:
    return [next(kernel for kernel in KERNELS if kernel in name) for name in record.names]


def expected(case: Case) -> list[str]:
    """The kernels that have anything to write."""
    if case.op == "attention":
        (batch, heads, queries, _), (_, _, keys, _) = (case.tensors[name].shape for name in "qk")  # type: ignore[union-attr]
    elif case.op == "attention_varlen":
        lengths = next(spec for name, spec in case.tensors.items() if name.startswith("cu_seqlens"))
        batch, heads = lengths.shape[0] - 1, 1  # type: ignore[union-attr]
        queries, keys = list(case.options.values())[:2] if "q" in case.tensors else [case.options["max_seqlen"]] * 2
    elif case.op == "attention_rel_pos":
        (batch, heads, queries, rows), (*_, columns) = (case.tensors[name].shape for name in ("rel_h", "rel_w"))  # type: ignore[union-attr]
        keys = rows * columns
    else:
        batch, queries, _ = case.tensors["qkv"].shape  # type: ignore[union-attr]
        heads, keys = case.options["num_heads"], queries
    rows = {FORWARD: queries, DQ: queries, DKDV: keys}
    return [kernel for kernel in KERNELS if batch * heads * rows[kernel]]


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_case(trial: Trial) -> None:
    assert kernels(launched(trial.case, trial.dtype)) == expected(trial.case)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(BIAS, BF16), (PADDED, F32), (CAUSAL, F32), (PACKED, BF16), (IMAGE, BF16), (IMAGE, F32)],
    ids=str,
)
def test_backward_follows_any_forward(case: Case, dtype: torch.dtype) -> None:
    assert kernels(launched(case, dtype, forward="reference", backward="ext")) == [DQ, DKDV]
    assert kernels(launched(case, dtype, forward="ext", backward="reference")) == [FORWARD]


# -------------------------------------------------------------------------------------------------- which kernels

WIDTHS = {1: 32, 33: 64, 72: 80, 88: 96, 104: 112, 120: 128}  # of heads, and of the kernels that serve them


def sizes(case: Case, dtype: torch.dtype) -> cuda.Launched:
    """What a case launches, without running it: sizes say enough."""
    with cuda.activate(take=lambda call, record: None) as record, vk.use("ext"):
        case.call(case.build(dtype))["out"].sum().backward()
    assert kernels(record) == list(KERNELS)
    return record


@pytest.mark.parametrize("width", WIDTHS)
def test_heads_are_not_padded_to_powers_of_two(width: int) -> None:
    """And with a mask of a row a query, which takes the most shared memory, they fit every GPU from 8.0 on."""
    for each in (width, WIDTHS[width]):
        case = attention("width", 1, 1, 5, width=each, mask=T((1, 1, 5, 5)))
        image = attention_rel_pos("width", 1, 1, (1, 5), each)
        for record in (sizes(case, BF16), sizes(image, BF16)):
            assert all(f"TensorCoresI13__nv_bfloat16Li{WIDTHS[width]}E" in name for name in record.names)
            assert max(shared for _, _, shared in record.shapes) <= MOST_SHARED
        for record in (sizes(case, F32), sizes(image, F32)):
            assert all("OrdinaryCores" in name for name in record.names)
            assert max(shared for _, _, shared in record.shapes) <= (TURING_SHARED if each <= 104 else MOST_SHARED)
    launched(case, BF16)


def test_grids_are_tiles_by_heads() -> None:
    case = attention("grid", 2, 3, 129, 65, 64)
    threads = (128, 1, 1)
    found = [(grid, block) for grid, block, _ in sizes(case, F16).shapes]
    assert found == [((2 * 3 * 2, 1, 1), threads)] * 2 + [((2 * 3 * 1, 1, 1), threads)]
    found = [(grid, block) for grid, block, _ in sizes(case, F32).shapes]
    assert found == [((2 * 3 * 5, 1, 1), threads)] * 2 + [((2 * 3 * 3, 1, 1), threads)]


def test_tiles_of_keys_are_rows_of_an_image_or_parts_of_one() -> None:
    """Where 128 keys stay: up to 8 rows of the image, or 65 columns of a row of 130."""
    for image, count in (((14, 14), 2), ((20, 7), 3), ((9, 70), 9), ((3, 130), 6)):
        record = sizes(attention_rel_pos("grid", 1, 2, image, 64, queries=5), BF16)
        assert [grid for grid, _, _ in record.shapes] == [(2, 1, 1), (2, 1, 1), (2 * count, 1, 1)]


def test_sequences_end_to_end_are_one_launch() -> None:
    """As many tiles for each as the longest has."""
    record = sizes(attention_varlen_qkv("grid", (65, 1, 130), 3, 64), F16)
    assert [grid for grid, _, _ in record.shapes] == [(3 * 3 * 2, 1, 1)] * 3


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "reason"),
    [
        (136, F32, (8, 0), "heads up to 128 wide, and these are 136"),
        (136, BF16, (9, 0), "heads up to 128 wide, and these are 136"),
        (16, BF16, (7, 5), "attention in torch.bfloat16 needs compute capability 8.0 or later"),
        (16, F16, (7, 5), "attention in torch.float16 needs compute capability 8.0 or later"),
        (112, F32, (7, 5), "attention of heads over 104 wide needs compute capability 8.0 or later"),
    ],
)
def test_declined(width: int, dtype: torch.dtype, capability: tuple[int, int], reason: str) -> None:
    q = torch.zeros(1, 2, 3, width, dtype=dtype, requires_grad=True)
    qkv = torch.zeros(1, 3, 6 * width, dtype=dtype, requires_grad=True)
    packed, ends = torch.zeros(3, 3, 2, width, dtype=dtype, requires_grad=True), torch.tensor([0, 3]).int()
    calls: list[Callable[[], Any]] = [
        lambda: vk.ops.attention(q, q, q),
        lambda: vk.ops.attention_qkv(qkv, 2),
        lambda: vk.ops.attention_rel_pos(q, q, q, q[..., :3], q[..., :1]),
        lambda: vk.ops.attention_rel_pos(qkv.view(1, 3, 3, 2, width), q[..., :3], q[..., :1]),
        lambda: vk.ops.attention_varlen(packed, ends, 3),
    ]
    with cuda.activate(capability) as record:
        for call in calls:
            with vk.use("ext"), pytest.raises(vk.BackendError, match=reason):
                call()
            with vk.use("reference"):
                out = call()
            with vk.use("ext"), pytest.raises(vk.BackendError, match=reason):
                out.sum().backward()
    assert not record.names


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((2**20, 2**11, 33, 16), "2147483647 tiles"), ((1, 1, 2**31, 1), "up to 2147483392 tokens; got 2147483648")],
)
def test_too_many_tokens_are_declined(shape: tuple[int, ...], reason: str) -> None:
    q = torch.zeros(1, dtype=BF16).expand(shape)  # takes no memory
    with cuda.activate(), vk.use("ext"), pytest.raises(vk.BackendError, match=reason):
        vk.ops.attention(q, q, q)


def test_too_large_images_are_declined() -> None:
    """Of images one key wide a tile has eight keys."""
    q = torch.zeros(1, dtype=BF16).expand(2**20, 2**10, 17, 16)
    with cuda.activate(), vk.use("ext"), pytest.raises(vk.BackendError, match="2147483647 tiles"):
        vk.ops.attention_rel_pos(q, q, q, q[..., :1].expand(-1, -1, -1, 17), q[..., :1])


def test_too_many_sequences_are_declined() -> None:
    qkv, ends = torch.zeros(1, dtype=BF16).expand(2, 3, 2**20, 16), torch.tensor([0] * 2048 + [2]).int()
    with cuda.activate(), vk.use("ext"), pytest.raises(vk.BackendError, match="2147483647 tiles"):
        vk.ops.attention_varlen(qkv, ends, 33)


# ----------------------------------------------------------------------------------- other PTX than the module's own


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Let launches run what `change` makes of the module's PTX."""
    texts = cuda._texts
    monkeypatch.setattr(cuda, "_texts", functools.lru_cache(lambda code: tuple(map(change, texts(code)))))


@functools.cache
def of_turing(name: str) -> str:
    """The PTX of a source as it is compiled for capability 7.5."""
    toolkit = nvcc.find()
    assert toolkit is not None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.ptx"
        source = nvcc.CSRC / "cuda" / f"{name}.cu"
        nvcc.run([*nvcc.command(toolkit, source, ["-arch=compute_75"]), "-ptx", "-o", target])
        return target.read_text()


@pytest.mark.parametrize("case", [BIAS, PADDED, CAUSAL, attention("wide", 1, 1, 33, 70, 104), IMAGE], ids=str)
def test_without_asynchronous_copies(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability 7.5 has none: the kernels of float32 as they are compiled for it."""
    text = of_turing("attention_rel_pos_f32" if case is IMAGE else "attention_f32")
    assert "cp.async" not in text
    changed(monkeypatch, lambda _: text)
    assert kernels(launched(case, F32, (7, 5))) == list(KERNELS)


def outcome(case: Case, dtype: torch.dtype) -> set[str]:
    """Kinds of what the machine finds, and "numbers" where the tolerance rule is broken."""
    kinds = set()
    with cuda.activate() as record:
        try:
            check_case(case, dtype, "ext")
        except AssertionError:
            kinds.add("numbers")
    return kinds | {each.kind for each in record.findings}


@functools.cache
def outcome_of_sound_kernels(dtype: torch.dtype) -> set[str]:
    return outcome(CAUSAL, dtype)


FAULTS = {  # what is looked for, what stands there instead, how it shows
    "no barrier": (r"bar\.sync\s+0;", "", RACE),
    "copies not waited for": (r"cp\.async\.wait_all;", "", FLIGHT),
    "hidden keys seen": ("0fFF800000", "0f00000000", "numbers"),
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, instead, kind = FAULTS[fault]
    assert outcome_of_sound_kernels(dtype) == set()
    changed(monkeypatch, lambda text: re.sub(pattern, instead, text))
    assert kind in outcome(CAUSAL, dtype)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("case", [BIAS, PADDED], ids=str)
def test_dropped_mask_is_seen(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = cuda._arguments
    shape = case.tensors["attn_mask"].shape  # type: ignore[union-attr]

    def without_mask(*launch: Any) -> list[Packed]:
        (given,) = arguments(*launch)
        (place,) = [at for at, (tensor, _) in given.pointers.items() if tensor.shape == shape]
        raw = given.raw[:place] + bytes(8) + given.raw[place + 8 :]
        kept = {at: memory for at, memory in given.pointers.items() if at != place}
        return [dataclasses.replace(given, raw=raw, pointers=kept)]

    monkeypatch.setattr(cuda, "_arguments", without_mask)
    assert outcome(case, dtype) == {"numbers"}
