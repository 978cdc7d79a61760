"""Weights to start from, and a head that trains alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file
from train_setup import TINY, make_images, silent, tiny

from vitkernels.nn import create_model
from vitkernels.train import load_model, train
from vitkernels.train.start import load_weights

timm = peers.import_timm()
SIZES: dict[str, Any] = TINY["model_args"]
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def _model(size: int = 16, **options: Any) -> Any:
    return create_model("vit_tiny", img_size=size, num_classes=3, **{**SIZES, **options}).eval()


def test_timms_weights_of_another_size_and_other_classes(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **SIZES)
    peers.stir(theirs)
    torch.save(
        {"state_dict": {f"module.{name}": each for name, each in theirs.state_dict().items()}}, tmp_path / "a.pt"
    )
    ours = _model()
    notes = load_weights(ours, tmp_path / "a.pt")
    own = ours.state_dict()
    assert torch.equal(own["blocks.1.mlp.fc1.weight"], theirs.state_dict()["blocks.1.mlp.fc1.weight"])
    assert own["pos_embed"].shape == (1, 5, 16)
    assert torch.equal(own["pos_embed"][:, 0], theirs.state_dict()["pos_embed"][:, 0])
    assert notes == [
        f"loaded {len(own) - 2} of {len(own)} tensors from {tmp_path}/a.pt",
        "resized: pos_embed",
        "starts anew: head.weight, head.bias",
        "of the file, not used: head.weight [7, 16], head.bias [7]",
    ]


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_transformers_weights_in_a_preset(kind: str, tmp_path: Path) -> None:
    """The same numbers come out, where the architecture is the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.for_model(kind, image_size=16, **HF)
    config.num_labels, config.mlp_ratio = 3, 4
    model = {"vit": transformers.ViTModel, "deit": transformers.DeiTModel, "dinov2": transformers.Dinov2Model}[kind]
    theirs = model(config).eval()
    peers.stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = _model(init_values=1.0 if kind == "dinov2" else None, eps=config.layer_norm_eps)
    notes = load_weights(ours, tmp_path / "model.safetensors")
    assert "starts anew: head.weight, head.bias" in notes if kind != "deit" else "pos_embed" in " ".join(notes)
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        if kind == "deit":  # has a distillation token, which is not ours
            layer = load_file(tmp_path / "model.safetensors")["encoder.layer.1.intermediate.dense.weight"]
            assert torch.equal(ours.state_dict()["blocks.1.mlp.fc1.weight"], layer)
            return
        torch.testing.assert_close(ours.forward_features(image), theirs(image).last_hidden_state, atol=1e-4, rtol=1e-3)


def test_transformers_weights_in_a_model_of_its_own(folder: Path, tmp_path: Path) -> None:
    """By its own names in the file, which are not those in memory; with positions of another size, and a new head."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, num_labels=7, **HF))
    peers.stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    out, console = tmp_path / "run", silent()
    file = str(tmp_path / "theirs/model.safetensors")
    config = tiny(folder, out, model="transformers:vit", model_args=HF, init_from=file, lr=1e-9, weight_decay=0.0)
    train(config, console)
    shown = console.file.getvalue()
    assert "resized: vit.embeddings.position_embeddings" in shown
    assert "starts anew: classifier.weight, classifier.bias" in shown
    weights = load_file(out / "model.safetensors")
    own = theirs.state_dict()
    for name in ("vit.layernorm.weight", next(name for name in own if name.endswith("layers.1.mlp.fc1.weight"))):
        torch.testing.assert_close(weights[name], own[name], atol=1e-6, rtol=1e-6)


def test_a_run_begins_with_anothers_weights(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny(folder, first, epochs=8, lr=1e-2), silent())
    count = len(load_model(first)[0].state_dict())
    for name in ("model.safetensors", "checkpoint.pt"):
        console = silent()
        out = second / name
        result = train(tiny(folder, out, epochs=1, warmup_epochs=0.0, lr=1e-6, init_from=str(first / name)), console)
        assert result["test_accuracy"]["fused"] == 1.0
        assert f"loaded {count} of {count} tensors from {first / name}" in console.file.getvalue()


def test_the_head_alone_trains(folder: Path, tmp_path: Path) -> None:
    whole, out, console = tmp_path / "whole", tmp_path / "run", silent()
    train(tiny(folder, whole, epochs=1, warmup_epochs=0.0), silent())
    file = str(whole / "model.safetensors")
    result = train(tiny(folder, out, init_from=file, freeze=True, drop_path=0.1), console)
    before, after = (load_model(each)[0].model.state_dict() for each in (whole, out))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert "51 of them trained" in console.file.getvalue()
    assert "trains head.weight, head.bias alone" in console.file.getvalue()
    assert {row["op"] for row in result["ops"]} >= {"attention_qkv", "mlp"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"damaged"), r"which holds no weights \(no file of torch.save's, or"),
        (lambda path: torch.save({"a": torch.zeros(2)}, path), "which has a, and the model cls_token, pos_embed, "),
        (lambda path: torch.save({}, path), "needs weights of the same kind of model"),
    ],
    ids=["damaged", "of something else", "empty"],
)
def test_what_holds_no_weights_of_the_model(make: Any, sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"argument 'init_from' got .*{sentence}"):
        load_weights(_model(), tmp_path / "a.pt")


def test_a_model_without_a_head_of_those_classes() -> None:
    from vitkernels.train.model import freeze_all_but_head

    with pytest.raises(ValueError, match="'freeze' is set, and no Linear of the model gives the classes"):
        freeze_all_but_head(_model(), 4)
