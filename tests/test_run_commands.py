"""What is done with a trained model: eval, predict, export."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from train_setup import make_images, silent, tiny

import vitkernels as vk
from vitkernels.cli import main
from vitkernels.fuse.swap import Fused
from vitkernels.train import load_model, train
from vitkernels.train.evaluate import calibration_error, evaluate
from vitkernels.train.export import export
from vitkernels.train.rollout import rollout

timm = peers.import_timm()
SIZES = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny": {**SIZES, "reg_tokens": 2, "init_values": 0.1},
    "timm:vit_tiny_patch16_224": SIZES,
    "transformers:vit": HF,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of each library's model."""
    made = {}
    for name, arguments in MODELS.items():
        made[name] = tmp_path_factory.mktemp("runs") / "run"
        train(tiny(folder, made[name], model=name, model_args=arguments, epochs=8, lr=1e-2, image_size=32), silent())
    return made


@pytest.fixture(scope="module")
def run(runs: dict[str, Path]) -> Path:
    return runs["vit_tiny"]


# --------------------------------------------------------------------------------------------------------------- eval


def test_eval(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run), "--data", str(folder), "--workers", "0", "--out", str(tmp_path / "eval")]
    with vk.record() as calls:
        assert main(words) == 0
    assert {call.op for call in calls} >= {"patch_embed", "attention_qkv", "mlp"}
    found = json.loads((tmp_path / "eval/eval.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert found["images"] == result["test_images"] == 6, "of the run's own data, what it held out"
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum(1).tolist() == [2, 2, 2]
    assert found["accuracy"] == confusion.diagonal().sum().item() / 6 == result["test_accuracy"]["fused"]
    assert found["top5"] == 1.0
    assert (tmp_path / "eval/confusion.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"{found['accuracy']:.2%}" in shown
    assert "calibration error" in shown
    assert "of 24 images" in shown


def test_eval_on_other_images_takes_all_of_them(run: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "others")
    found = evaluate(run, tmp_path / "others", workers=0)
    assert found.confusion.sum(1).tolist() == [8, 8, 8]
    assert found.notes == []


def test_eval_says_where_a_run_knows_the_images(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(folder, out, epochs=1, warmup_epochs=0.0, val_split=0.0), silent())
    found = evaluate(out, folder, workers=0)
    assert int(found.confusion.sum()) == 24
    assert "was trained on the images" in str(found)


def test_eval_on_scikit_learns_scans(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny("digits", out, model_args=SIZES, epochs=1, warmup_epochs=0.0, batch_size=400, image_size=16)
    result = train(config, silent())
    found = evaluate(out, "digits", workers=0)
    assert int(found.confusion.sum()) == result["test_images"]
    assert found.accuracy == pytest.approx(result["test_accuracy"]["fused"])


def test_eval_names_what_it_cannot_read_and_takes_the_held_out_half(run: Path, folder: Path, tmp_path: Path) -> None:
    for half in ("train", "val"):
        shutil.copytree(folder, tmp_path / half)
    (tmp_path / "val/red/0.png").write_bytes(b"damaged")
    shutil.rmtree(tmp_path / "val/blue")
    found = evaluate(run, tmp_path, workers=0)
    assert found.confusion.sum(1).tolist() == [0, 8, 7], "a class may be missing"
    assert len(found.skipped) == 1
    assert "val/red/0.png" in found.skipped[0]
    assert "skipped" in str(found)
    (tmp_path / "val/red").rename(tmp_path / "val/yellow")
    with pytest.raises(ValueError, match="with the class 'yellow'; needs those of the run: blue, green, red"):
        evaluate(run, tmp_path, workers=0)


def test_calibration() -> None:
    sure = torch.tensor([[0.999, 0.001]]).double().repeat(4, 1)
    assert calibration_error(sure, torch.zeros(4).long()) == pytest.approx(0.001, rel=1e-3)
    assert calibration_error(sure, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.499, rel=1e-3)
    half = torch.tensor([[0.51, 0.49]]).double().repeat(4, 1)
    assert calibration_error(half, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.01, rel=1e-3)
    mixed = torch.cat([sure, half])
    assert calibration_error(mixed, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])) == pytest.approx(
        (0.001 + 0.01) / 2, rel=1e-3
    )


# ------------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("name", MODELS)
def test_predict(
    name: str, runs: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(folder / "red/1.jpg"), str(folder / "blue/2.webp")]
    picture = tmp_path / "rollout.png"
    assert main(["predict", str(runs[name]), *images, "--json", "--top", "2", "--rollout", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found] == images
    assert [each["classes"][0]["class"] for each in found] == ["red", "blue"]
    for each in found:
        first, second = (entry["probability"] for entry in each["classes"])
        assert 1 >= first > second >= 0
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 300
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 100


def test_predict_as_text(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / "green/0.png")
    assert main(["predict", str(run), image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == image
    assert len(lines) == 1 + 3
    assert lines[1].endswith("green")
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=0.03)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.png"], "argument IMAGE got 'nowhere.png', which is no file"),
        (["{}"], "which cannot be read: cannot identify image file"),
    ],
)
def test_an_image_that_is_none(
    words: list[str], sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"damaged")
    assert main(["predict", str(run), *(word.format(tmp_path / "a.png") for word in words)]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1


def test_weights_too_large_for_one_file_of_onnx_lie_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(importlib.import_module("vitkernels.train.export"), "LARGEST", 1000)
    path = export(run, "onnx", tmp_path / "large.onnx")  # read back, and compared
    assert (tmp_path / "large.onnx.data").stat().st_size > 1000
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    assert any(each.external_data for each in initializers)


def test_rollout_follows_the_attention(runs: dict[str, Path]) -> None:
    """Where every query looks at one patch alone, the answer comes from there."""
    for name, prefixes in (("vit_tiny", 3), ("timm:vit_tiny_patch16_224", 1)):
        model, _ = load_model(runs[name])
        inner = model.model if name == "vit_tiny" else model.model.model
        assert inner.num_prefix_tokens == prefixes
        black = torch.zeros(3, 32, 32, dtype=torch.uint8)
        with torch.no_grad():
            for block in inner.blocks:
                block.attn.qkv.weight.zero_()
                block.attn.qkv.bias.zero_()
            torch.testing.assert_close(rollout(model, black), torch.full((4, 4), 1 / 16))
            # the sixth patch is the opposite of all other tokens, and what the first block's queries ask for
            ramp = torch.linspace(-1, 1, 16)
            inner.patch_embed.proj.weight.zero_()
            inner.patch_embed.proj.bias.copy_(ramp)
            for token in (inner.cls_token, inner.reg_token):
                if token is not None:
                    token.copy_(ramp)
            inner.pos_embed.zero_()
            inner.pos_embed[0, prefixes + 5] = -2 * ramp
            attention = inner.blocks[0].attn
            attention.qkv.weight[16:32] = torch.eye(16)
            attention.qkv.bias[:16] = -20 * ramp
        heat = rollout(model, black)
        assert heat.sum().item() == pytest.approx(1)
        assert heat.argmax() == 5
        assert heat[1, 1] > 0.5
        assert model(black[None]).shape == (1, 3), "the model is as it was"


def test_windows_cannot_be_rolled_out(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "img_size": 32}
    settings: dict[str, Any] = {"model": "timm:swin_tiny_patch4_window7_224", "model_args": arguments}
    train(tiny(folder, out, **settings, image_size=32, epochs=1, warmup_epochs=0.0), silent())
    with pytest.raises(ValueError, match=r"argument 'rollout' is set with .*; needs a model with attention over all"):
        rollout(load_model(out)[0], torch.zeros(3, 32, 32, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------------- export


def _pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _answers(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(run)[0](images)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


@pytest.mark.parametrize("name", ["vit_tiny", "timm:vit_tiny_patch16_224"])
def test_export_to_timm(name: str, runs: dict[str, Path]) -> None:
    assert main(["export", str(runs[name]), "--to", "timm"]) == 0
    model = timm.create_model(f"local-dir:{runs[name] / 'timm'}", pretrained=True).eval()
    assert not any(isinstance(each, Fused) for each in model.modules())
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    images = _pixels()
    with torch.no_grad():
        torch.testing.assert_close(model(_normalised(images)), _answers(runs[name], images), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_export_to_transformers(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert export(runs[name], "transformers", tmp_path / "out") == tmp_path / "out"
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    images = _pixels()
    with torch.no_grad():
        logits = model(pixel_values=_normalised(images)).logits
    torch.testing.assert_close(logits, _answers(runs[name], images), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_export_to_onnx(name: str, runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Standard operators alone, for any batch."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert main(["export", str(runs[name]), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]) == 0
    graph = onnx.load(tmp_path / "a.onnx")
    assert {each.domain for each in graph.opset_import} == {""}
    counts = Counter(node.op_type for node in graph.graph.node)
    assert [counts[kind] for kind in ("LayerNormalization", "Gelu")] == [5, 2]
    assert {"Erf", "ReduceMean"} & set(counts) == set(), "neither is in pieces"
    masked = name.startswith("transformers:")  # it gives a mask
    assert (counts["Softmax"], counts["Exp"]) == ((0, 4) if masked else (2, 0))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == (f"wrote {tmp_path / 'a.onnx'}\n", ""), "what libraries say of it is kept back"
    images = _pixels()
    for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
        found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        np.testing.assert_allclose(found, _answers(runs[name], batch), atol=1e-4, rtol=1e-3)


def test_export_to_torch_export(run: Path) -> None:
    assert main(["export", str(run), "--to", "torch-export"]) == 0
    graph = torch.export.load(str(run / "model.pt2"))
    assert any("vitkernels.mlp" in str(node.target) for node in graph.graph.nodes), "it runs fused"
    images = _pixels()
    torch.testing.assert_close(graph.module()(images), _answers(run, images), atol=1e-5, rtol=1e-4)


def test_a_model_that_differs_over_there_is_not_to_be_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkernels.train import export as page

    monkeypatch.setattr(page, "_normalised", lambda model, images: images)
    with pytest.raises(ValueError, match=r"the answers of .* differ by .* from the model's"):
        export(run, "timm")


def test_what_has_no_counterpart_is_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is for models of timm and presets, and the run has 'transformers:vit'"):
        export(runs["transformers:vit"], "timm")
    with pytest.raises(ValueError, match="argument 'to' got 'coreml'; needs 'timm' or"):
        export(runs["transformers:vit"], "coreml")


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
def test_a_folder_without_a_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"eval": ["--data", "x"], "predict": ["x.png"], "export": ["--to", "timm"]}[command]
    assert main([command, str(tmp_path), *more]) == 2
    shown = capsys.readouterr().err
    assert "which holds no config.json" in shown
    assert shown.count("\n") == 1
