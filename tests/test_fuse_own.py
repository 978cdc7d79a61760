"""vk.fuse and vk.explain on the package's own modules, which are fused from the start."""

from __future__ import annotations

import pytest
import torch
from peers import SIZES
from torch import nn
from torch.nn.utils import parametrize

import vitkernels as vk


def test_fuse_leaves_them_as_they_are() -> None:
    model = vk.nn.VisionTransformer(**SIZES)
    classes = [type(module) for module in model.modules()]
    assert vk.fuse(model, strict=True) is model
    assert [type(module) for module in model.modules()] == classes
    with vk.record() as calls:
        model(torch.randn(2, 3, 32, 32))
    assert {call.op for call in calls} == {"patch_embed", "add_layer_norm", "linear", "attention_qkv", "mlp"}


def test_explain_counts_their_blocks() -> None:
    explanation = vk.explain(vk.nn.VisionTransformer(**SIZES))
    assert explanation.summary == "2 of 2 blocks fused"
    assert {row.ops for row in explanation.rows if row.module == "blocks.1"} == {
        "linear, attention, linear",
        "mlp",
        "add_layer_norm",
    }


def test_a_model_of_both_is_fused_where_it_is_not() -> None:
    theirs = nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True)
    model = nn.Sequential(vk.nn.Block(48, 3), theirs)
    assert vk.explain(vk.fuse(model)).summary == "2 of 2 blocks fused"
    assert type(model[0]) is vk.nn.Block
    assert type(model[1]) is not nn.TransformerEncoderLayer


def test_unfuse_says_what_was_put_on_a_fused_module_since() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Conv2d(3, 48, 8, 8), nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0))
    vk.fuse(model)
    parametrize.register_parametrization(model[0], "weight", Double())
    with pytest.raises(RuntimeError, match="'0' was made a ParametrizedConv2d after it was fused"):
        vk.unfuse(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(vk.unfuse(model)[0]) is nn.Conv2d
