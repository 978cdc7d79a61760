"""Every library's classifiers train fused, by one name each; what cannot be fused is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from train_setup import make_images, silent, tiny

import vitkernels as vk
from vitkernels import models
from vitkernels.nn import PRESETS, create_model
from vitkernels.train import load_model, train

peers.import_timm()
HF: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}
SIZES = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

# name -> its arguments, the blocks that run fused
CLASSIFIERS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny": (SIZES, 2),
    "vitkernels:vit_tiny_patch16": (SIZES, 2),
    "vit_tiny_patch16_224": (SIZES, 2),
    "timm:deit_tiny_patch16_224": (SIZES, 2),
    "timm:test_vit": ({}, 6),
    "torchvision:vit_b_16": ({}, 12),
    "transformers:vit": (HF, 2),
    "transformers:deit": (HF, 2),  # a type of two classifiers
    "transformers:clip": (HF, 2),  # two towers, of which one sees
    "transformers:hiera": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_stride": [2, 2], "patch_padding": [1, 1]}
        | {"patch_size": [3, 3], "query_stride": [2, 2], "masked_unit_size": [2, 2], "num_query_pool": 1},
        2,
    ),  # its image size is a list
    "transformers:dinov2": ({**{name: HF[name] for name in HF if name != "intermediate_size"}, "mlp_ratio": 2}, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images", each=2)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_it_trains_fused(name: str, folder: Path, tmp_path: Path) -> None:
    library = models.library_of(name)[0]
    if library == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    arguments, blocks = CLASSIFIERS[name]
    console = silent()
    config = tiny(
        folder, tmp_path / "run", model=name, model_args=arguments, epochs=1, warmup_epochs=0.0, batch_size=2,
        val_split=0.5,
    )  # fmt: skip
    result = train(config, console)
    assert f"{blocks} of {blocks} blocks fused" in console.file.getvalue()
    ran = {(row["op"], row["direction"]): row["calls"] for row in result["ops"]}
    assert ran["mlp", "backward"] == blocks
    assert {row["backend"] for row in result["ops"]} == {"ext"}
    model, classes = vk.load_model(tmp_path / "run")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        answers = model(images)
        torch.testing.assert_close(model(images / 255), answers, atol=1e-5, rtol=1e-4)
    assert answers.shape == (2, len(classes)) == (2, 3)
    with pytest.raises(
        ValueError, match=r"argument 'image' holds floats from -0.5 to .*; needs uint8, or floats from 0 to 1"
    ):
        model(images / 255 - 0.5)
    with pytest.raises(ValueError, match="holds floats from"):
        model(images.float())


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("timm:resnet18", {}, "'timm:resnet18': fuse: nothing to fuse in this ResNet; needs attention"),
        ("torchvision:resnet18", {}, "'torchvision:resnet18': fuse: nothing to fuse in this ResNet"),
        ("transformers:bert", {}, "needs one that AutoModelForImageClassification knows"),
        ("transformers:vit", {"patches": 3}, "its config, ViTConfig, has no 'patches'"),
        ("transformers:vit", {"hidden_size": "wide"}, "Validation error for field 'hidden_size'"),
        ("transformers:swin", {}, "'transformers:swin', which does not run on images of 16 x 16: "),
        ("keras:vit", {}, "'keras:vit'; needs a preset such as vit_small, or LIBRARY:NAME"),
        ("transformers:dinat", {}, "DinatForImageClassification requires the natten library"),
        ("transformers:vti", {}, "'transformers:vti'; needs a name that transformers knows, such as vit"),
        ("torchvision:vit_b_61", {}, "'torchvision:vit_b_61'; needs a name that torchvision knows, such as vit_b_16"),
        ("vitkernels:vit_smal", {}, "'vitkernels:vit_smal'; needs a name that vitkernels knows, such as vit_small"),
        ("vit_smal", {}, "'vit_smal'; needs a preset or a name that timm knows, such as vit_small"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    name: str, arguments: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ValueError, match="argument 'model' got") as raised:
        train(tiny(folder, tmp_path / "run", model=name, model_args=arguments, batch_size=2), silent())
    assert sentence in " ".join(str(raised.value).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vit_tiny", "vit_tiny_patch16", "vitkernels:vit_tiny"])
def test_a_preset_has_its_names_everywhere(name: str) -> None:
    assert models.library_of(name)[0] == "vitkernels"
    assert type(models.build(name, 32).module) is vk.nn.VisionTransformer
    if ":" not in name:
        with torch.device("meta"):
            assert type(create_model(name)) is vk.nn.VisionTransformer
    assert "vit_tiny_patch16" in PRESETS


def test_other_weights_are_read_by_name(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(folder, out, batch_size=2), silent())
    assert load_model(out, "best")[1] == ["blue", "green", "red"]
    with pytest.raises(FileNotFoundError, match=r"holds no ema\.safetensors"):
        load_model(out, "ema")
    with pytest.raises(ValueError, match="argument 'weights' got 'first'; needs 'last' or 'best' or 'ema'"):
        load_model(out, "first")
    assert json.loads((out / "config.json").read_text())["model"]["name"] == "vit_tiny_patch16"
