"""The trainer: what it learns, what it writes, what it says of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import peers
import pytest
import torch
from train_setup import COLOURS, make_images, silent, tiny

from vitkernels import models
from vitkernels.nn import create_model
from vitkernels.train import demo_config, load_model, metrics, report, train
from vitkernels.train.data import held_out_loader, open_source
from vitkernels.train.distributed import World
from vitkernels.train.lane import Lane
from vitkernels.train.loop import Trainer
from vitkernels.train.model import parameter_groups


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def _rows(out: Path) -> list[dict]:
    return list(metrics.read(out / "metrics.jsonl"))


def test_it_learns_and_writes_all_that_it_promises(folder: Path, tmp_path: Path) -> None:
    out, console = tmp_path / "run", silent()
    result = train(tiny(folder, out, epochs=8, lr=1e-2), console)
    assert result["test_accuracy"]["fused"] == 1.0
    assert result["last_loss"]["fused"] < 0.6 < 1.0 < _rows(out)[0]["fused"]["loss"]
    assert (result["train_images"], result["test_images"], result["steps"]) == (18, 6, 8 * 4)
    assert result["images_per_second"]["fused"] == pytest.approx(4 / result["step_seconds"]["fused"])
    assert {path.name for path in out.iterdir()} == {
        "best.safetensors",
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "speed.png",
    }
    assert json.loads((out / "result.json").read_text()) == result
    for chart in ("curves.png", "speed.png"):
        assert (out / chart).read_bytes().startswith(b"\x89PNG")
    rows = _rows(out)
    assert [row["step"] for row in rows if "test" not in row] == list(range(1, 33))
    assert [row["epoch"] for row in rows if "test" in row] == list(range(1, 9))
    shown = console.file.getvalue()
    for words in (
        "epoch 8 of 8: test accuracy fused 100.00%",
        "images per second",
        "Which backend ran each op",
        "images: 18 to train on, 6 to test on, in 3 classes",
        "2 of 2 blocks fused",
        "steps: 32 of 4 images, 4 an epoch",
        "step 32 of 32: loss 0.",
    ):
        assert words in shown


def test_the_fused_path_runs(folder: Path, tmp_path: Path, backend: str) -> None:
    result = train(tiny(folder, tmp_path / "run", epochs=1, backend=backend), silent())
    ran = {(row["op"], row["direction"]): (row["backend"], row["calls"]) for row in result["ops"]}
    assert set(ran) == {
        (op, direction)
        for op in ("patch_embed", "attention_qkv", "add_layer_norm", "mlp", "linear")
        for direction in ("forward", "backward")
    }
    assert {name for name, _ in ran.values()} == {backend}
    assert ran["mlp", "forward"] == ran["mlp", "backward"] == (backend, 2), "one step, two blocks"


def test_a_trained_model_is_read_back(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny(folder, out)
    result = train(config, silent())
    model, classes = load_model(out)
    assert classes == sorted(COLOURS)
    loader = held_out_loader(open_source(config), config, 0, 1, pin=False)
    assert loader is not None
    with torch.no_grad():
        right = sum((model(batch.images).argmax(-1) == batch.labels).sum().item() for batch in loader)
    assert right / 6 == result["test_accuracy"]["fused"]
    (out / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_model(out)


def test_naive_and_fused_stay_together(folder: Path, tmp_path: Path) -> None:
    result = train(tiny(folder, tmp_path / "run", epochs=5, compare="naive", label_smoothing=0.1), silent())
    assert result["largest_loss_difference"] < 1e-4
    assert result["test_accuracy"]["naive"] == result["test_accuracy"]["fused"]
    assert result["ratio"] == pytest.approx(result["step_seconds"]["naive"] / result["step_seconds"]["fused"])
    losses = [(row["naive"]["loss"], row["fused"]["loss"]) for row in _rows(tmp_path / "run") if "test" not in row]
    assert result["largest_loss_difference"] == max(abs(a - b) for a, b in losses)
    assert losses[0][0] == pytest.approx(losses[0][1], abs=1e-6), "they start from the same weights"
    assert losses[-1][0] < losses[0][0]


def test_every_model_has_its_own_column() -> None:
    speeds = {"naive": 100.0, "timm": 125.0, "fused": 150.0}
    figures = dict.fromkeys(("test_accuracy", "test_top5", "last_loss", "step_seconds"), speeds)
    run = {"model": "vit", "steps": 1, "batch_size": 2, "device": "Abacus", "skipped": []}
    run |= {"best": None, "decoded_per_second": None}
    text = report._figures_text(
        {**run, **figures, "images_per_second": speeds, "ratio": 1.5, "largest_loss_difference": 0.001}
    )
    lines = text.splitlines()
    assert lines[0] == "vit, 1 steps of 2 images, on Abacus"
    assert lines[1].split() == ["naive", "timm", "fused"]
    assert lines[-2].split() == ["images", "per", "second,", "ratio", "1.00", "1.25", "1.50"]
    assert lines[-1].split() == ["largest", "difference", "of", "the", "losses", "1.0e-03"]
    assert lines[-1].index("1.0e-03") == lines[1].index("fused")


def test_the_two_models_take_turns(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    step = Lane.step
    monkeypatch.setattr(
        Lane, "step", lambda lane, *batch: (taken.append(type(lane.model).__name__), step(lane, *batch))[1]
    )
    train(tiny(folder, tmp_path / "run", epochs=1, compare="naive"), silent())
    naive, fused = "NaiveVisionTransformer", "VisionTransformer"
    assert taken == [naive, fused, fused, naive] * 2


def test_the_learning_rate_warms_up_and_follows_a_cosine(folder: Path, tmp_path: Path) -> None:
    train(tiny(folder, tmp_path / "run", epochs=5, warmup_epochs=1.0, lr=0.01), silent())
    rates = [row["lr"] for row in _rows(tmp_path / "run") if "test" not in row]
    warmup = [0.01 * (0.01 + 0.99 * step / 4) for step in range(4)]
    cosine = [0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(warmup + cosine)


def test_only_matrices_decay() -> None:
    model = create_model("vit_tiny_patch16", img_size=32, depth=1, num_classes=3, init_values=1.0, reg_tokens=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        {names[id(parameter)] for parameter in group["params"]} for group in parameter_groups(model, 0.05)
    )
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {"pos_embed", "cls_token", "reg_token", "norm.weight", "blocks.0.ls1.gamma", "head.bias"} <= others
    assert decayed | others == set(names.values())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchvision:vit_b_16", {}),
        ("transformers:vit", {"num_hidden_layers": 1}),
        ("timm:deit_tiny_distilled_patch16_224", {"depth": 1}),
    ],
)
def test_positions_and_tokens_of_no_library_decay(name: str, arguments: dict[str, int]) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    model = models.create(name, models.Asked(image_size=32, classes=3, arguments=arguments)).module
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        {names[id(parameter)] for parameter in group["params"]} for group in parameter_groups(model, 0.05)
    )
    assert len([each for each in decayed if re.search("pos|token|class_emb", each)]) == 0, decayed
    assert len([each for each in others if re.search("pos|token|class_emb", each)]) >= 2, others
    assert any("proj" in each for each in decayed)


def test_positions_start_as_large_as_asked(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, position_std=3.0, compare="naive")
    lanes = Trainer(config, World(0, 1, torch.device("cpu")), open_source(config), tmp_path, silent()).lanes
    tables = [lane.model.pos_embed for lane in lanes.values()]
    assert tables[0].std().item() == pytest.approx(3.0, rel=0.3)
    assert torch.equal(*tables)


def test_bf16_trains_in_bf16(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    step = Lane.step

    def watch(lane: Lane, *batch: torch.Tensor):
        handle = lane.model.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        try:
            return step(lane, *batch)
        finally:
            handle.remove()

    monkeypatch.setattr(Lane, "step", watch)
    result = train(tiny(folder, tmp_path / "run", amp="bf16"), silent())
    assert seen == {torch.bfloat16}
    assert math.isfinite(result["last_loss"]["fused"])


def test_a_model_of_timm(folder: Path, tmp_path: Path) -> None:
    peers.import_timm()
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    out = tmp_path / "run"
    result = train(
        tiny(folder, out, model="vit_tiny_patch16_224", model_args=small, epochs=8, lr=1e-2, drop_path=0.1), silent()
    )
    assert result["test_accuracy"]["fused"] == 1.0, "uint8 pixels reach it scaled and normalised"
    ran = {(row["op"], row["direction"]) for row in result["ops"]}
    assert ran >= {("attention_qkv", "backward"), ("mlp", "backward"), ("add_layer_norm", "backward")}
    trained, _ = load_model(out)
    model = trained.model
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = model.model((image / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    torch.testing.assert_close(model(image), expected)


def test_without_a_test_set(folder: Path, tmp_path: Path) -> None:
    result = train(tiny(folder, tmp_path / "run", val_split=0.0), silent())
    assert (result["test_images"], result["test_accuracy"]["fused"]) == (0, None)


def test_corrupt_images_are_named_counted_and_skipped(folder: Path, tmp_path: Path) -> None:
    for name in ("green/0.png", "red/5.webp"):
        (folder / name).write_bytes(b"damaged")
    console = silent()
    result = train(tiny(folder, tmp_path / "run", epochs=2, batch_size=6, val_split=0.0), console)
    assert len(result["skipped"]) == 2
    for name, line in zip(("green/0.png", "red/5.webp"), result["skipped"], strict=True):
        assert str(folder / name) in line
        assert str(folder / name) in console.file.getvalue()
    read = [row["fused"]["images"] for row in _rows(tmp_path / "run")]
    assert sum(read) == 2 * (24 - 2)


def test_images_that_cannot_be_read_do_not_change_the_loss_of_the_others() -> None:
    from vitkernels.train.data import IGNORED
    from vitkernels.train.lane import _sums

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    masked = torch.cat([labels[:3], torch.full((2,), IGNORED)])
    for smoothing in (0.0, 0.2):
        whole = _sums(logits[:3], labels[:3], smoothing)
        torch.testing.assert_close(_sums(logits, masked, smoothing), whole)
    assert torch.equal(_sums(logits, torch.full((5,), IGNORED), 0.1), torch.zeros(4))


def test_a_folder_of_corrupt_images_stops(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"none of 4 images can be read, the first being .*images/"):
        train(tiny(folder, tmp_path / "run"), silent())


def test_a_loss_that_is_no_number_stops(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"loss of the fused model is (nan|inf) at step \d+; needs a lower 'lr'"
    ):
        train(tiny(folder, tmp_path / "run", lr=1e38), silent())


def test_the_run_is_the_same_whoever_watches(folder: Path, tmp_path: Path) -> None:
    """Nothing that the run does depends on the state of the process that it is started in."""
    train(tiny(folder, tmp_path / "one", drop_path=0.2), silent())
    torch.rand(7)
    train(tiny(folder, tmp_path / "two", drop_path=0.2, workers=1), silent())
    one, two = (
        [row["fused"]["loss"] for row in _rows(tmp_path / name) if "test" not in row] for name in ("one", "two")
    )
    assert one == two


def test_the_backend_holds_for_the_run_alone(folder: Path, tmp_path: Path) -> None:
    from vitkernels import dispatch

    before = dispatch.order("cpu")
    train(tiny(folder, tmp_path / "run", epochs=1, backend="reference"), silent())
    assert dispatch.order("cpu") == before


def test_default_folder_is_under_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(dataclasses.replace(tiny(folder, "", epochs=1), out=None), silent())
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("images-")
    assert (out / "result.json").exists()


def test_the_demo_is_a_preset_of_the_trainer(tmp_path: Path) -> None:
    config = demo_config(backend="ext,reference", out=str(tmp_path / "run"))
    trainer = Trainer(config, World(0, 1, torch.device("cpu")), open_source(config), tmp_path / "run", silent())
    model = trainer.main.model
    assert (model.patch_embed.num_patches, model.embed_dim) == (64, 192)
    assert list(trainer.lanes) == ["naive", "fused"]
