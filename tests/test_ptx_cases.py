"""The case list on the compiled kernels, executed by the machine in `ptx`: numbers, races, bounds, hangs.

`make emulate` runs all of it; here is a sample, by the rules of `ptx/sample.py`.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from vitkernels import kernels

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from ptx import alike, cuda, driver, sample  # noqa: E402  # needs triton
from ptx.attempt import Outcome, attempt  # noqa: E402
from ptx.store import Store, is_executed, place_of  # noqa: E402
from ptx.trials import BF16, CUDA_CAPABILITIES, F32, FEW, Trial, everything, named  # noqa: E402

NO_COMPILER = pytest.mark.skipif(cuda.why_not() is not None, reason=f"{cuda.why_not()}")


@pytest.mark.parametrize("trial", sample.triton(), ids=str)
def test_case(trial: Trial) -> None:
    if trial.case not in FEW and is_executed(place_of(trial), "triton"):
        pytest.skip("bench/results/emulated.json has it executed, of these very sources")
    outcome = attempt(trial)
    assert not outcome.faults, "\n".join(outcome.faults)


def digest(name: str, capability: tuple[int, int] = (9, 0), processors: int = 1) -> str:
    (case,) = named(name)
    return alike.digest(Trial(case, BF16, capability, processors))


def test_trials_that_are_alike() -> None:
    """Equal launches of numbers drawn in the same way, for whatever GPU and layout."""
    norm, product = "add_layer_norm: 197 tokens", "mlp: gelu, blocked gemm"
    assert digest(norm) == digest(norm, (8, 0)) == digest(norm, (8, 6)) != ""
    assert digest("linear: one row") == digest("linear: one row", processors=132)
    copied = [f"linear: strides, 16 bits, {what}" for what in ("x transposed", "weight offset", "gradient rows")]
    assert len(set(map(digest, copied))) == 1
    assert digest(norm) != digest(norm, processors=132)  # another grid
    assert digest(product) != digest(product, (8, 0))  # another text
    assert digest("rotary: prefix 1, halves") != digest("rotary: prefix 1, pairs")
    assert digest("patch_embed: patch 4") != digest("patch_embed: large mean")  # other numbers
    assert digest(copied[0]) != digest("linear: strides, 16 bits, x expanded")
    assert digest("attention: key padding, cross") != digest("attention: relative position bias")


@pytest.mark.parametrize(
    "name", ["attention_qkv: causal", "mlp: gelu, blocked gemm", "patch_embed: uint8, mean and std"]
)
def test_the_text_of_sm_80_stands_for_two_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `compiled_for` gives sm_86 and sm_89 is what Triton compiles for themselves."""
    given = [digest(name, each) for each in ((8, 6), (8, 9))]
    monkeypatch.setattr(driver, "compiled_for", lambda capability: capability)
    assert [digest(name, each) for each in ((8, 6), (8, 9))] == given
    assert "" not in given


def test_cuda_cpp_is_all_there() -> None:
    """Each op that it has, in every dtype that it serves on every capability; what it declines is no trial."""
    found = {(each.capability, each.case.op, each.dtype) for each in everything("cuda")}
    ops = {"add_layer_norm", "attention", "attention_qkv", "linear", "mlp", "patch_embed", "rotary"}
    assert {op for _, op, _ in found} >= ops
    assert {capability for capability, _, _ in found} == set(CUDA_CAPABILITIES)
    for op in ops:
        assert {dtype for capability, each, dtype in found if (capability, each) == ((8, 6), op)} >= {BF16, F32}
    turing = {(op, dtype) for capability, op, dtype in found if capability == (7, 5)}
    assert ("linear", BF16) not in turing
    assert ("attention", BF16) not in turing
    assert ("add_layer_norm", BF16) in turing


@NO_COMPILER
def test_trials_of_cuda_cpp_that_are_alike() -> None:
    """What the launches give the machine decides, not what lies between the fields of an argument."""

    def told(name: str, processors: int = 1) -> str:
        (case,) = named(name)
        return alike.digest(Trial(case, BF16, (8, 0), processors, "cuda"))

    causal = "attention_qkv: causal"
    assert told(causal) == told(causal) != ""
    assert told("add_layer_norm: 197 tokens") != told("add_layer_norm: 197 tokens", 132)  # another grid


def test_kernels_that_change_leave_what_is_launched_as_before(tmp_path: Path) -> None:
    """A trial is done again for other kernels, and run again only where its launches are others."""
    (case,) = named("linear: one row")
    one, other = (Trial(case, BF16, (9, 0), processors) for processors in (1, 132))
    path, outcome = tmp_path / "outcomes.jsonl", asdict(Outcome(launches=3))
    Store(path, "before").add(str(one), outcome | {"key": "launched"})
    store = Store(path, "after")
    assert not store.done
    assert set(store.ran) == {"launched"}
    store.add(str(one), {"key": "launched"})  # alike: not run
    store.add(str(other), asdict(Outcome(["wrong"])) | {"key": "launches of its own"})
    again = Store(path, "after")
    assert again.outcome(one) == (Outcome(launches=3), False)
    assert again.outcome(other) == (Outcome(["wrong"]), True)


def emulate(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "ptx.emulate", "--results", str(results), *arguments],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_reference_that_changes_does_not_stand_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes are kept by the text of their op's reference, and of what that takes from other ops."""
    assert alike.truth("attention") == alike.truth("attention_qkv") != alike.truth("mlp")
    before = {op: alike.truth(op) for op in ("attention_varlen", "rotary_qkv", "glu_mlp", "mlp")}
    read = inspect.getsource
    changed = "vitkernels.ops.attention"
    monkeypatch.setattr(inspect, "getsource", lambda module: read(module) + "#" * (module.__name__ == changed))
    alike.truth.cache_clear()
    after = {op: alike.truth(op) for op in before}
    alike.truth.cache_clear()
    assert {op for op in before if after[op] != before[op]} == {"attention_varlen", "rotary_qkv"}


def test_the_command(tmp_path: Path) -> None:
    """make emulate: a table and exit code 0 where all is well; 2 where nothing is called so."""

    def written() -> int:
        records = (ROOT / "build").glob("emulate-*.jsonl")
        return sum(each.read_text().count('"sm_90 x1 bfloat16 linear: one row"') for each in records)

    chosen = (tmp_path / "rows.json", "--quick", "--backend", "triton", "--only", "bfloat16 linear: one row")
    done = emulate(*chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_90" in done.stdout
    assert "linear" in done.stdout
    before = written()
    assert before
    again = emulate(*chosen)
    assert again.returncode == 0
    assert written() == before, "what was done is done again"
    assert emulate(tmp_path / "rows.json", "--only", "no such case").returncode == 2


@NO_COMPILER
def test_the_command_runs_cuda_cpp(tmp_path: Path) -> None:
    done = emulate(tmp_path / "rows.json", "--backend", "cuda", "--only", "sm_80 x1 float32 linear: one row")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda sm_80" in done.stdout
