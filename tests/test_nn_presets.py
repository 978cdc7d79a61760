"""Models by name."""

from __future__ import annotations

import sys

import peers
import pytest
import torch

from vitkernels.nn import PRESETS, VisionTransformer, create_model

timm = peers.import_timm()


def test_every_size_comes_with_every_patch() -> None:
    sizes = ("tiny", "small", "base", "large", "so400m", "huge", "giant")
    assert PRESETS.keys() == {f"vit_{size}_patch{patch}" for size in sizes for patch in (14, 16, 32)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_timms(name: str) -> None:
    """Where timm has that size and patch, its shapes are the same; elsewhere the model is built."""
    patch = int(name.rpartition("patch")[2])
    with torch.device("meta"):
        ours = create_model(name, img_size=2 * patch, num_classes=5)
        if not timm.is_model(f"{name}_224"):
            assert ours.head.out_features == 5
            return
        theirs = timm.create_model(f"{name}_224", img_size=2 * patch, num_classes=5)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_so400m_has_its_hidden_width() -> None:
    with torch.device("meta"):
        model = create_model("vit_so400m_patch14")
    assert model.blocks[0].mlp.fc1.weight.shape == (4304, 1152)
    assert len(model.blocks) == 27


def test_arguments_go_over_the_presets() -> None:
    model = create_model("vit_tiny_patch16", img_size=32, num_classes=7, depth=1, drop_path_rate=0.1, mean=(0.5,) * 3)
    assert isinstance(model, VisionTransformer)
    assert len(model.blocks) == 1
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["timm:test_vit", "test_vit", "test_resnet"])
def test_other_names_are_timms(name: str) -> None:
    """A convolutional network takes any size, and no `img_size`."""
    model = create_model(name, img_size=64, num_classes=7)
    assert type(model).__module__.startswith("timm.")
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["vit_smal_patch16", "timm:vit_smal_patch16"])
@pytest.mark.parametrize("installed", [True, False])
def test_an_unknown_name(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"'name' is '{name}'; needs a preset such as 'vit_small_patch16'.*timm"):
        create_model(name)
