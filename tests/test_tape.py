"""Tapes: what is replayed computes what was taped, on whatever tensors a later call of the kind brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_layers import FACTORS, KINDS, Layer, check_equal, keep_smaller_norms
from torch import Tensor

import vitkernels as vk
from vitkernels import kernels, tape
from vitkernels.ops import _stretch
from vitkernels.tape import Taped


def taped(function: Any, *inputs: Any) -> Taped:
    """The function after one call."""
    found = Taped(lambda *each: function(*each))
    found(*inputs)
    assert found.program is not None
    return found


def programs() -> list[tape.Program]:
    """Of every stretch of steps that there is."""
    plans = [plan for kind in _stretch._kinds.values() for plan in (kind.forward, *kind.backward.values())]
    return [plan.program for plan in plans if plan.program is not None]


def run(layer: Layer, autocast: bool) -> dict[str, Tensor]:
    """Results and gradients of a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = layer.together()
    return layer.gradients(results)


@pytest.fixture(autouse=True)
def _no_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stretch, "_kinds", _stretch.Kinds())


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("smallest", [0, 2**16], ids=["made again", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_taped_in_both_directions(
    kind: str, smallest: int, autocast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_smaller_norms(monkeypatch, smallest)
    with vk.use(backend):
        for _ in range(tape.FROM_CALL):
            run(Layer(kind, factors=FACTORS), autocast)
    assert len(programs()) == 2


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [(), FACTORS], ids=["branch", "factors"])
def test_a_replayed_step_gives_what_a_taped_one_gave(
    kind: str, factors: tuple[str, ...], autocast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(kind, factors=factors)
    results, calls = [], []
    with vk.use(backend):
        for from_call in (10, 1, 1, 1):  # never, then at once, then replayed twice
            monkeypatch.setattr(tape, "FROM_CALL", from_call)
            with vk.record() as seen:
                results.append(run(layer, autocast))
            calls.append(seen)
            if from_call == 10:
                assert not programs()
                _stretch._kinds.clear()
    assert len(programs()) == 2, "forward and backward"
    for result in results[1:]:
        check_equal(result, results[0])
    assert calls[0] == calls[1] == calls[2] == calls[3] != []


@pytest.mark.parametrize(("kind", "processors"), [("linear", 132), ("mlp", 132), ("mlp", 1), ("attention", 132)])
def test_a_step_on_the_machine_for_ptx(kind: str, processors: int) -> None:
    """Compiled kernels launched from a tape read and write what they did when Triton's JIT launched them."""
    pytest.importorskip("triton")
    if kernels.interpreting():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from ptx.driver import Gpu, activate

    layer = Layer(kind, factors=FACTORS)
    with activate(Gpu(processors_=processors)) as record, vk.use("triton"):
        first = run(layer, autocast=True)
        launches = len(record.launches)
        second = run(layer, autocast=True)
        assert len(record.launches) == 2 * launches > 0
        assert not record.findings
    assert len(programs()) == 2
    check_equal(second, first)


def elsewhere(tensor: Tensor) -> Tensor:
    """A copy that does not begin at a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor.detach())


@pytest.mark.parametrize("how", ["in its place", "by a hook"])
def test_a_backward_pass_looks_at_tensors_that_came_after_its_forward_pass(how: str, backend: str) -> None:
    """What kernels may assume of memory is asked of the tensors that they get, not of those that were there before."""
    layer = Layer("mlp", factors=FACTORS)
    with vk.use(backend):
        expected = run(layer, autocast=False)
        (kind,) = _stretch._kinds.values()
        assert len(kind.backward) == 1
        if how == "by a hook":
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, elsewhere):
                results = layer.together()
        else:
            results = layer.together()
            layer.tensors["weight"].data = elsewhere(layer.tensors["weight"])
        found = layer.gradients(results)
    assert len(kind.backward) == 2, "another kind of backward pass"
    check_equal(found, expected)


def test_a_kind_is_taped_at_its_third_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tape, "FROM_CALL", 3)
    found = Taped(lambda x: (x + 1,))
    for had in (False, False, True):
        found(torch.zeros(2))
        assert (found.program is not None) is had


# ------------------------------------------------------------------------------------------------- what a tape is told


def test_views_of_inputs_that_begin_elsewhere() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first, second = x.unflatten(-1, (2, 3)).unbind(1)
        return (first.t() @ second, second.contiguous())

    memory = torch.randn(40)
    found = taped(function, memory[:12].view(2, 6))
    for start in (0, 4, 20):
        x = memory[start : start + 12].view(2, 6)
        for got, expected in zip(found(x), function(x), strict=True):
            assert torch.equal(got, expected)


def test_inputs_that_share_memory_once() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x.t() @ y.t().t(),)

    both = torch.randn(4, 3)
    found = taped(function, both[:2], both[2:])
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(found(x, y)[0], function(x, y)[0])


def test_inputs_that_are_one_tensor_once() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x - 2 * y,)

    x, y = torch.randn(3), torch.randn(3)
    found = taped(function, x, x)
    assert torch.equal(found(y, y)[0], -y)
    assert torch.equal(found(x, y)[0], x - 2 * y)


def test_memory_that_is_written_into() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        out = x.new_empty(2, 4)
        out[0], rows = x, out[1]
        rows.zero_()
        rows.add_(x)
        return out, rows

    found = taped(function, torch.zeros(4))
    x = torch.randn(4)
    out, rows = found(x)
    assert torch.equal(out, torch.stack([x, x]))
    assert rows.data_ptr() == out[1].data_ptr()
    assert found(x)[0].data_ptr() != out.data_ptr(), "memory of each call's own"


def test_what_is_not_read_is_not_made() -> None:
    made = []

    def launcher(x: Tensor) -> tuple[Tensor, Tensor]:
        made.append(x)
        return x + 1, x + 2

    def function(x: Tensor) -> tuple[Tensor, ...]:
        x.new_empty(1000)
        recording = tape.recording()
        return (recording.opaque(launcher, (x,)) if recording else launcher(x))[:1]

    found = taped(function, torch.zeros(3))
    assert found.program is not None
    assert "new_empty" not in found.program.run.__code__.co_names
    assert torch.equal(found(torch.ones(3))[0], torch.full((3,), 2.0))
    assert len(made) == 2, "a launcher is called each time"


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * x.sum().item(),), lambda x: (x if x.sum() > 0 else -x,), lambda x: (x + OUTSIDE,)],
    ids=["item", "bool", "a tensor of its own"],
)
def test_what_depends_on_more_than_its_kind_is_not_taped(function: Any) -> None:
    found = Taped(function)
    for _ in range(3):
        x = torch.randn(3)
        assert torch.equal(found(x)[0], function(x)[0])
    assert found.program is None


OUTSIDE = torch.ones(3)


def test_a_profiler_sees_the_ops(backend: str) -> None:
    layer = Layer("mlp")
    with vk.use(backend):
        for _ in range(2):
            layer.together()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            layer.together()
    assert "vitkernels::mlp" in {event.key for event in seen.key_averages()}


def test_hooks_of_tritons_launches_are_called() -> None:
    pytest.importorskip("triton")
    if kernels.interpreting():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from ptx.driver import Gpu, Nothing, activate
    from triton import knobs

    layer, seen = Layer("mlp"), []

    def hook(metadata: Any) -> None:
        seen.append(metadata)

    with activate(Gpu(), Nothing) as record, vk.use("triton"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            layer.together()
        assert programs()
        launches = len(record.launches)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            layer.together()
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert len(record.launches) == launches + launches // 2
    assert len(record.launches) > 0
