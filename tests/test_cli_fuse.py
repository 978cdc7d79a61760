"""`python -m vitkernels verify` and `bench`, on the smallest model of each library."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from vitkernels import libraries, models, speed
from vitkernels.cli import main
from vitkernels.fuse.swap import Fused
from vitkernels.residual import stream

peers.import_timm()

CPU = torch.device("cpu")
SMALL = ["timm:test_vit", "--image-size", "32", "--batch", "2", "--device", "cpu"]
HF = {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A folder with the config.json of a small model."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps({**HF, "image_size": 64, "patch_size": 8}))
    return str(tmp_path)


# ------------------------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize("words", [[], ["--amp", "bf16"], ["--train", "--seed", "3"]])
def test_verify(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *SMALL, *words]) == 0
    shown = capsys.readouterr().out
    assert "6 of 6 blocks fused\n" in shown
    assert "x attention_qkv (" in shown
    assert "gradient of blocks." in shown
    assert shown.splitlines()[-1].startswith("ok: ")


def test_verify_says_what_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = stream._waiting
    monkeypatch.setattr(
        stream, "_waiting", lambda x, step, out, *rest, **more: waiting(x, step, out * 1.01, *rest, **more)
    )
    assert main(["verify", *SMALL]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert shown.splitlines()[-1].startswith("FAILED: ")


def test_verify_of_what_cannot_be_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "timm:test_resnet", "--image-size", "32", "--batch", "2", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "note: nothing to fuse in this ResNet; needs " in shown
    assert shown.splitlines()[-1].startswith("FAILED: nothing was verified: ")


def test_verify_of_images_that_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw = models.Named.images
    monkeypatch.setattr(models.Named, "images", lambda named, batch: draw(named, batch) * torch.nan)
    assert main(["verify", *SMALL]) == 1
    assert "FAILED: nothing was verified: no output holds a finite number" in capsys.readouterr().out


def test_verify_by_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"transformers:{config}", "--image-size", "32", "--batch", "2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 blocks fused\n" in shown
    assert shown.splitlines()[-1].startswith("ok: ")


# ------------------------------------------------------------------------------------------------------------- bench


def _lanes(path: Path) -> dict[str, dict[str, Any]]:
    return {lane["name"]: lane for lane in json.loads(path.read_text())["lanes"]}


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []

    def spy(module: nn.Module) -> nn.Module:
        compiled.append(any(isinstance(each, Fused) for each in module.modules()))
        return module

    monkeypatch.setattr(torch, "compile", spy)
    assert (
        main(["bench", *SMALL, "--amp", "bf16", "--compile", "--rounds", "3", "--json", f"{tmp_path}/speed.json"]) == 0
    )
    lanes = _lanes(tmp_path / "speed.json")
    assert compiled == [False, True]
    assert list(lanes) == ["stock", "fused", "stock + torch.compile", "fused + torch.compile"]
    for name, lane in lanes.items():
        assert lane["failed"] is None
        assert len(lane["seconds"]) == 3
        middle, low, high = lane["images_per_second"]
        assert 0 < low <= middle <= high
        assert bool(lane["backends"]) == name.startswith("fused")
    assert lanes["stock"]["ratio"] == 1.0
    shown = capsys.readouterr()
    for name in lanes:
        assert f"\n{name} " in shown.out
        assert f"vitkernels: warming up {name}\n" in shown.err
    assert "forward, cross-entropy of output, backward and AdamW(fused=True), in bfloat16 autocast" in shown.out


def test_rounds_that_disagree_are_said() -> None:
    even, odd = speed.Lane("stock", [1.0, 1.01, 0.99, 1.0]), speed.Lane("fused", [0.5, 0.9, 0.5, 0.8])
    assert "disagree" not in str(speed.Speed("it", 4, "", "", [even]))
    assert "the rounds of fused disagree" in str(speed.Speed("it", 4, "", "", [even, odd]))


def test_a_variant_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: nn.Module) -> nn.Module:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(speed, "fuse", fail)
    assert main(["bench", *SMALL, "--rounds", "1", "--json", f"{tmp_path}/speed.json"]) == 0
    lanes = _lanes(tmp_path / "speed.json")
    assert lanes["fused"]["failed"] == "RuntimeError: no such luck"
    assert lanes["fused"]["ratio"] is None
    assert lanes["fused"]["images_per_second"] == []
    assert len(lanes["stock"]["seconds"]) == 1
    assert "fused failed: RuntimeError: no such luck" in capsys.readouterr().out


def test_a_variant_that_fails_later_has_no_figures() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 4:
                raise RuntimeError("worn out")
            return super().forward(x.flatten(1))

    found = speed.measure(models.Named("it", Fails(12, 3), (3, 2, 2)), 2, CPU, rounds=3)
    stock, fused = found.lanes
    assert (stock.seconds, stock.failed) == ([], "RuntimeError: worn out")
    assert fused.failed is not None
    assert fused.failed.startswith("ValueError: fuse: nothing to fuse in this Fails")


def test_our_own_models_are_compared_with_their_naive_counterparts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(models.create_model, depth=1, num_classes=3)
    monkeypatch.setattr(models, "create_model", small)
    found = speed.measure(models.build("vitkernels:vit_tiny", 32), 2, CPU, rounds=1)
    assert [(lane.name, bool(lane.backends), lane.failed) for lane in found.lanes] == [
        ("stock", False, None),
        ("fused", True, None),
    ]


def test_rounds_run_there_and_back() -> None:
    ran: list[str] = []
    seconds = speed.interleave({name: functools.partial(ran.append, name) for name in "ab"}, 3, CPU)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_steps_of_one_round() -> None:
    """The machine slows down to a tenth in the second half; the ratio does not see it."""
    stock, fused = [1.0, 1.0, 10.0, 10.0, 10.0], [0.5, 0.5, 5.0, 5.0, 5.0]
    found = speed.Speed("it", 4, "", "", [speed.Lane("stock", stock), speed.Lane("fused", fused)])
    assert found.ratio(found.lanes[1]) == 2.0
    assert found.images_per_second(found.lanes[1])[0] == 4 / 5.0


def test_peak_memory_is_that_of_the_step() -> None:
    size = 2**26
    held = torch.ones(size, dtype=torch.uint8)
    found = speed.peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if found is None:
        pytest.skip("the system does not tell a process's high-water mark")
    assert 0.98 * size < found < 1.5 * size, "a page more or less"
    assert held[0] == 1


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit.r160_in1k", "vitkernels:vit_tiny_patch16"])
def test_images_fit_their_models(name: str) -> None:
    named = models.build(name, 32)
    assert named.image == (3, 32, 32)
    assert named.module.training
    assert named.module(named.images(2)).shape == (2, 1000)


def test_no_weight_stays_at_its_start() -> None:
    module = models.build("timm:test_vit").module
    assert all(parameter.std() > 0 for parameter in module.parameters() if parameter.numel() > 1)


def test_a_folder_with_a_config(config: str) -> None:
    named = models.build(f"transformers:{config}")
    assert named.image == (3, 64, 64)
    assert named.module(named.images(1)).logits.shape == (1, 2)


def test_nothing_asks_the_network(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*arguments: Any) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("timm:test_vit.r160_in1k", f"transformers:{config}"):
        models.build(name)
    with pytest.raises(ValueError, match="needs a name that transformers knows"):
        models.build("transformers:google/vit-base-patch16-224")


def test_a_torchvision_that_loads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = list(libraries._declared)
    assert libraries.import_torchvision().__name__ == "torchvision"
    assert libraries._declared == declared


# ---------------------------------------------------------------------------------------------------------- bad input


def _missing(library: str) -> Callable[[pytest.MonkeyPatch], None]:
    find = libraries.importlib.util.find_spec
    return lambda patch: patch.setattr(
        libraries.importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )


BAD: dict[str, tuple[list[str], str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no preset": (
        ["vit_smal"],
        "argument MODEL got 'vit_smal'; needs a preset or a name that timm knows, such as vit_small",
        lambda patch: None,
    ),
    "another library": (
        ["keras:vit"],
        "with a library of timm, transformers, torchvision, vitkernels",
        lambda patch: None,
    ),
    "a name of none": (
        ["timm:"],
        "argument MODEL got 'timm:'; needs a preset such as vit_small, or LIBRARY:NAME",
        lambda patch: None,
    ),
    "a typo": (["timm:test_vitt"], "needs a name that timm knows, such as test_vit", lambda patch: None),
    "a hub": (["timm:hf-hub:timm/vit"], "needs a name that timm knows", lambda patch: None),
    "another typo": (
        ["vitkernels:vit_smal"],
        "needs a name that vitkernels knows, such as vit_small",
        lambda patch: None,
    ),
    "not installed": (["timm:test_vit"], "'timm:test_vit', which needs timm: pip install timm", _missing("timm")),
    "a size that does not fit": (
        ["vitkernels:vit_tiny", "--image-size", "20"],
        "argument 'img_size' is 20; needs a multiple of",
        lambda patch: None,
    ),
    "a device that is not there": (
        ["timm:test_vit", "--device", "cuda:99"],
        "argument --device got 'cuda:99'",
        lambda patch: None,
    ),
    "no device": (["timm:test_vit", "--device", "gpu"], "argument --device got 'gpu'", lambda patch: None),
}


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_sentence(
    what: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence, change = BAD[what]
    change(monkeypatch)
    assert main([command, *words]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.startswith("vitkernels: ")
    assert shown.count("\n") == 1


def test_text_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert main(["verify", "transformers:bert"]) == 2
    assert "which takes input_ids, attention_mask, token_type_ids; needs one that takes" in capsys.readouterr().err


def test_the_folder_of_the_figures_is_looked_for_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--json", "/nowhere/speed.json"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "vitkernels: bench: argument --json got '/nowhere/speed.json', whose folder is not there\n"
    assert shown.out == ""


@pytest.mark.parametrize("words", [["--batch", "0"], ["--image-size", "-3"], ["--batch", "two"]])
def test_counts_are_1_or_more(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "timm:test_vit", *words])
    assert stopped.value.code == 2
    assert f"argument {words[0]}: got {words[1]}; needs 1 or more" in capsys.readouterr().err
