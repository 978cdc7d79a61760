"""bench.coverage: what is counted of timm and transformers, and how the count is told."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import peers
import pytest
import torch

import vitkernels as vk
from bench import coverage, towers
from vitkernels.fuse import rules, unserved

peers.import_timm()
_OWN = "attn is OutlookAttention, its own: its weights come from one token each"


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("timm", "vit_tiny_patch16_224", ("whole", "")),
        ("timm", "resnet18", ("none", coverage.NO_BLOCKS)),
        ("timm", "swin_tiny_patch4_window7_224", ("whole", "")),
        ("timm", "samvit_base_patch16_224", ("whole", "")),
        ("timm", "volo_d1_224", ("around", _OWN)),
        ("transformers", "swin", ("whole", "")),
        ("transformers", "vitdet", ("whole", "")),
    ],
)
def test_models_are_judged(library: str, name: str, expected: tuple[str, str]) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    assert coverage.outcome(library, name) == expected


@pytest.mark.parametrize("name", unserved.REASONS)
def test_what_is_said_of_a_class_is_said_of_one_that_there_is(name: str) -> None:
    pytest.importorskip(name.partition(".")[0], reason=f"{name.partition('.')[0]} is not installed")
    file, _, cls = name.rpartition(".")
    kind = getattr(importlib.import_module(file), cls)
    assert "forward" in vars(kind)
    assert not any(name in rule.owners for rule in rules.all_rules() if rule.mixin.is_block)


def test_a_block_without_a_rule_says_what_is_different_and_what_can_be_done() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        explanation = vk.explain(towers.build("lfm3_vl"))
    assert {*explanation.unfused.values()} == {
        "Lfm3VlVisionLayer is a gated convolution in some places; vk.register_attention() offers its attention alone"
    }


def test_one_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("\nneeds natten. Install it:")

    monkeypatch.setitem(coverage.BUILD, "transformers", missing)
    assert coverage.judged("transformers", "dinat") == {"outcome": "failed", "reason": "ImportError: needs natten"}


def test_every_tower_is_there() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for name in towers.TOWERS:
        package, _, file = name.partition(".")
        folder = Path(importlib.import_module("transformers").__file__).parent / "models" / package
        text = (folder / f"modeling_{file or package}.py").read_text()
        assert f"class {towers.TOWERS[name]}(" in text


def test_a_count_is_told_with_its_reasons() -> None:
    models = [("whole", ""), ("around", "windows"), ("none", "no rule for A"), ("none", coverage.NO_BLOCKS)]
    content = {
        "transformers": "5.23",
        "models": {str(index): {"outcome": kind, "reason": why} for index, (kind, why) in enumerate(models)},
    }
    told = coverage.table(content)
    assert told.startswith(
        "Of the 4 vision towers of transformers 5.23, `vk.fuse` fuses every block of 1; of 1 more, every block but for "
        "its attention. 1 have no Transformer block"
    )
    assert "| no rule for A | 1 |" in told
    assert told.endswith("- Whole: 0.\n- Around their own attention: 1.\n- None of their blocks: 2.\n")
    assert "windows" not in told
    assert "| others" not in told


def test_models_are_listed_by_family() -> None:
    names = {"vit_base": "whole", "vit_tiny": "whole", "swin_tiny": "around", "xcit_nano": "none"}
    models = {name: {"outcome": kind, "reason": ""} for name, kind in names.items()}
    told = coverage.table({"timm": "1.0", "models": models})
    assert "- Whole: vit (2).\n- Around their own attention: swin.\n- None of their blocks: xcit.\n" in told


def test_the_files_are_those_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "names", lambda library: ["a"])
    monkeypatch.setattr(coverage, "outcome", lambda library, name: ("whole", ""))
    monkeypatch.setattr(coverage, "RESULTS", {"timm": tmp_path / "timm-coverage.json"})
    coverage.main(["timm"])
    content = json.loads((tmp_path / "timm-coverage.json").read_text())
    assert content["models"] == {"a": {"outcome": "whole", "reason": ""}}
    report = importlib.import_module("bench.report")
    assert "fuses every block of 1." in report.BLOCKS["coverage"](report.Results.read(tmp_path))
