"""The benches measure what they say: the work, the order, the memory, and nothing that is wrong."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import accuracy
import pytest
import torch
from conftest import skip_without
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import dispatch, ext_cuda, tape

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import machine, tables, zoo
from bench.measure import LOOSE, OURS, Effort, Key, Lane, Truth, judge, measure
from bench.models import ModelBench
from bench.ops import CUDA_CPP, OpBench, Size, of_size
from bench.suites import RECOMPUTE

CPU = torch.device("cpu")
EFFORT = Effort(0.0, 3, 3)
TINY = Size(2, 16, 32, 2)
ARGUMENTS = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 16, "num_classes": 10}


def _op(name: str, dtype: torch.dtype = torch.float32, backward: bool = True) -> OpBench:
    return OpBench(next(case for case in of_size(TINY) if case.op == name), dtype, CPU, backward)


def _model(*lanes: str, dtype: torch.dtype = torch.float32, **more: Any) -> ModelBench:
    return ModelBench("vit", ARGUMENTS, 2, dtype, CPU, lanes, **more)


OPS = [case.op for case in of_size(TINY)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_and_its_peers_are_measured(op: str, backward: bool) -> None:
    skip_without("ext")
    bench = _op(op, backward=backward)
    uncompiled = {name: build for name, build in bench.lanes().items() if "compiled" not in name}
    assert len(uncompiled) > 1
    bench.lanes = lambda: uncompiled  # type: ignore[method-assign]
    timed = measure(bench, EFFORT)
    assert timed.keys() == uncompiled.keys()
    for name, each in timed.items():
        assert "failed" not in each.row, (name, each.row)
        assert len(each.samples) == 3
        assert min(each.samples) > 0
    assert timed[OURS].row["backends"] == ["ext"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in ("add_layer_norm", "add_rms_norm", "rotary", "rotary_qkv")]
)
def test_flops_of_an_op_are_those_of_its_products(op: str, backward: bool) -> None:
    bench = _op(op, backward=backward)
    others = {
        "attention_qkv": "sdpa",
        "attention_rel_pos": "sdpa",
        "attention_varlen": "sdpa, one by one",
        "patch_embed": "unfold",
    }
    name = others.get(op, "eager")
    lane = bench.lanes()[name]()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lane.step(bench.inputs(0))
    assert counter.get_total_flops() == bench.flops


def test_flops_of_a_model_are_those_of_its_products() -> None:
    bench = _model("naive")
    lane = bench.lanes()["naive"]()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lane.step(bench.inputs(0))
    assert counter.get_total_flops() == bench.flops


def test_flops_of_a_block_are_thrice_those_of_its_forward() -> None:
    bench = _model("naive", block=True, tokens=7)
    lane = bench.lanes()["naive"]()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lane.call(bench.inputs(0)[0])  # the counter cannot follow a gradient of the tokens
    assert 3 * counter.get_total_flops() == bench.flops


def test_bytes_are_arguments_results_and_gradients() -> None:
    rows, width = TINY.batch * TINY.tokens, TINY.width
    x, weight, bias, out = rows * width, 3 * width * width, 3 * width, rows * 3 * width
    assert _op("linear", backward=False).bytes == 4 * (x + weight + bias + out)
    assert _op("linear").bytes == 4 * (2 * (x + weight + bias + out) + x + weight + bias)
    # x, branch, total, normed and two vectors; then total, two gradients that arrive, one that leaves, vectors twice
    assert _op("add_layer_norm").bytes == 4 * (4 * x + 2 * width + 4 * x + 4 * width)
    assert _op("add_rms_norm").bytes == 4 * (4 * x + width + 4 * x + 2 * width)
    # in bfloat16, its sines and cosines in float32: x and out, then the two gradients
    positions = 2 * 4 * TINY.tokens * TINY.width // TINY.heads
    assert _op("rotary", torch.bfloat16).bytes == 2 * (2 * 2 * x + positions)


def test_cuda_cpp_is_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else."""
    monkeypatch.setattr(ext_cuda.Cuda, "why_not", lambda self: None)
    for case in of_size(TINY):
        lanes = [OpBench(case, torch.float32, torch.device(kind), True).lanes() for kind in ("cuda", "cpu")]
        assert [CUDA_CPP in each for each in lanes] == [True, False]


@pytest.mark.parametrize("block", [False, True], ids=["model", "block"])
@pytest.mark.parametrize("lane", [name for name in zoo.MAKERS if name != OURS])
def test_models_of_the_libraries_have_our_weights(lane: str, block: bool) -> None:
    if not zoo.available(lane):
        pytest.skip(f"{lane}: its package is not installed")
    (each,) = measure(_model(lane, block=block, tokens=5), EFFORT).values()
    assert "failed" not in each.row, each.row
    assert "inexact" not in each.row, each.row


@pytest.mark.parametrize("update", [False, True], ids=["backward", "step"])
def test_a_step_leaves_the_weights_as_they_were_judged(update: bool) -> None:
    bench = _model(OURS, update=update)
    before = {name: weight.clone() for name, weight in bench.vit.named_parameters()}
    measure(bench, EFFORT)
    assert all(torch.equal(before[name], weight) for name, weight in bench.vit.named_parameters())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.1)], ids=["float32", "bf16"])
def test_a_wrong_gradient_has_no_figure(dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("ext")
    good = dispatch.OPS["linear"].implementations["ext"]

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        dx, dweight, *rest = good.backward(*args)
        return (dx, dweight * factor, *rest)

    bad = dispatch.Implementation(good.forward, wrong, good.why_not)
    monkeypatch.setitem(dispatch.OPS["linear"].implementations, "ext", bad)
    dispatch.backends_changed()
    for bench in (_op("linear", dtype), _model(OURS, "naive", dtype=dtype)):
        timed = measure(bench, EFFORT)
        assert timed[OURS].row["failed"].startswith("not timed, wrong: gradient of ")
        assert "weight: worst error" in timed[OURS].row["failed"]
        assert timed[OURS].samples == []
        peer = timed["eager" if "eager" in timed else "naive"]
        assert peer.samples, "the others are timed all the same"
    monkeypatch.undo()
    dispatch.backends_changed()


def test_peers_that_round_more_are_named_and_others_not_timed() -> None:
    exact = {"out": torch.linspace(1, 2, 64, dtype=torch.float64)}
    truth = Truth({"out": exact["out"].bfloat16()}, exact, accuracy.FLOORS[torch.bfloat16])
    got = {"out": exact["out"].bfloat16()}
    assert judge(got, truth, "bfloat16", ours=False) == {}
    rough = {"out": (exact["out"] * (1 + LOOSE["bfloat16"] / 2)).bfloat16()}
    assert "out: " in judge(rough, truth, "bfloat16", ours=False)["inexact"]
    assert "not timed, wrong: out: " in judge(rough, truth, "bfloat16", ours=True)["failed"]
    other = {"out": (exact["out"] * (1 + LOOSE["bfloat16"] * 2)).bfloat16()}
    assert "not timed, wrong: out: " in judge(other, truth, "bfloat16", ours=False)["failed"]


@dataclass
class Logged:
    """A case that computes nothing and says who was called with what."""

    names: tuple[str, ...]
    key: Key = Key("op", "nothing", "", "float32", "forward")  # noqa: RUF009  # frozen
    device: torch.device = CPU
    flops: float = 1.0
    bytes: float = 1e12
    calls: list[tuple[str, int]] = field(default_factory=list)

    def inputs(self, index: int) -> int:
        return index

    def truth(self, inputs: int) -> Truth:
        return Truth({}, {}, accuracy.FLOORS[torch.float32])

    def lanes(self) -> Mapping[str, Callable[[], Lane]]:
        return {name: lambda name=name: LoggedLane(name, self.calls) for name in self.names}


@dataclass
class LoggedLane:
    name: str
    calls: list[tuple[str, int]]

    def step(self, inputs: int) -> None:
        if self.name == "broken" and len(self.calls) > 12:
            raise RuntimeError("no more\nof this")
        self.calls.append((self.name, inputs))

    def results(self, inputs: int) -> dict[str, Tensor]:
        return {}


def test_lanes_take_turns_and_inputs_rotate() -> None:
    bench = Logged(("a", "b", "c"))
    measure(bench, Effort(0.0, 6, 6))
    rounds = [bench.calls[-18:][start : start + 3] for start in range(0, 18, 3)]
    for each in rounds:
        assert {name for name, _ in each} == {"a", "b", "c"}
    seen = [index for _, index in bench.calls[-18:]]
    assert all(a != b for a, b in itertools.pairwise(seen)), "a lane would find what the one before left in the cache"
    assert {each[0][0] for each in rounds} == {"a", "b", "c"}
    followed = {pair for each in rounds for pair in itertools.pairwise(name for name, _ in each)}
    assert followed == set(itertools.permutations("abc", 2))


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_every_lane_is_first_equally_often(names: str) -> None:
    bench = Logged(tuple(names))
    measure(bench, Effort(0.0, 8, 8))
    firsts = [name for name, _ in bench.calls[-8 * len(names) :: len(names)]]
    assert sorted(firsts) == sorted(names * (8 // len(names)))


def test_a_lane_that_fails_is_a_row_with_its_reason() -> None:
    timed = measure(Logged(("a", "broken")), EFFORT)
    assert len(timed["a"].samples) == 3
    timed = measure(Logged(("a", "broken", "b")), Effort(0.0, 9, 9))
    assert timed["broken"].row["failed"] == "RuntimeError: no more of this"
    assert timed["broken"].samples == []
    assert len(timed["a"].samples) == len(timed["b"].samples) == 9


class Event:
    """A CUDA event on a clock that moves by what `Logged` lanes were called."""

    calls: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.calls)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 3.0 * (end.at - self.at)  # milliseconds


def test_ops_on_a_gpu_have_device_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(machine, "clock", lambda device: time.perf_counter())
    monkeypatch.setattr(machine, "peak_memory", lambda step, device: 0)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    bench = Logged(("a", "b"), device=torch.device("cuda"), calls=Event.calls)
    timed = measure(bench, EFFORT)
    assert [timed[name].row["device_seconds"] for name in "ab"] == pytest.approx([0.003, 0.003])
    assert len(held) == 10
    assert min(held) > 1e6, "the GPU waits until all calls are in its queue"
    assert "device_seconds" not in measure(Logged(("a",)), EFFORT)["a"].row


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_random_and_of_several_sets(op: str) -> None:
    bench = _op(op, torch.bfloat16)
    first, second = bench.inputs(0), bench.inputs(1)
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        assert tensor is not None
        assert other is not None
        if not tensor.is_floating_point():  # where sequences begin
            continue
        assert (tensor == 0).float().mean() < 0.05
        assert not torch.equal(tensor, other)


def test_running_blocks_again_takes_less_memory() -> None:
    model = {**ARGUMENTS, "depth": 4}
    timed = measure(ModelBench("vit", model, 64, torch.float32, CPU, RECOMPUTE, kind="memory"), EFFORT)
    rows = {name: each.row | {"seconds": 1.0} for name, each in timed.items()}
    assert [row.get("failed") for row in rows.values()] == [None] * len(rows)
    for name in RECOMPUTE[::2]:
        assert rows[f"{name}, recompute"]["memory"] < 0.8 * rows[name]["memory"], name
    content = {"rows": list(rows.values()), "device": "here", "versions": {"torch": "2"}}
    table = tables.memory(content)
    assert all(f"| {name} | 1 s | 1.00 |" in table for name in RECOMPUTE)
    assert tables.models(content) == "", "it is a table of its own"


def test_peak_memory_is_what_a_step_takes() -> None:
    size = 64 * 2**20

    def step() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        assert second[-1] == 2

    assert 0 <= machine.peak_memory(step, CPU) - 2 * size < 1024


def test_peak_memory_is_of_a_step_that_replays_its_tapes() -> None:
    replayed: list[bool] = []
    taped = tape.Taped(lambda x: (replayed.append(False), x.exp())[1:])

    def step() -> None:
        replayed.append(True)
        taped(torch.zeros(8))

    machine.peak_memory(step, CPU)
    assert replayed == [True, False] * tape.FROM_CALL + [True], "the profiled step called what the tape replays"
    assert torch.autograd._profiler_enabled() is False
