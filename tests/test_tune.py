"""`make tune` without a GPU: what could stand in a row is listed, compiled, judged and printed."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("tuning compiles with triton, which is not installed", allow_module_level=True)

import triton

from bench import audit, machine, tune, warm
from bench.slots import Slot, slots, source
from vitkernels import dispatch
from vitkernels.kernels import LOWEST_CAPABILITY, configs, interpreting

NORM = "add_layer_norm forward, bf16 residual, 50432x384"
SHORT = "attention short forward N=197 K=64 bf16"

if interpreting():
    pytest.skip("TRITON_INTERPRET is set: interpreted kernels do not compile", allow_module_level=True)


def slot(row: str) -> Slot:
    return next(each for each in slots((9, 0)) if each.row == row)


@pytest.mark.parametrize("capability", [each for each in audit.CHIPS if divmod(each, 10) >= LOWEST_CAPABILITY])
def test_every_slot_is_a_row_of_the_audit_and_takes_another_tile(capability: int) -> None:
    for each in slots(divmod(capability, 10)):
        now, *others = each.tiles
        assert others, each.row
        assert len(set(each.tiles)) == len(each.tiles)
        stands, instead = tune.variant(each, now, capability), tune.variant(each, others[-1], capability)
        launch = [(v.constants, v.num_warps, v.num_stages, v.maxnreg) for v in (stands, instead)]
        assert launch[0] != launch[1] or "programs" in source(others[-1]), each.row


def test_the_first_tile_is_the_one_that_stands_there() -> None:
    for each in slots((9, 0)):
        page = importlib.import_module(f"vitkernels.kernels.{each.page}")
        there = next(variant for variant in page.variants((9, 0)) if variant.name == each.row)
        assert there.constants == tune.variant(each, each.tiles[0], 90).constants, each.row


def test_a_tile_is_put_in_its_row_and_taken_out_again() -> None:
    tile = slot(NORM).tiles[-1]
    before = configs.LAYER_NORM_FORWARD.rows
    with slot(NORM).put(tile):
        assert configs.LAYER_NORM_FORWARD.pick((9, 0), width=384) is tile
    assert configs.LAYER_NORM_FORWARD.rows is before


def test_a_row_leaves_the_others_of_its_table() -> None:
    each = slot("rotary forward, halves, bf16, 256x197x12x128")
    tile = each.tiles[-1]
    narrow, _, wide = configs.ROTARY.rows
    with each.put(tile):
        stands = configs.ROTARY.rows
    assert (stands[0], stands[1].tile, stands[2]) == (narrow, tile, wide)


@pytest.mark.parametrize(
    "tile",
    [
        configs.AttentionTile(64, 0, 4, 1, maxnreg=168),
        configs.RowTile(warps=1, rows=4),
        configs.ProductTile(128, 256, 64, warps=8, stages=4, pieces=4, tma=True),
        configs.PatchEmbedTile(128, 128, 64, 8, 3),
        configs.RotaryTile(tokens=16, heads=12, warps=2),
    ],
)
def test_a_row_can_be_pasted(tile: object) -> None:
    assert eval(source(tile), vars(configs)) == tile


def test_a_call_finds_what_was_compiled_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is compiled once: the call with real tensors adds nothing to what the one without them left."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    each = slot(NORM)

    def compiled(*arguments: object) -> list[Path]:
        reading = warm.read(lambda: tune._launcher(each)(*arguments), "add_layer_norm_forward", 90, 132)
        assert reading.registers > 0
        return sorted(tmp_path.rglob("*.cubin"))

    arguments = each.arguments(None)
    real = [torch.zeros_like(a, device="cpu") if isinstance(a, torch.Tensor) else a for a in arguments]
    before = compiled(*arguments)
    assert len(before) == 1
    assert compiled(*real) == before
    shorter = [a[:3] if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in real]
    assert len(compiled(*shorter)) == 2, "a number of rows that 16 does not divide is another kernel"


def test_a_call_without_the_kernel_is_an_error() -> None:
    each = slot(NORM)
    with pytest.raises(KeyError, match="no_such_kernel"):
        warm.read(lambda: tune._launcher(each)(*each.arguments(None)), "no_such_kernel", 90, 132)


def _candidate(tile: configs.AttentionTile, seconds: float | None, dropped: str = "") -> tune.Candidate:
    each = slot(SHORT)
    row = audit.Row(tune.variant(each, tile, 90), 90, None, "")
    return tune.Candidate(tile, row, dropped, [] if seconds is None else [seconds, seconds, 1.0])


def test_the_report_puts_the_fastest_first() -> None:
    tiles = [configs.AttentionTile(queries, 0, 4, 1) for queries in (64, 128, 32)]
    found = [_candidate(tiles[0], 200e-6), _candidate(tiles[1], 100e-6), _candidate(tiles[2], None, "spills 8 bytes")]
    each = slot(SHORT)
    assert tune.report(each, found, False) == [
        f"# {SHORT}: attention_qkv forward",
        "AttentionTile(queries=128, keys=0, warps=4, stages=1),  # 100.0 us, 2.00 x",
        "AttentionTile(queries=64, keys=0, warps=4, stages=1),  # 200.0 us, 1.00 x  (as it is)",
        "#   1 of 3 dropped; first: spills 8 bytes",
    ]
    assert [row.get("microseconds") for row in tune.record(each, found)["candidates"]] == [200.0, 100.0, None]


def test_errors_are_seen() -> None:
    wanted = [torch.ones(8), torch.ones(3)]
    assert tune._error([torch.ones(8), torch.ones(3)], wanted) == 0
    assert tune._error([torch.ones(8), 1.5 * torch.ones(3)], wanted) == pytest.approx(0.5)
    assert not tune._error([torch.full((8,), torch.nan), torch.ones(3)], wanted) <= tune.WRONG


@pytest.mark.parametrize(
    ("seconds", "timed"), [(60.0, [True, False, False, True]), (-1.0, [True, False, False, False])]
)
def test_only_right_results_are_timed(seconds: float, timed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that gives wrong results, one that fails, and two that are right, on a backend that stands in for ours."""
    tiles = tuple(configs.RowTile(warps=warps, rows=4) for warps in (1, 2, 4, 8))
    each = replace(slot(NORM), op="linear", tiles=tiles, arguments=lambda seed: (torch.full((4,), seed + 1.0),))

    def forward(x: torch.Tensor) -> torch.Tensor:
        warps = configs.LAYER_NORM_FORWARD.pick((9, 0), width=384).warps
        if warps == 4:
            raise RuntimeError("out of\nshared memory")
        return x * 3 if warps == 2 else x * 2

    stands_in = dispatch.Implementation(forward, forward, lambda *call: None)
    truth = dispatch.Implementation(lambda x: x * 2, lambda x: x * 2, lambda *call: None)
    monkeypatch.setattr(dispatch.OPS["linear"], "implementations", {"triton": stands_in, "reference": truth})
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 24)
    monkeypatch.setattr(machine, "device_seconds", lambda step, sets, repeats: 1e-6 * len([step(x) for x in sets]))
    found = [tune.Candidate(tile, audit.Row(tune.variant(slot(NORM), tile, 90), 90, None, "")) for tile in tiles]
    tune.measure(each, found, time.monotonic() + seconds)
    assert [bool(candidate.samples) for candidate in found] == timed
    assert found[0].microseconds == 3, "three sets of 16 bytes are twice a cache of 24"
    if seconds > 0:
        assert found[1].dropped == "wrong: off by 0.5 of the reference"
        assert found[2].dropped == "RuntimeError: out of shared memory"
    else:
        assert {candidate.dropped for candidate in found[1:]} == {"not tried: no time left"}


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tile that fits and one that the compiler cannot hold in registers."""
    good, crowded = (configs.AttentionTile(64, 0, 4, 1, maxnreg=maxnreg) for maxnreg in (None, 128))
    monkeypatch.setattr(tune, "slots", lambda capability: [replace(slot(SHORT), tiles=(good, crowded))])
    path = tmp_path / "tune.json"
    assert tune.main(["--dry-run", "--json", str(path)]) == 0
    heading, fits, dropped = capsys.readouterr().out.splitlines()
    assert heading == f"# {SHORT}: attention_qkv forward"
    assert fits.startswith("AttentionTile(queries=64, keys=0, warps=4, stages=1),  # ")
    assert fits.endswith("0 spilled, 72 KiB, 2 per SM, at least 103 us")
    assert dropped.startswith("#   AttentionTile(queries=64, keys=0, warps=4, stages=1, maxnreg=128): does not compile")
    (record,) = json.loads(path.read_text())
    assert [bool(candidate["dropped"]) for candidate in record["candidates"]] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "interpret", "sentence"),
    [
        ([], "0", "make tune: torch sees no CUDA device; needs an NVIDIA GPU, or --dry-run"),
        (["--dry-run", "--shapes", "no such row"], "0", "nothing to tune with 'no such row' in its name in any page"),
        (["--dry-run"], "1", "TRITON_INTERPRET is set; needs to be unset"),
        (["--dry-run", "--capability", "70"], "0", "invalid choice: 70"),
    ],
)
def test_bad_input(
    arguments: list[str], interpret: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code: object = tune.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert sentence in capsys.readouterr().err
