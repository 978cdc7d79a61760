"""What the trainer takes from timm: augmentation, mixing, optimizers, schedules, averages; recipes, and curves."""

from __future__ import annotations

import copy
import functools
import json
import math
import signal
from pathlib import Path
from random import Random
from typing import Any

import peers
import pytest
import torch
from torch import nn
from train_setup import make_images, silent, tiny, tiny_words

import vitkernels as vk
from vitkernels.cli import main
from vitkernels.settings import RECIPES, TrainConfig, recipe
from vitkernels.train import load_model, metrics, train
from vitkernels.train.data import IGNORED, open_source
from vitkernels.train.from_timm import Mix
from vitkernels.train.lane import Lane
from vitkernels.train.loop import Trainer
from vitkernels.train.stopping import Stopped

timm = peers.import_timm()

ALL: dict[str, Any] = {
    "aug": "rand-m9-mstd0.5-inc1",
    "erase": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema": 0.9,
    "opt": "lamb",
    "layer_decay": 0.75,
    "sched": "cosine",
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def _rows(out: Path, key: str = "lr") -> list[dict[str, Any]]:
    return list(metrics.read(out / "metrics.jsonl", key=key))


def test_all_of_it_at_once_stops_and_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is drawn is a function of the seed and the step."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    result = train(tiny(folder, whole, epochs=3, **ALL), silent())
    assert {row["op"] for row in result["ops"]} >= {"attention_qkv", "mlp", "add_layer_norm"}
    log = Trainer._log

    def stop(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == 6:
            trainer.stop.number = signal.SIGINT
        log(trainer, row)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", stop)
        with pytest.raises(Stopped, match="stopped at step 7"):
            train(tiny(folder, out, epochs=3, **ALL), silent())
    torch.rand(3)
    train(tiny(folder, out, epochs=3, resume=True, workers=1, **ALL), silent())
    losses = [[row["fused"]["loss"] for row in _rows(each)] for each in (whole, out)]
    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) for loss in losses[0])
    for kind in ("last", "ema", "best"):
        weights = [load_model(each, kind)[0].state_dict() for each in (whole, out)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_average_is_tested_and_kept(folder: Path, tmp_path: Path) -> None:
    out, console = tmp_path / "run", silent()
    result = train(tiny(folder, out, epochs=3, ema=0.5), console)
    tests = [row["test"] for row in _rows(out, "test")]
    assert [set(each) for each in tests] == [{"fused", "ema"}] * 3
    assert tests[0]["ema"]["loss"] != tests[0]["fused"]["loss"]
    assert result["best"]["test_accuracy"] == max(each["ema"]["accuracy"] for each in tests)
    assert "ema " in console.file.getvalue()
    kinds = {name: load_model(out, name)[0].state_dict() for name in ("last", "ema")}
    assert any(not torch.equal(tensor, kinds["ema"][name]) for name, tensor in kinds["last"].items())


def test_the_best_weights_are_those_of_the_best_test(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.7])
    seen = []

    def score(figures: dict[str, Any]) -> float:
        seen.append(next(scores))
        return seen[-1]

    monkeypatch.setattr(Trainer, "_score", staticmethod(score))
    out = tmp_path / "run"
    save = Trainer._save
    states: list[dict[str, torch.Tensor]] = []

    def spy(trainer: Trainer) -> None:
        save(trainer)
        states.append(copy.deepcopy(trainer.main.model.state_dict()))

    monkeypatch.setattr(Trainer, "_save", spy)
    train(tiny(folder, out, epochs=3), silent())
    best = load_model(out, "best")[0].model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in best.items())


def test_mixing_leaves_out_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, mixup=0.8)
    mix = Mix(config, open_source(config), 4, torch.device("cpu"))
    images = torch.randint(1, 256, (4, 3, 16, 16), dtype=torch.uint8)
    images[1] = 0
    labels = torch.tensor([0, IGNORED, 2, 1])
    mixed, targets = mix(images, labels, Random(0))
    assert mixed.shape == images.shape
    assert mixed.amin() > 0, "no black image is in any"
    assert targets is not None
    torch.testing.assert_close(targets.sum(-1), torch.ones(4))
    assert torch.equal(mix(images, labels, Random(0))[0], mixed)
    assert not torch.equal(mix(images, labels, Random(1))[0], mixed)
    none, targets = mix(images, torch.full((4,), IGNORED), Random(0))
    assert targets is None
    assert none.shape == images.shape


def test_erasing_is_of_the_pixels(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, erase=0.9)
    images = torch.full((8, 3, 16, 16), 128, dtype=torch.uint8)
    erased, targets = Mix(config, open_source(config), 8, torch.device("cpu"))(images, torch.zeros(8).long(), Random(0))
    assert targets is None
    changed = (erased - 128 / 255).abs() > 1e-5
    assert 0.02 < changed.float().mean() < 0.6


def test_the_loss_of_mixed_images_is_that_of_their_targets(folder: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    step = Lane.step

    def spy(lane: Lane, images: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, taken: int) -> Any:
        with torch.no_grad():
            logits = copy.deepcopy(lane.model)(images)
        seen.append(-(targets * logits.log_softmax(-1)).sum(-1).mean())
        return step(lane, images, labels, targets, taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "step", spy)
        train(tiny(folder, tmp_path / "run", epochs=1, warmup_epochs=0.0, mixup=0.8), silent())
    losses = [row["fused"]["loss"] for row in _rows(tmp_path / "run")]
    assert losses == pytest.approx([each.item() for each in seen], rel=1e-5)


def test_layer_decay_lowers_the_rate_towards_the_image(folder: Path, tmp_path: Path) -> None:
    from vitkernels.train.distributed import World

    config = tiny(folder, tmp_path, layer_decay=0.5)
    model = vk.nn.create_model("vit_tiny", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    lane = Lane(model, config, World(0, 1, torch.device("cpu")), 4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(each)]: group["lr_scale"] for group in lane.optimizer.param_groups for each in group["params"]}
    assert scale["patch_embed.proj.weight"] < scale["blocks.0.mlp.fc1.weight"] < scale["blocks.1.mlp.fc1.weight"]
    assert scale["blocks.1.mlp.fc1.weight"] < scale["head.weight"] == 1.0


def test_a_steps_images_may_go_through_in_parts(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "0.png").write_bytes(b"damaged")
    runs = {parts: tmp_path / str(parts) for parts in (1, 2, 4)}
    for parts, out in runs.items():
        train(tiny(folder, out, accumulate=parts, val_split=0.0), silent())
    losses = {parts: [row["fused"]["loss"] for row in _rows(out)] for parts, out in runs.items()}
    for parts in (2, 4):
        assert losses[parts] == pytest.approx(losses[1], rel=1e-4)
        assert losses[parts] != losses[1], "sums in another order"


def test_gradients_are_clipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[tuple[float, float]] = []
    clip = nn.utils.clip_grad_norm_

    def spy(parameters: Any, limit: float) -> torch.Tensor:
        parameters = list(parameters)
        before = clip(parameters, limit)
        after = torch.stack([each.grad.norm() for each in parameters]).norm()
        norms.append((before.item(), after.item()))
        return before

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    train(tiny(folder, tmp_path / "run", epochs=1, warmup_epochs=0.0, clip_grad=0.01), silent())
    assert len(norms) == 4
    assert all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)


def test_fp16_scales_its_gradients(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(tiny(folder, out, amp="fp16", epochs=4, lr=1e-2, clip_grad=1.0), silent())
    assert math.isfinite(result["last_loss"]["fused"])
    assert result["last_loss"]["fused"] < _rows(out)[0]["fused"]["loss"]
    state = torch.load(out / "checkpoint.pt", weights_only=True)["lanes"]["fused"]["scaler"]
    assert state["scale"] > 1
    assert train(tiny(folder, out, amp="fp16", epochs=4, lr=1e-2, clip_grad=1.0, resume=True), silent()) == result


def test_a_compiled_model_trains_as_it_does_eager(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def spy(model: nn.Module) -> Any:
        compiled.append(model)
        return functools.partial(torch_compile, backend="aot_eager")(model)

    torch_compile = torch.compile
    train(tiny(folder, tmp_path / "eager"), silent())
    monkeypatch.setattr(torch, "compile", spy)
    train(tiny(folder, tmp_path / "compiled", compile=True), silent())
    assert len(compiled) == 1
    losses = [[row["fused"]["loss"] for row in _rows(tmp_path / name)] for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_is_settings(name: str) -> None:
    config = TrainConfig(**recipe(name, data="photos", lr=0.25))
    assert (config.data, config.lr) == ("photos", 0.25)
    assert config.amp == "bf16"


def test_the_recipes_are_these() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == ["deit", "finetune", "probe"]
    deit = TrainConfig(**recipe("deit", data="x"))
    assert (deit.mixup, deit.cutmix, deit.erase, deit.ema, deit.epochs) == (0.8, 1.0, 0.25, 0.9999, 300)


def test_a_recipe_of_ones_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 1\nwarmup-epochs: 0.5\nlr: 0.01\n")
    words = tiny_words(folder, tmp_path / "run", "--recipe", str(tmp_path / "mine.yaml"))
    del words[words.index("--lr") : words.index("--lr") + 2]
    assert main(words) == 0
    training = json.loads((tmp_path / "run/config.json").read_text())["training"]
    assert training["lr"] == 0.01
    assert training["epochs"] == 2, "what is given goes over the recipe"
    for text, sentence in (
        ("lrr: 1", "argument --recipe got '{}/mine.yaml', whose setting 'lrr' is unknown; did you mean lr?"),
        ("- lr", "needs lines such as 'lr: 0.001'"),
        ("lr: [", "which is no YAML"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        assert main(["train", "--data", "x", "--recipe", str(tmp_path / "mine.yaml")]) == 2
        assert sentence.format(tmp_path) in capsys.readouterr().err
    assert main(["train", "--data", "x", "--recipe", "diet"]) == 2
    assert "argument --recipe got 'diet'; needs deit, finetune, probe, or the path of" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- logs


def test_curves_for_tensorboard(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train(tiny(folder, out, log="tensorboard"), silent())
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = {event.step: event.value for event in read.Scalars("fused/loss")}
    assert losses == pytest.approx({row["step"]: row["fused"]["loss"] for row in _rows(out)}, rel=1e-6)
    assert [event.step for event in read.Scalars("test/fused/accuracy")] == [4, 8]
