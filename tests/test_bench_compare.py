"""`make compare` finds what became slower, and only that."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_without

from vitkernels import dispatch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_results import MODEL, OP, case, content, failed, row

from bench import compare, store
from bench.measure import OURS, Effort, measure
from bench.ops import OpBench, Size, of_size


def _found(base: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    return compare.regressions(content(*base), content(*new))


def test_the_same_again_is_no_regression() -> None:
    rows = [*case(OP, 1.0, eager=1.1), *case(MODEL, 2.0, timm=2.5)]
    assert _found(rows, rows) == []


def test_a_slower_case_is_named_with_its_figures() -> None:
    found = _found([*case(OP, 1.0, eager=1.1), *case(MODEL, 2.0)], [*case(OP, 1.2, eager=1.1), *case(MODEL, 2.0)])
    assert found == [
        f"{OP}: {OURS} takes 20% longer (noise 5%): 1000.000 ms -> 1200.000 ms, peers +0%",
    ]


@pytest.mark.parametrize(("now", "regressed"), [(1.04, False), (1.06, True)])
def test_less_than_five_percent_is_noise(now: float, regressed: bool) -> None:
    assert bool(_found(case(OP, 1.0, eager=1.0), case(OP, now, eager=1.0))) == regressed


@pytest.mark.parametrize(("spread", "regressed"), [(0.02, True), (0.15, False)])
def test_less_than_the_spread_is_noise(spread: float, regressed: bool) -> None:
    base, new = ([row(OP, OURS, seconds, spread=spread)] for seconds in (1.0, 1.25))
    assert bool(_found(base, new)) == regressed


def test_a_machine_that_is_slow_today_is_slow_for_all() -> None:
    assert _found(case(OP, 1.0, eager=1.0, other=2.0), case(OP, 2.0, eager=2.0, other=4.0)) == []
    found = _found(case(OP, 1.0, eager=1.0), case(OP, 1.0, eager=0.5))
    assert len(found) == 1, "as slow as before on a machine that is twice as fast"


def test_device_time_counts_where_it_was_measured() -> None:
    base, new = [row(OP, OURS, 1.0, device_seconds=0.1)], [row(OP, OURS, 1.0, device_seconds=0.2)]
    assert "100.000 ms -> 200.000 ms" in _found(base, new)[0]


def test_a_case_that_lost_its_figure_is_a_regression() -> None:
    found = _found(case(OP, 1.0), [failed(OP, OURS, "not timed, wrong: out")])
    assert found == [f"{OP}: {OURS} has no figure any more: not timed, wrong: out"]
    assert _found([failed(OP, OURS, "wrong")], case(OP, 1.0)) == []


@pytest.mark.parametrize(
    ("base", "new", "sentence"),
    [
        (content(*case(OP, 1.0)), content(*case(OP, 1.0), device="Other"), "needs one device"),
        (content(*case(OP, 1.0)), content(*case(MODEL, 1.0)), "no case in common"),
    ],
)
def test_what_cannot_be_compared(base: dict[str, Any], new: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare.regressions(base, new)


def _files(folder: Path, *contents: dict[str, Any]) -> list[str]:
    paths = [folder / f"{index}.json" for index in range(len(contents))]
    for path, each in zip(paths, contents, strict=True):
        path.write_text(json.dumps(each))
    return [str(path) for path in paths]


def test_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, other = _files(tmp_path, content(*case(OP, 1.0)), content(*case(OP, 2.0)), {"stages": {}})
    assert compare.main([good, good]) == 0
    assert compare.main([good, bad]) == 1
    assert "takes 100% longer" in capsys.readouterr().out
    assert compare.main([good, other]) == 2
    assert "needs a results file" in capsys.readouterr().err


def test_a_planted_slow_kernel_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: measured, stored, compared. The kernel sleeps 50 ms, where it takes less than one."""
    skip_without("ext")
    bench = OpBench(
        next(each for each in of_size(Size(2, 16, 32, 2)) if each.op == "linear"),
        torch.float32,
        torch.device("cpu"),
        backward=True,
    )

    def kept(name: str) -> str:
        results = store.Store(tmp_path / name, content())
        for lane, timed in measure(bench, Effort(0.0, 5, 5)).items():
            results.keep(bench.key, row(bench.key, lane, sorted(timed.samples)[2]))
        return str(results.path)

    base = kept("base.json")
    good = dispatch.OPS["linear"].implementations["ext"]

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return good.forward(*args)

    planted = dispatch.Implementation(slow, good.backward, good.why_not)
    monkeypatch.setitem(dispatch.OPS["linear"].implementations, "ext", planted)
    dispatch.backends_changed()
    new = kept("new.json")
    assert compare.main([base, new]) == 1
    assert compare.main([new, new]) == 0


def test_a_run_replaces_the_rows_of_its_cases_alone(tmp_path: Path) -> None:
    path, head = tmp_path / "results.json", content()
    first = store.Store(path, head)
    for each in (*case(OP, 1.0, eager=2.0), *case(MODEL, 3.0)):
        first.keep(store.key_of(each), each)
    second = store.Store(path, head)
    second.keep(OP, row(OP, OURS, 4.0))
    assert [(each["name"], each["lane"], each["seconds"]) for each in store.read(path)["rows"]] == [
        ("vit_small_patch16", OURS, 3.0),
        ("mlp", OURS, 4.0),
    ]
    other = store.Store(path, {**head, "versions": {"torch": "3.0"}})
    other.keep(OP, row(OP, OURS, 5.0))
    assert len(store.read(path)["rows"]) == 1, "figures of two versions do not stand in one table"


def _kept(path: Path, *rows: dict[str, Any], revision: str = "abc") -> list[dict[str, Any]]:
    """What a file holds after one more run."""
    results = store.Store(path, content())
    for each in rows:
        results.keep(store.key_of(each), {**each, "revision": revision})
    return store.read(path)["rows"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("gains", [(1.5, 1.2), (1.2, 1.5)])
def test_runs_of_a_model_are_kept_apart_and_the_lower_ratio_is_read(tmp_path: Path, gains: tuple[float, float]) -> None:
    path = tmp_path / "results.json"
    for gain in gains:
        rows = _kept(path, *case(OP, gain), *case(MODEL, 2.0, timm=2.0 * gain))
    models = [(each["run"], each["lane"], each["seconds"]) for each in rows if each["kind"] == "model"]
    lines = [[(run, OURS, 2.0), (run, "timm", 2.0 * gain)] for run, gain in enumerate(gains, 1)]
    assert models == lines[0] + lines[1]
    lanes = store.by_case(rows)[MODEL]
    assert lanes[OURS]["run"] == lanes["timm"]["run"] == 1 + gains.index(1.2), "figures of two runs are not divided"
    assert lanes["timm"]["seconds"] == pytest.approx(2.4)
    assert [each["seconds"] for each in rows if each["kind"] == "op"] == [gains[1]]


@pytest.mark.parametrize(("before", "now"), [("abc", "abd"), ("abc-dirty", "abc-dirty"), ("", "")])
def test_a_run_of_other_code_takes_the_place_of_the_earlier_one(tmp_path: Path, before: str, now: str) -> None:
    path = tmp_path / "results.json"
    _kept(path, *case(MODEL, 1.0, timm=1.1), revision=before)
    rows = _kept(path, *case(MODEL, 2.0, timm=3.0), revision=now)
    assert [(each["run"], each["seconds"]) for each in rows] == [(1, 2.0), (1, 3.0)]


def test_a_run_in_which_ours_failed_is_not_hidden_by_another(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    _kept(path, *case(MODEL, 1.0, timm=1.1))
    rows = _kept(path, failed(MODEL, OURS, "wrong"), row(MODEL, "timm", 1.0))
    assert store.by_case(rows)[MODEL][OURS]["failed"] == "wrong"
    rows = _kept(path, row(MODEL, OURS, 1.0))  # stopped before timm's turn
    assert len(store.runs(rows)[MODEL]) == 3
    assert store.by_case(rows)[MODEL][OURS]["failed"] == "wrong"


def test_files_of_several_runs_are_compared_by_what_the_report_shows(tmp_path: Path) -> None:
    base, new = tmp_path / "base.json", tmp_path / "new.json"
    for gain in (1.5, 1.2):
        _kept(base, *case(MODEL, 1.0, timm=gain))
        _kept(new, *case(MODEL, 1.3, timm=gain), revision="abd")
    assert compare.main([str(base), str(base)]) == 0
    assert compare.main([str(base), str(new)]) == 1
