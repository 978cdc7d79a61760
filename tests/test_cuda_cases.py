"""The case list on the extension's CUDA kernels, as nvcc compiles them, launched by their own C++ and executed by the
machine in `ptx`: numbers, races, bounds, hangs. Which cases: the rules of `ptx/sample.py`."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from accuracy import check_case, run
from cases import add_layer_norm
from ptx import cuda, sample
from ptx.findings import PROGRAMS, RACE, Fault
from ptx.trials import Trial
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch, ext_cuda
from vitkernels.ops._amp import CODES

if cuda.why_not() is not None:
    pytest.skip(f"{cuda.why_not()}", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TRIALS = [each for each in sample.cuda() if each.case.op not in ext_cuda.ATTENTION]


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_case(trial: Trial) -> None:
    with cuda.activate(trial.capability) as record:
        check_case(trial.case, trial.dtype, "ext")
    assert not record.findings, "\n".join(map(str, record.findings))


def test_the_sample_launches_every_kernel() -> None:
    """Of the module, in the text of one of the dtypes that share it."""

    def of_any_half(name: str) -> str:
        return name.replace("6__half", "13__nv_bfloat16")

    left = {of_any_half(name) for name in cuda.entries()}
    for trial in reversed(sample.cuda()):  # layouts and sizes of its own are last
        with cuda.activate(trial.capability, take=lambda call, record: None) as record:
            run(trial.case, trial.case.build(trial.dtype), forward="ext")
        left -= set(map(of_any_half, record.names))
        if not left:
            return
    assert not left


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", ["linear", "mlp", "glu_mlp"])
def test_weights_in_float32_are_rounded_as_a_cast_rounds_them(name: str, dtype: torch.dtype) -> None:
    """And their gradients come in float32, with the values that a gradient in the narrow dtype has."""
    op = dispatch.OPS[name]
    x, dy = torch.randn(5, 16).to(dtype), torch.randn(5, 24).to(dtype)
    hidden = 48 if name == "glu_mlp" else 24
    w1, b1, w2, b2 = torch.randn(hidden, 16), torch.randn(hidden), torch.randn(24, 24), torch.randn(24)

    def results(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grad_dtype: int = 0) -> tuple[Tensor, ...]:
        if name == "linear":
            return op(x, w1, b1), *op.backward(dy, x, w1, [True] * 3, grad_dtype)
        if name == "mlp":
            y, pre = op(x, w1, b1, w2, b2, "gelu", True)
            return y, pre, *op.backward(dy, x, pre, w1, w2, "gelu", [True] * 5, grad_dtype)
        (w_gate, w_up), (b_gate, b_up) = w1.chunk(2), b1.chunk(2)
        y, pre = op(x, w_gate, b_gate, w_up, b_up, w2, b2, "gelu", True)
        return y, pre, *op.backward(dy, x, pre, w_gate, w_up, w2, "gelu", [True] * 7, grad_dtype)

    with cuda.activate() as record, vk.use("ext"):
        got = results(w1, b1, w2, b2)
        copies = [each.to(dtype) for each in (w1, b1, w2, b2)]
        cast, wide = results(*copies), results(*copies, grad_dtype=CODES[F32])
    assert record.names
    assert not record.findings
    narrow = 2 if name == "linear" else 3  # results, and the gradient of x
    assert [each.dtype for each in got] == [*[dtype] * narrow, *[F32] * (len(got) - narrow)]
    for mine, theirs, widened in zip(got, cast, wide, strict=True):
        assert torch.equal(mine.float(), theirs.float())
        assert mine.dtype == widened.dtype
        assert torch.equal(mine, widened)


def test_blocks_for_every_multiprocessor() -> None:
    """The backward pass of a norm has as many blocks as the device holds at once, and one block a row at the most."""
    case = add_layer_norm("many rows", (4, 65, 48))
    grids = {}
    for processors in (1, 132):
        with cuda.activate(processors=processors) as record:
            check_case(case, F32, "ext")
        assert not record.findings
        grids[processors] = next(
            grid for name, (grid, _, _) in zip(record.names, record.shapes, strict=True) if "norm_backward" in name
        )
    assert grids == {1: (cuda.BLOCKS_AT_ONCE, 1, 1), 132: (260, 1, 1)}


def loads_before_a_number(body: str) -> int:
    """How many loads of 16 bytes stand in PTX before the first instruction that computes with what one gave."""
    loaded: set[str] = set()
    count = 0
    for line in body.splitlines():
        words = re.search(r"ld\.global\S*\.v4\.\S+\s*\{([^}]*)\}", line)
        target, *sources = re.findall(r"%[a-z]+\d+", line) or [""]
        if words:
            count += 1
            loaded.update(re.findall(r"%\w+", words[1]))
        elif loaded.isdisjoint(sources):
            loaded.discard(target)
        elif " mov." in f" {line.strip()}":
            loaded.add(target)
        else:
            break
    return count


@pytest.mark.parametrize(
    ("kernel", "loads"),
    [
        ("layer_norm_forward<3, true, 1, false>", 6),  # all of x and branch
        ("layer_norm_forward<3, true, 2, false>", 12),
        ("layer_norm_backward<true, 1, 128>", 5),  # the next row's three, and the weight, which is float32
        ("layer_norm_backward<true, 1, 512>", 6),  # the branch as well
        ("column_sums_kernel<true, 16>", 8),  # four rows of partial sums
        ("rotary_kernel<true, 1, false>", 8),  # four heads, a sine and a cosine in float32
        ("rotary_kernel<true, 1, true>", 16),
        ("rotary_qkv_kernel<true, 1, true, false>", 12),  # two heads of halves, the same
    ],
)
def test_loads_are_on_their_way_before_the_first_is_waited_for(kernel: str, loads: int) -> None:
    bodies = (part.split("(", 1) for text in cuda.texts().values() for part in text.split(".entry ")[1:])
    found = {name: body for name, body in bodies if _mangled(kernel) in name}
    assert [loads_before_a_number(body) for body in found.values()] == [loads]


def _mangled(kernel: str) -> str:
    """`column_sums_kernel<true, 16>` as it is in the name of its entry."""
    name, arguments = kernel.rstrip(">").split("<")
    kinds = {"true": "Lb1E", "false": "Lb0E"}
    return f"{len(name)}{name}I{''.join(kinds.get(each, f'Li{each}E') for each in arguments.split(', '))}E"


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (r"bar\.sync\s+0;", {RACE}),  # between a block's warps
        (r"mov\.u32\s+(%r\d+), %ctaid\.x;", {PROGRAMS}),  # every block takes the first one's rows
    ],
)
def test_a_planted_fault_is_seen(pattern: str, kinds: set[str]) -> None:
    def edit(ptx: str) -> str:
        return re.sub(pattern, lambda found: f"mov.u32 {found[1]}, 0;" if found.groups() else "", ptx)

    case = add_layer_norm("width 1152", (2, 3, 1152))
    with cuda.activate(edit=edit) as record, contextlib.suppress(AssertionError):  # numbers may be right by chance
        check_case(case, F32, "ext")
    assert kinds <= {finding.kind for finding in record.findings}


def test_an_access_out_of_bounds_is_seen() -> None:
    """A row further than there are."""
    with (
        cuda.activate(edit=lambda ptx: ptx.replace("setp.ge.s64", "setp.gt.s64")) as record,
        pytest.raises(Fault, match="out of bounds"),
    ):
        check_case(add_layer_norm("rows of three blocks", (1, 9, 64)), F32, "ext")
    assert record.errors
