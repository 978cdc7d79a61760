"""Programs of the extension: launches in one call give what they give one by one, and keep no more memory."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import skip_without
from step_layers import FACTORS, KINDS, MASKED, Layer, check_equal
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import program, tape
from vitkernels.ops import _stretch
from vitkernels.tape import Taped


@pytest.fixture(autouse=True)
def _taped_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    skip_without("ext")
    monkeypatch.setattr(_stretch, "_kinds", _stretch.Kinds())
    monkeypatch.setattr(tape, "FROM_CALL", 1)
    with vk.use("ext"):
        yield


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each program got that was run."""
    runs: list[int] = []
    extension = program.extension
    assert extension is not None

    def run(owner: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        runs.append(len(inputs))
        return extension.run(owner, inputs)

    monkeypatch.setattr(program, "extension", dataclasses.replace(extension, run=run))
    return runs


def ext_op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.vitkernels_ext, name).default._op  # type: ignore[no-any-return]


def launched(name: str, *args: Any) -> Any:
    """A launch of the extension's, as a tape is told of it."""
    recording = tape.recording()
    return ext_op(name)(*args) if recording is None else recording.opaque(ext_op(name), args)


def taped(function: Callable[..., tuple[Any, ...]], *inputs: Any) -> tape.Program:
    found = Taped(function)
    found(*inputs)
    assert found.program is not None
    return found.program


def peak(function: Callable[[], Any]) -> int:
    """Bytes that were held at most while it ran, above those before."""
    kind = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], profile_memory=True) as seen:
        result = function()
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        held += each.nbytes()
        most = max(most, held)
    assert most > 0
    del result
    return most


# ------------------------------------------------------------------------------------------------------ what it gives


def trained(block: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    for each in block.parameters():
        each.grad = None
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(given)
    out.square().mean().backward()
    assert given.grad is not None
    return {"out": out.detach(), "x": given.grad} | {
        name: each.grad for name, each in block.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_block_is_one_call_each_way(autocast: bool, programs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = vk.nn.Block(24, 3, qkv_bias=True), torch.randn(2, 5, 24)
    trained(block, x, autocast)
    programs.clear()
    with vk.record() as calls:
        found = trained(block, x, autocast)
    assert len(programs) == 2, "forward and backward"

    monkeypatch.setattr(program, "extension", None)
    monkeypatch.setattr(_stretch, "_kinds", _stretch.Kinds())
    with vk.record() as apart:
        trained(block, x, autocast)
    with vk.record() as apart:
        check_equal(found, trained(block, x, autocast))
    assert len(programs) == 2, "none, without the extension's"
    assert calls == apart
    assert len(calls) >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_their_launches(
    kind: str, rms: bool, dtype: torch.dtype, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(kind, dtype, factors=FACTORS, rms=rms, mask=kind in MASKED)
    monkeypatch.setattr(tape, "FROM_CALL", 100)
    expected = layer.gradients(layer.together())
    assert not programs
    _stretch._kinds.clear()
    monkeypatch.setattr(tape, "FROM_CALL", 1)
    for _ in range(3):
        check_equal(layer.gradients(layer.together()), expected)
    assert bool(programs) == (kind != "windows"), "there copies of the tokens stand between the launches"


def test_a_whole_number_may_stand_for_a_number(programs: list[int]) -> None:
    """As with torch's ops: an eps of 1 is one of 1.0."""
    block, x, found = vk.nn.Block(24, 3, qkv_bias=True), torch.randn(2, 5, 24), []
    for eps in (1, 1.0):
        block.norm1.eps = block.norm2.eps = eps
        _stretch._kinds.clear()
        trained(block, x, False)
        programs.clear()
        found.append(trained(block, x, False))
        assert len(programs) == 2, "forward and backward"
    check_equal(*found)


def test_python_between_two_rows_stays_between_them(programs: list[int]) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = launched("linear", launched("linear", x, w, None), w, None)
        between = first.tanh()
        return first, between, launched("linear", launched("linear", between, w, None), w, None)

    x, w = torch.randn(3, 8), torch.randn(8, 8)
    found = taped(function, x, w)
    x = torch.randn(3, 8)
    for got, expected in zip(found.run(x, w), function(x, w), strict=True):
        assert torch.equal(got, expected)
    assert programs == [2, 2]


# ----------------------------------------------------------------------------------------------------------- memory


def chain(x: Tensor, w: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
    for _ in range(6):
        x = launched("linear", x, w, None)
    return (x,)


def chain_with_a_copy(x: Tensor, w: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
    """What another line has made is not held beyond the one that reads it last: more is held behind that one."""
    copy = w.repeat(8, 1)
    x = launched("linear", launched("linear", launched("linear", x, w, None), w, None), copy, None)
    return (launched("linear", x, wide, None),)


@pytest.mark.parametrize("function", [chain, chain_with_a_copy])
def test_no_more_memory_is_held_than_by_launches_one_by_one(
    function: Any, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = torch.randn(512, 256), torch.randn(256, 256), torch.randn(2048, 2048)
    together = taped(function, *given)
    with monkeypatch.context() as patch:
        patch.setattr(program, "extension", None)
        apart = taped(function, *given)
    assert peak(lambda: together.run(*given)) == peak(lambda: apart.run(*given))
    assert len(programs) == 1


def test_what_nobody_reads_is_not_held() -> None:
    """Nor is it handed back: a result that only the program made and nobody reads is gone after its line."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        _, y, mean, _ = launched("add_layer_norm", x, x, w, None, 1e-6, None, None, None, 6)
        return launched("linear", launched("linear", y, y, None), y, None), mean

    x, w = torch.randn(256, 256), torch.randn(256)
    found = taped(function, x, w)
    assert peak(lambda: found.run(x, w)) < 3.5 * x.nbytes


def test_launches_of_which_nobody_reads_anything(programs: list[int]) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        launched("linear", x, w, None)
        launched("linear", x, w, None)
        return (x,)

    x, w = torch.randn(3, 8), torch.randn(8, 8)
    (found,) = taped(function, x, w).run(x, w)
    assert found is x
    assert programs == [2]


def test_a_program_goes_with_its_tensor() -> None:
    assert program.extension is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(400):
        program.extension.make([0, 1, 0], [], [f"{index}" * 2**20])  # a name of a megabyte and more
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


# ----------------------------------------------------------------------------------------------- errors and threads


def test_names_are_given_back() -> None:
    """torch's own conversion of a string to C++ (2.13) keeps a copy at each call."""
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(400):
        with pytest.raises(RuntimeError, match="activation"):
            ext_op("mlp")(x, w, None, w, None, "x" * 2**20, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


def test_an_error_is_the_ops_own() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="activation") as own:
        ext_op("mlp")(x, w, None, w, None, "nonsense", True)
    names = {0: "a", 1: "b"}
    call = program.call(ext_op("mlp"), (x, w, None, w, None, "nonsense", True), ["y", "pre"], {id(x): "a", id(w): "b"})
    assert call is not None
    assert program.extension is not None
    wrong = program.join([call], list(names.values()), ["y"], [["pre"]])
    for _ in range(2):
        with pytest.raises(RuntimeError) as found:
            program.extension.run(wrong, [x, w])
        assert str(found.value).splitlines()[0] == str(own.value).splitlines()[0]


LINEAR = [0, 1, 1, 1, 2, 0, 0]  # name 0 of the slots 1 and 2, without a bias


@pytest.mark.parametrize(
    ("code", "names", "message"),
    [
        ([2, 4, 1, 3, *LINEAR, 3], ["linear"], "ends within a line"),
        ([2, 4, 1, 3, *LINEAR, 3, 0], ["nothing"], "knows no op 'nothing'"),
        ([1, 4, 1, 3, *LINEAR, 3, 0], ["linear"], "reads an empty slot, 2"),
        ([2, 4, 1, 3, *LINEAR, 0, 0], ["linear"], "result 3 is empty"),
        ([2, 4, 1, 3, *LINEAR, 3, 1, 3], ["linear"], "result 3 is empty"),
        ([2, 4, 1, 3, *LINEAR, 4, 0], ["linear"], "has 4 for one of 4"),
        ([2, 4, 1, 3, 0, 2, 1, 1, 2, 0, 0, 3, 0], ["linear"], "does not take an argument of kind 2"),
        ([2, 2, 0], ["linear"], "no slots for its inputs"),
    ],
)
def test_code_that_is_none(code: list[int], names: list[str], message: str) -> None:
    assert program.extension is not None
    with pytest.raises(RuntimeError, match=message):
        program.extension.make(code, [], names)


def test_what_is_no_program_is_not_run() -> None:
    assert program.extension is not None
    owner = program.extension.make([2, 4, 1, 3, *LINEAR, 3, 0], [], ["linear"])
    x = torch.randn(4, 4)
    assert torch.allclose(program.extension.run(owner, [x, x])[0], x @ x.t(), atol=1e-5)
    with pytest.raises(RuntimeError, match="of 2 inputs got 1"):
        program.extension.run(owner, [x])
    for other in (torch.zeros(3), torch.zeros(owner.numel(), dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="needs a program"):
            program.extension.run(other, [x, x])


def test_threads_share_a_program(programs: list[int]) -> None:
    block, x = vk.nn.Block(24, 3), torch.randn(2, 5, 24)
    with torch.no_grad():
        for _ in range(2):
            expected = block(x)
        programs.clear()
        results: list[Tensor] = []

        def work() -> None:
            with torch.no_grad():
                results.extend(block(x) for _ in range(20))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(programs) == 80
    assert all(torch.equal(each, expected) for each in results)
    assert len(results) == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_runs_a_program(programs: list[int]) -> None:
    block, x = vk.nn.Block(24, 3), torch.randn(2, 5, 24)
    with torch.no_grad():
        for _ in range(2):
            expected = block(x)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            count = len(programs)
            same = torch.equal(block(x), expected)
            os._exit(0 if same and len(programs) == count + 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
