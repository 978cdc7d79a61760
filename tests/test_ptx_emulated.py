"""Rows of bench/results/emulated.json: run once, held while their trials launch the same, and never past a finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitkernels import kernels

pytest.importorskip("triton", reason="the machine executes what triton compiles")
if kernels.interpreting():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from case import Case
from ptx import alike, driver, emulate, rows, store  # needs triton
from ptx.rows import Row, Rows
from ptx.trials import BF16, Trial, named
from triton import knobs

from vitkernels.kernels import mlp_kernels, rotary

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import emulated

ROTARY, LINEAR = named("rotary: prefix 1, pairs") + named("linear: one row")
TRIALS = [Trial(ROTARY, BF16), Trial(LINEAR, BF16), Trial(LINEAR, BF16, processors=132)]
SPARE = ".address_size 64\n.global .align 4 .b8 spare[4];"  # a text that differs, and computes the same


class Here:
    """A pool of processes that is this one: it sees what a test has changed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class Checkout:
    """A repository of a few trials, and what was compiled and executed there since last asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.file, self.patch = folder, folder / "emulated.json", monkeypatch
        self.compiled: list[str] = []
        self.executed: list[str] = []
        tell, attempt = alike.digest, emulate.attempt

        def digest(trial: Trial) -> str:
            self.compiled.append(str(trial))
            return tell(trial)

        def executing(trial: Trial) -> Any:
            self.executed.append(str(trial))
            return attempt(trial)

        monkeypatch.setattr(alike, "digest", digest)
        monkeypatch.setattr(emulate, "attempt", executing)
        monkeypatch.setattr(emulate, "everything", lambda backend: TRIALS)
        monkeypatch.setattr(emulate, "ProcessPoolExecutor", Here)
        monkeypatch.setattr(store, "ROOT", folder)
        (folder / "build").mkdir()

    def emulate(self, *arguments: str, fresh_checkout: bool = True) -> tuple[int, list[str], list[str]]:
        """The exit code of the command, and which trials it executed and compiled."""
        if fresh_checkout:
            for path in self.outcomes():
                path.unlink()
        self.compiled.clear()
        self.executed.clear()
        options = ("--backend", "triton", "--no-faults", "--results", str(self.file))
        code = emulate.main([*options, *arguments])
        return code, list(self.executed), list(self.compiled)

    def outcomes(self) -> list[Path]:
        return list((self.folder / "build").glob("emulate-*.jsonl"))

    def rows(self) -> dict[str, Row]:
        return {row.op: row for row in Rows.read(self.file).rows}

    def edited(self, text: str = "edited") -> None:
        """Let sources be others, whatever compiles of them."""
        self.patch.setattr(alike, "sources", lambda trial: f"{text} {trial}")

    def plant(self, old: str, new: str, kernel: str = "rotary") -> None:
        """Let a kernel's compiled text be another."""
        call = driver.Call

        def planted(ptx: str, name: str, *rest: Any) -> Any:
            if kernel in name:
                assert old in ptx
                ptx = ptx.replace(old, new)
            return call(ptx, name, *rest)

        self.patch.setattr(driver, "Call", planted)


def known(found: dict[str, Row]) -> dict[str, Row]:
    """Rows, whatever their sources."""
    return {op: replace(row, sources="") for op, row in found.items()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    """One in which everything ran, and passed."""
    emulate._trials.cache_clear()
    made = Checkout(tmp_path, monkeypatch)
    code, executed, _ = made.emulate()
    assert code == 0
    assert executed == [str(trial) for trial in TRIALS[:2]]  # the third is like the second
    yield made
    emulate._trials.cache_clear()


def test_what_is_written(checkout: Checkout) -> None:
    found = checkout.rows()
    assert found["rotary"].place == ("sm_90", "rotary", "bfloat16", "cases")
    assert [(row.trials, row.launches, row.failed) for row in found.values()] == [(2, 1, 0), (1, 2, 0)]
    assert all(row.passed for row in found.values())
    assert Rows.read(checkout.file).trials == {store.compiler("triton"): 3}
    outcomes = checkout.outcomes()[0]
    expected = checkout.file.read_text()
    checkout.file.unlink()
    assert emulate.main(["--record", str(outcomes), "--results", str(checkout.file)]) == 0
    assert checkout.file.read_text() == expected


def test_a_row_of_the_same_sources_is_neither_compiled_nor_run(checkout: Checkout) -> None:
    before = checkout.file.read_text()
    assert checkout.emulate() == (0, [], [])
    assert checkout.file.read_text() == before


def test_make_test_runs_what_was_not_executed(checkout: Checkout) -> None:
    """A few trials stand for a row of the same sources; no row, or other sources, and the whole sample runs."""
    place = store.place_of(TRIALS[0])
    checkout.patch.setattr(store, "everything", lambda backend: TRIALS)

    def is_executed(path: Path) -> bool:
        store._trials_of.cache_clear()
        store.is_executed.cache_clear()
        found = store.is_executed(place, "triton", path)
        store._trials_of.cache_clear()
        return found

    assert is_executed(checkout.file)
    assert not is_executed(checkout.folder / "none.json")
    written = Rows.read(checkout.file)
    written.rows = [replace(row, failed=1) for row in written.rows]
    written.write(checkout.folder / "failed.json")
    assert not is_executed(checkout.folder / "failed.json")
    checkout.edited()
    assert not is_executed(checkout.file)


def test_a_row_of_the_same_launches_is_compiled_and_not_run(checkout: Checkout) -> None:
    before = checkout.rows()
    checkout.edited()
    assert checkout.emulate() == (0, [], list(map(str, TRIALS)))
    assert known(checkout.rows()) == known(before)
    assert all(row.sources != before[op].sources for op, row in checkout.rows().items())
    # what was compiled to know it is not compiled again, nor taken for run once the row is gone
    checkout.edited("edited again")
    assert checkout.emulate(fresh_checkout=False) == (0, [], [])
    checkout.file.unlink()
    assert checkout.emulate(fresh_checkout=False)[:2] == (0, list(map(str, TRIALS[:2])))
    assert known(checkout.rows()) == known(before)


def test_other_kernels_are_run(checkout: Checkout) -> None:
    before = checkout.rows()
    checkout.edited()
    checkout.plant(".address_size 64", SPARE)
    assert checkout.emulate()[:2] == (0, [str(TRIALS[0])])
    after = checkout.rows()
    assert after["linear"].digest == before["linear"].digest
    assert after["rotary"].digest not in ("", before["rotary"].digest)
    assert after["rotary"].passed


@pytest.mark.parametrize(("module", "name"), [(rows, "machine"), (alike, "truth")])
def test_another_machine_or_reference_runs_all(checkout: Checkout, module: Any, name: str) -> None:
    checkout.edited()
    checkout.patch.setattr(module, name, lambda *op: "0123456789abcdef")
    assert checkout.emulate()[:2] == (0, list(map(str, TRIALS[:2])))


def test_another_compiler_runs_all(checkout: Checkout) -> None:
    before = checkout.rows()
    monkeypatched = "triton-0.0.0"
    checkout.patch.setattr(emulate, "compiler", lambda backend: monkeypatched)
    assert checkout.emulate()[:2] == (0, list(map(str, TRIALS[:2])))
    found = Rows.read(checkout.file)
    assert {row.op: row for row in found.rows if row.compiler != monkeypatched} == before
    assert len(found.of(monkeypatched)) == 2


def test_fresh_runs_all(checkout: Checkout) -> None:
    assert checkout.emulate("--fresh")[:2] == (0, list(map(str, TRIALS[:2])))


def test_a_finding_is_not_hidden(checkout: Checkout) -> None:
    """Neither by the row that passed, nor by one that is written of it, nor by trials that were not asked for."""
    passed = checkout.rows()
    checkout.edited()
    with pytest.MonkeyPatch.context() as patch:
        checkout.patch, own = patch, checkout.patch
        checkout.plant("mul.f32", "add.f32")
        assert checkout.emulate()[:2] == (1, [str(TRIALS[0])])
        assert (checkout.rows()["rotary"].failed, checkout.rows()["rotary"].passed) == (1, False)
        assert known(checkout.rows())["linear"] == known(passed)["linear"]
        assert checkout.emulate()[:2] == (1, [str(TRIALS[0])])  # the same sources, digest and all
        assert checkout.emulate(fresh_checkout=False)[:2] == (1, [])
        checkout.patch = own
    assert checkout.emulate()[:2] == (0, [str(TRIALS[0])])
    assert known(checkout.rows()) == known(passed)


def test_a_finding_of_a_part_voids_the_row(checkout: Checkout) -> None:
    checkout.plant("add", "sub", "column_sum")
    assert checkout.emulate("--fresh", "--only", str(TRIALS[2]))[:2] == (1, [str(TRIALS[2])])
    row = checkout.rows()["linear"]
    assert (row.trials, row.failed, row.digest) == (1, 1, "")
    assert "**1 with a finding**" in emulated.sentence(Rows.read(checkout.file))


def test_a_known_finding_comes_before_a_row(checkout: Checkout) -> None:
    """Outcomes under build/ may say what the file of another checkout does not."""
    (path,) = checkout.outcomes()
    lines = list(map(json.loads, path.read_text().splitlines()))
    wrong = [line | {"faults": ["a race"]} if "faults" in line else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in wrong))
    assert checkout.emulate(fresh_checkout=False)[0] == 1
    assert [row.failed for row in checkout.rows().values()] == [2, 1]


def test_a_run_that_is_stopped_leaves_the_rows_that_are_whole(checkout: Checkout) -> None:
    """They are run one after the other, whatever the order of the cases."""
    checkout.file.unlink()
    checkout.patch.setattr(emulate, "everything", lambda backend: [TRIALS[1], TRIALS[0], TRIALS[2]])
    emulate._trials.cache_clear()
    executing = emulate.attempt

    def stopped(trial: Trial) -> Any:
        if trial == TRIALS[0]:
            raise RuntimeError("stopped")
        return executing(trial)

    checkout.patch.setattr(emulate, "attempt", stopped)
    checkout.patch.setattr(emulate, "WORKERS", 0)  # one job after the other
    with pytest.raises(RuntimeError, match="stopped"):
        checkout.emulate()
    assert checkout.executed == [str(TRIALS[1])]
    assert list(checkout.rows()) == ["linear"]
    checkout.patch.setattr(emulate, "attempt", executing)
    assert checkout.emulate(fresh_checkout=False)[:2] == (0, [str(TRIALS[0])])
    assert sorted(checkout.rows()) == ["linear", "rotary"]


def test_parts_of_a_row_are_not_written(checkout: Checkout) -> None:
    checkout.file.unlink()
    assert checkout.emulate("--only", str(TRIALS[1]))[:2] == (0, [str(TRIALS[1])])
    assert not checkout.file.exists()
    assert checkout.emulate("--only", "linear", fresh_checkout=False)[:2] == (0, [])
    assert list(checkout.rows()) == ["linear"]


def test_record_takes_outcomes_of_these_kernels_alone(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = checkout.outcomes()
    other = path.rename(path.with_name("emulate-triton-0.0.0-0123456789abcdef.jsonl"))
    before = checkout.file.read_text()
    command = ("--results", str(checkout.file), "--record")
    assert emulate.main([*command, str(other)]) == 2
    assert "needs triton-0.0.0, to see what it is of; here is triton-" in capsys.readouterr().out
    other = other.rename(path.with_name(f"emulate-{store.compiler('triton')}-0123456789abcdef.jsonl"))
    assert emulate.main([*command, str(other)]) == 2
    assert "another machine" in capsys.readouterr().out
    assert emulate.main([*command, str(path)]) == 2
    assert "needs a file of build/" in capsys.readouterr().out
    other.rename(path)
    monkeypatch.setattr(emulate, "digest", lambda patterns: "others")
    assert emulate.main([*command, str(path)]) == 2
    assert "other kernels or cases" in capsys.readouterr().out
    assert checkout.file.read_text() == before


def test_which_files_are_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)

    def told(path: str) -> str:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
        return rows.kernels("triton")

    empty = told("README.md")
    kernel = told("vitkernels/kernels/configs/mlp.py")
    assert kernel != empty
    others = (
        "tests/cases.py",
        "vitkernels/ops/mlp.py",
        "tests/ptx/emulate.py",
        "tests/ptx/rows.py",
        "tests/ptx/store.py",
    )
    assert set(map(told, others)) == {kernel}
    assert told("tests/ptx/warp.py") != kernel  # of the machine


def test_sources_are_told_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what compiling looks at: kernels, the kinds of arguments, constants, the GPU; and how numbers are drawn."""

    def compiles(**launch: Any) -> bool:
        raise AssertionError(f"compiles {launch}")

    def told(case: Case, capability: tuple[int, int] = (9, 0), processors: int = 1) -> str:
        return alike.sources(Trial(case, BF16, capability, processors))

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", compiles)
    norm, product = named("add_layer_norm: 197 tokens", "mlp: gelu, blocked gemm")
    columns, odd = named("attention: strides, 16 bits, q channels_last", "attention: strides, 16 bits, q offset")
    found = [
        told(norm),
        told(norm, (8, 0)),
        told(norm, processors=132),
        told(product),
        told(product, (8, 0)),
        told(ROTARY),
    ]
    assert "" not in found
    assert len(set(found)) == len(found)
    assert [told(norm), told(product)] == [found[0], found[3]]
    assert told(columns) != told(odd)
    monkeypatch.setattr(mlp_kernels.mlp_forward, "hash", "of another text")
    assert told(product) not in found
    assert told(norm) == found[0]


def test_a_kernel_whose_text_changes_and_compiles_to_the_same_is_not_run(checkout: Checkout) -> None:
    checkout.patch.setattr(rotary.rotary_kernel, "hash", "of another text")
    assert checkout.emulate() == (0, [], [str(TRIALS[0])])
    assert checkout.emulate() == (0, [], [])


def test_the_sentence(checkout: Checkout) -> None:
    """Counted from the file; rows of other kernels are called so."""
    found, name = Rows.read(checkout.file), store.compiler("triton").replace("-", " ")
    assert emulated.sentence(found).endswith(
        f"of Triton's kernels 3 of 3 trials as {name} compiles them (3 launches, no finding, of the kernels as they"
        " are); of CUDA C++ none is recorded.\n"
    )
    found.rows = [replace(row, kernels="others") if row.op == "linear" else row for row in found.rows]
    assert "no finding, 2 of them before the last change of kernels or machine)" in emulated.sentence(found)
    found.rows = [replace(row, kernels="others") for row in found.rows]
    assert "no finding, all of them before the last change of kernels or machine)" in emulated.sentence(found)
    assert "of Triton's kernels none is recorded" in emulated.sentence(Rows())
