"""Methods that a stock forward calls, and a fused one does not: where they are others, the module computes itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from timm_vit import images, vit
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.residual.genuine import owner

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True, norm_first=True),
    "post-norm": lambda: nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True),
}


def check_same_calls(model: nn.Module, twin: nn.Module, x: Tensor) -> set[str]:
    """The fused twin gives what the stock model gives; returns the ops that it ran."""
    expected = fused.output_and_gradients(model, (x,))
    with vk.record() as calls:
        got = fused.output_and_gradients(twin, (x,))
    fused.check_same(got, expected)
    return {call.op for call in calls}


@pytest.mark.parametrize("where", ["on the module", "on the class"])
@pytest.mark.parametrize("method", ["_sa_block", "_ff_block"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_of_torchs_layer_replaced_after_some_calls(
    kind: str, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(LAYERS[kind](), LAYERS[kind]())
    twin, x = vk.fuse(copy.deepcopy(model)), torch.randn(2, 9, 48)
    served = {"linear", "attention_qkv", "add_layer_norm", "mlp"}
    for _ in range(2):
        assert check_same_calls(model, twin, x) == served
    own = getattr(nn.TransformerEncoderLayer, method)

    def halved(layer: nn.Module, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        return 0.5 * own(layer, x, *args, **keywords)

    with monkeypatch.context() as patch:
        if where == "on the class":
            patch.setattr(nn.TransformerEncoderLayer, method, halved)
        else:
            for each in (model, twin):
                patch.setattr(each[0], method, halved.__get__(each[0]), raising=False)
        for _ in range(2):
            ran = check_same_calls(model, twin, x)
            assert ("add_layer_norm" in ran) is (where == "on the module"), "the other layer runs fused"
        assert method in str(vk.explain(twin))
        if where == "on the class":
            with pytest.raises(RuntimeError, match=method):
                vk.fuse(nn.Sequential(LAYERS[kind]()), strict=True)
    for each in (model, twin):  # monkeypatch hangs what was there before on the module
        vars(each[0]).pop(method, None)
    assert check_same_calls(model, twin, x) == served


def test_a_subclass_of_a_convolution_with_a_step_of_its_own() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    model = vit()
    model.patch_embed.proj.__class__ = Standardized
    assert owner(model.patch_embed.proj) is nn.Conv2d
    twin = vk.fuse(copy.deepcopy(model))
    ran = check_same_calls(model, twin, images())
    assert "patch_embed" not in ran
    assert "mlp" in ran


def test_a_subclass_of_sams_attention_with_positions_of_its_own() -> None:
    pytest.importorskip("transformers")
    from hf_models import hf
    from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

    class Halved(SamVisionSdpaAttention):
        def get_decomposed_rel_pos(self, *args: Any, **keywords: Any) -> Tensor:
            return 0.5 * super().get_decomposed_rel_pos(*args, **keywords)

    config = hf.SamVisionConfig(hidden_size=48, num_attention_heads=3, image_size=32, patch_size=8)
    for kind, ops in ((SamVisionSdpaAttention, {"linear", "attention_rel_pos"}), (Halved, set())):
        attn = kind(config, window_size=0)
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        model = nn.Sequential(attn)
        twin = vk.fuse(copy.deepcopy(model)) if ops else copy.deepcopy(model)
        if not ops:
            with pytest.raises(ValueError, match="get_decomposed_rel_pos"):
                vk.fuse(twin)
        assert check_same_calls(model, twin, torch.randn(2, 4, 4, 48)) == ops
